"""`twin-bench helm-config` and helm-run: what is written, what is refused, and a run end to end."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helm.benchmark.presentation.run_entry import read_run_entries
from helm.benchmark.scenarios.scenario import create_scenario
from helm.common.object_spec import parse_object_spec

from tests.support.interpreter import ADAPTERS, HEAVY, ROOT, loaded_by, python
from tests.support.models import WORDS, tiny_causal_tokenizer
from twin_bench import InputError
from twin_bench.cli import main
from twin_bench.files import digest_file
from twin_bench.serving.settings import TwinSettings
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe
from twin_bench_helm.config import deployment_entry, metadata_entry, tokenizer_entry, write_helm_config
from twin_bench_helm.local_path import LOCK
from twin_bench_helm.plugin import cnndm


@pytest.fixture
def twin(causal_twins: Any) -> Path:
    return causal_twins("llama")


def test_three_files_name_the_twin_and_keep_what_is_there(twin: Path, tmp_path: Path) -> None:
    other = {"model_deployments": [{"name": "other/model", "client_spec": {"class_name": "x"}}]}
    (tmp_path / "model_deployments.yaml").write_text(yaml.safe_dump(other))
    command = ["helm-config", str(twin), "--name", "tiny", "--local-path", str(tmp_path)]
    assert main([*command, "--dtype", "float32", "--device", "cpu", "--batch-size", "4", "--compile", "off"]) == 0
    deployments = yaml.safe_load((tmp_path / "model_deployments.yaml").read_text())["model_deployments"]
    assert deployments[0] == other["model_deployments"][0]
    assert deployments[1]["name"] == deployments[1]["tokenizer_name"] == "twin_merged/tiny"
    assert deployments[1]["max_sequence_length"] == deployments[1]["max_sequence_and_generated_tokens_length"] == 64
    assert deployments[1]["client_spec"]["args"] == {
        "twin": str(twin),
        "device": "cpu",
        "dtype": "float32",
        "protocol": "standard",
        "batch_size": 4,
        "compile": "off",
        "apply_chat_template": False,
    }
    model = yaml.safe_load((tmp_path / "model_metadata.yaml").read_text())["models"][0]
    assert (model["name"], model["display_name"]) == ("twin_merged/tiny", "tiny")
    tokenizer = yaml.safe_load((tmp_path / "tokenizer_configs.yaml").read_text())["tokenizer_configs"][0]
    assert (tokenizer["end_of_text_token"], tokenizer["prefix_token"]) == ("[SEP]", "[CLS]")


def test_auto_leaves_the_device_to_the_machine_that_runs_helm(twin: Path, tmp_path: Path) -> None:
    assert main(["helm-config", str(twin), "--name", "tiny", "--local-path", str(tmp_path), "--device", "auto"]) == 0
    (deployment,) = yaml.safe_load((tmp_path / "model_deployments.yaml").read_text())["model_deployments"]
    assert "device" not in deployment["client_spec"]["args"]


def test_what_is_refused(twin: Path, families: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_twin(Recipe.model_validate({**families("bert").recipe, "router": None}), tmp_path / "classifier")
    there = tmp_path / "there"
    assert main(["helm-config", str(twin), "--name", "tiny", "--local-path", str(there)]) == 0
    before = {file.name: file.read_text() for file in there.iterdir()}
    for name, text in (("foreign", "- a list\n"), ("strings", "models: [a, b]\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_metadata.yaml").write_text(text)
    for source, name, local, says in (
        (twin, "tiny", there, "twin_merged/tiny is there already"),
        (twin, "a/b", there, "letters, digits"),
        (tmp_path / "none", "new", there, "no twin there"),
        (tmp_path / "classifier", "new", there, "does not generate text"),
        (twin, "new", tmp_path / "foreign", "is it HELM's?"),
        (twin, "new", tmp_path / "strings", "is it HELM's?"),
    ):
        assert main(["helm-config", str(source), "--name", name, "--local-path", str(local)]) == 2
        assert says in capsys.readouterr().err
    assert {file.name: file.read_text() for file in there.iterdir()} == before
    assert {file.name for file in (tmp_path / "foreign").iterdir()} - {LOCK} == {"model_metadata.yaml"}


def test_entries_are_plain_data_of_what_they_are_given(tmp_path: Path) -> None:
    manifest = {
        "experts": ["mmlu", "bbq"],
        "parameters": {"shared": 7, "exclusive": 2},
        "shared": {"method": "ties", "density": 0.2},
        "exclusive": {"rank": 8},
        "router": {"layer": 4, "top_k": 2, "paper": {"layer": -1}},
    }
    entry = metadata_entry("twin_merged/mine", manifest, TwinSettings())
    assert (entry.file, entry.key, entry.content["num_parameters"]) == ("model_metadata.yaml", "models", 9)
    assert entry.content["description"] == (
        "Twin-merged model of mmlu, bbq: shared expert by ties, exclusive vectors of rank 8, router on layer 4 with "
        "its 2 largest weights, tolerance default, protocol standard."
    )
    entry = metadata_entry("twin_merged/mine", manifest, TwinSettings(protocol="paper", tolerance=0.01))
    assert entry.content["description"].endswith("router on layer -1, tolerance 0.01, protocol paper.")
    entry = metadata_entry("twin_merged/mine", {**manifest, "router": {}}, TwinSettings())
    assert "no router" in entry.content["description"]
    without_ends = SimpleNamespace(eos_token=None, bos_token=None)
    assert tokenizer_entry("twin_merged/mine", tmp_path, without_ends).content["prefix_token"] == ""
    ends = SimpleNamespace(eos_token="</s>", bos_token=None)
    assert tokenizer_entry("twin_merged/mine", tmp_path, ends).content["prefix_token"] == "</s>"
    client = deployment_entry("twin_merged/mine", 5, {"twin": "t", "device": None}).content["client_spec"]
    assert client["args"] == {"twin": "t"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tolerance", "-1"], "helm-config: tolerance: Input should be greater than or equal to 0 (found -1.0)"),
        (["--tolerance", "nan"], "helm-config: tolerance: Input should be"),
        (["--tolerance", "1"], "helm-config: tolerance: Input should be less than 1"),
        (["--batch-size", "0"], "helm-config: batch_size: Input should be greater than or equal to 1 (found 0)"),
        (["--dtype", "int8"], "helm-config: dtype: Input should be 'float32', 'bfloat16' or 'float16' (found 'int8')"),
        (["--device", "gpu9"], "helm-config: device: no device: auto, cpu, cuda, cuda:1"),
        (["--protocol", "paper"], "can't serve protocol paper, which needs LoRA experts"),
        (["--chat-template"], "the tokenizer has no chat template; leave out --chat-template"),
    ],
)
def test_what_a_twin_can_not_be_served_with(
    twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    command = ["helm-config", str(twin), "--name", "new", "--local-path", str(tmp_path / "there")]
    assert main([*command, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "there").exists()


def test_a_twin_that_can_not_answer_is_not_written_down(twin: Path, causal_families: Any, tmp_path: Path) -> None:
    shutil.copytree(twin, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    build_twin(Recipe.model_validate({**causal_families("llama").recipe, "router": None}), tmp_path / "unrouted")
    for name, options, says in (
        ("damaged", {}, r"model\.safetensors: edited or damaged"),
        ("unrouted", {}, "has no router for protocol standard"),
    ):
        with pytest.raises(InputError, match=says):
            write_helm_config(tmp_path / name, "new", tmp_path / "there", **options)
    assert not (tmp_path / "there").exists()


def test_an_entry_is_replaced_where_that_is_asked_for(twin: Path, tmp_path: Path) -> None:
    for name in ("first", "tiny", "last"):
        write_helm_config(twin, name, tmp_path)
    file = tmp_path / "model_deployments.yaml"
    file.write_text("# by hand\n" + file.read_text())
    write_helm_config(twin, "tiny", tmp_path, batch_size=3, device="cuda:7", replace=True)
    found = yaml.safe_load(file.read_text())["model_deployments"]
    assert [entry["name"] for entry in found] == ["twin_merged/first", "twin_merged/tiny", "twin_merged/last"]
    assert [entry["client_spec"]["args"]["batch_size"] for entry in found] == [8, 3, 8]
    assert file.read_text().startswith("# by hand\n")
    write_helm_config(twin, "new", tmp_path, replace=True)  # there is none to replace
    assert len(yaml.safe_load(file.read_text())["model_deployments"]) == 4


def test_a_chat_template_takes_room_in_the_window(twin: Path, tmp_path: Path) -> None:
    shutil.copytree(twin, tmp_path / "chat")
    settings = tmp_path / "chat" / "model" / "tokenizer_config.json"
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    manifest = json.loads((tmp_path / "chat" / "twin.json").read_text())
    manifest["files"]["model/tokenizer_config.json"] = digest_file(settings)
    del manifest["sha256"]
    (tmp_path / "chat" / "twin.json").write_text(json.dumps({**manifest, "format_version": 1}))
    for chat in (False, True):
        write_helm_config(tmp_path / "chat", "c", tmp_path / "there", apply_chat_template=chat, replace=True)
        (entry,) = yaml.safe_load((tmp_path / "there" / "model_deployments.yaml").read_text())["model_deployments"]
        tokenizer = tiny_causal_tokenizer()
        around = len(tokenizer("<user> 1. ")["input_ids"]) - len(tokenizer("1.")["input_ids"]) if chat else 0
        assert entry["max_sequence_and_generated_tokens_length"] == 64 - around


def test_the_files_are_written_without_helm() -> None:
    assert not loaded_by("import twin_bench_helm.command, twin_bench_helm.compat") & HEAVY
    assert "helm" not in loaded_by("import twin_bench_helm.config")


def test_what_the_command_line_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        (["--nam", "x"], "unknown option '--nam'; did you mean '--name'?"),
        ([], "required: --name"),
        (["--name", "x", "--protocol", "papr"], "invalid choice: 'papr'"),
    ):
        assert main(["helm-config", str(tmp_path), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    done = python("-m", "twin_bench", "helm-config", "--help")
    assert done.stdout.startswith("usage: twin-bench helm-config [-h]"), done.stderr


def helm(command: str, *arguments: str, directory: Path) -> None:
    start = [
        sys.executable,
        "-m",
        {"helm-run": "helm.benchmark.run", "helm-summarize": "helm.benchmark.presentation.summarize"}[command],
    ]
    keep = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ADAPTERS)))}
    done = subprocess.run(
        [*start, *arguments], cwd=directory, env=os.environ | keep, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stderr + done.stdout)[-3000:]


@pytest.mark.parametrize(("name", "caps"), [("paper", {399, 99}), ("small", set())])
def test_run_entries_are_the_papers_four(name: str, caps: set[int]) -> None:
    entries = read_run_entries([str(ROOT / "tasks" / "helm" / f"{name}.conf")]).entries
    specs = [parse_object_spec(entry.description) for entry in entries]
    assert len({spec.args["subject"] for spec in specs if spec.class_name == "mmlu"}) == 57
    assert [spec.class_name for spec in specs[57:]] == ["truthful_qa", "bbq", "twin_cnndm"]
    assert {spec.args.get("max_eval_instances") for spec in specs} - {None} == caps
    assert cnndm().name == "twin_cnndm:temperature=0.3"


@pytest.mark.slow
def test_helm_run_fills_helms_tables(causal_families: Any, tmp_path: Path) -> None:
    """Threads, one thread and the batch runner give the same statistics; the table shows them under the name."""
    family = causal_families("llama")
    for name in ("base", *family.experts):
        folder = tmp_path / "family" / name
        folder.mkdir(parents=True)
        for file in (family.root / name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 4096}))
    recipe = {**family.recipe, "base_model": str(tmp_path / "family" / "base")}
    recipe["experts"] = {name: str(tmp_path / "family" / name) for name in family.experts}
    build_twin(Recipe.model_validate(recipe), tmp_path / "twin")
    draw = random.Random(0)
    for split, count in (("dev", 5), ("val", 3), ("test", 6)):
        file = tmp_path / f"benchmark_output/scenarios/mmlu/data/{split}/anatomy_{split}.csv"
        file.parent.mkdir(parents=True)
        rows = [[" ".join(draw.choices(WORDS, k=4)) for _ in range(5)] + [draw.choice("ABCD")] for _ in range(count)]
        file.write_text("".join(",".join(row) + "\n" for row in rows))
    assert (
        main(["helm-config", str(tmp_path / "twin"), "--name", "tiny", "--local-path", str(tmp_path / "prod_env")]) == 0
    )
    entry = ("--run-entries", "mmlu:subject=anatomy,model=twin_merged/tiny", "-m", "6")
    ways = {
        "threads": ["-n", "8", "--disable-cache"],
        "one": ["-n", "1"],
        "whole": ["--disable-cache", "--runner-class-name", "twin_bench_helm.client.BatchRunner"],
    }
    found = {}
    for suite, options in ways.items():
        helm("helm-run", *entry, "--suite", suite, *options, directory=tmp_path)
        (run,) = (tmp_path / "benchmark_output" / "runs" / suite).glob("mmlu*")
        states = json.loads((run / "scenario_state.json").read_text())["request_states"]
        stats = json.loads((run / "stats.json").read_text())
        scores = {
            json.dumps(stat["name"], sort_keys=True): stat.get("mean")
            for stat in stats
            if "match" in stat["name"]["name"] or stat["name"]["name"] == "logprob"
        }
        found[suite] = scores, [state["result"]["completions"][0]["text"] for state in states]
    assert found["one"][1] == found["threads"][1] == found["whole"][1]
    for name, value in found["one"][0].items():
        for suite in ("threads", "whole"):
            assert found[suite][0][name] == pytest.approx(value, abs=1e-5)
    schema = ("--schema-path", str(ROOT / "tasks" / "helm" / "schema_twin.yaml"))
    helm("helm-summarize", "--suite", "one", *schema, directory=tmp_path)
    tables = json.loads((tmp_path / "benchmark_output/runs/one/groups/mmlu.json").read_text())
    table = next(table for table in tables if "anatomy" in table["title"])
    score = next(v for k, v in found["one"][0].items() if '"exact_match"' in k and '"test"' in k and "perturb" not in k)
    assert [cell["value"] for cell in table["rows"][0][:2]] == ["tiny", pytest.approx(score)]


def test_several_devices_are_written_down(twin: Path, tmp_path: Path) -> None:
    command = ["helm-config", str(twin), "--name", "tiny", "--local-path", str(tmp_path), "--device-map", "auto"]
    assert main([*command, "--offload-folder", "f", "--max-memory", "0=20GiB", "cpu=9000"]) == 0
    (entry,) = yaml.safe_load((tmp_path / "model_deployments.yaml").read_text())["model_deployments"]
    given = {"device_map": "auto", "max_memory": {0: "20GiB", "cpu": 9000}, "offload_folder": "f"}
    assert given.items() <= entry["client_spec"]["args"].items()
    assert "device" not in entry["client_spec"]["args"]
    assert main([*command, "--max-memory", "20GiB"]) == 2
    assert main([*command, "--max-memory", "20GiB", "cpu=9000"]) == 2


def test_the_memory_of_one_device_is_written_down(twin: Path, tmp_path: Path) -> None:
    command = ["helm-config", str(twin), "--name", "tiny", "--local-path", str(tmp_path)]
    assert main([*command, "--max-memory", "20GB"]) == 0
    (entry,) = yaml.safe_load((tmp_path / "model_deployments.yaml").read_text())["model_deployments"]
    assert entry["client_spec"]["args"]["max_memory"] == "20GB"
    assert main([*command, "--replace", "--max-memory", "much"]) == 2


def test_a_helm_without_plugins_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.9")
    with pytest.raises(InputError, match=r"crfm-helm 0\.5\.9 takes no plugins.*crfm-helm>=0\.5\.16"):
        write_helm_config(tmp_path / "twin", "mine", tmp_path / "prod_env")
    assert not (tmp_path / "prod_env").exists()


def test_a_missing_raw_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("the network is off")

    monkeypatch.setattr("helm.benchmark.scenarios.summarization_scenario.ensure_file_downloaded", no_network)
    with pytest.raises(InputError, match=r"data/cnndm\.pk: no such file.*the network is off.*raw file there"):
        create_scenario(cnndm().scenario_spec).get_instances(str(tmp_path))
