"""Files that are right but for a few things: each is read, or refused in one line that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.support.mutations import cases, ends_well, mutated, scribbled
from twin_bench import cli
from twin_bench.checkpoints.adapter import open_expert
from twin_bench.checkpoints.checkpoint import open_checkpoint
from twin_bench.checkpoints.skeleton import read_config, skeleton_of
from twin_bench.data.registry import TASKS
from twin_bench.data.rows import read_router_rows, read_rows
from twin_bench.leaderboard.suite import read_suite
from twin_bench.merging.export import read_merge_recipe
from twin_bench.twin.directory import load_parts
from twin_bench.twin.recipe import read_recipe

RECIPE = {
    "base_model": "base",
    "experts": {"cola": "one", "mnli": "two"},
    "shared": {"method": "dare_ties", "scaling": 0.3, "density": 0.2, "seed": 1},
    "exclusive": {"density": 0.1},
    "router": {"data": "rows.jsonl", "layer": "auto", "top_k": 1, "temperature": 2, "held_out": 0.1, "paper": False},
    "seed": 3,
    "max_length": 64,
    "dtype": "bfloat16",
}
MERGE = {
    "base_model": "base",
    "experts": {"a": "one", "b": "two"},
    "merge": {"method": "lines", "merge": "ties", "alpha": 0.2, "scaling": 0.5},
    "head": "a",
    "as_adapter": False,
    "seed": 1,
}
MERGEKIT = [
    {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "one", "parameters": {"weight": 0.5, "density": 0.3}}, {"model": "two"}],
        "parameters": {"weight": 0.5, "density": 0.3, "normalize": True, "lambda": 1.0},
        "dtype": "float32",
    },
    {"merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 0.5}},
    {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}], "out_dtype": "float16"},
]
SUITE = {
    "name": "mine",
    "base_model": "base",
    "experts": {"cola": "one", "mnli": "two"},
    "data": "rows",
    "tasks": ["cola", "mnli"],
    "methods": [
        "average",
        {"mine": {"method": "twin", "exclusive": {"rank": 4}, "router": {"layer": 1}, "protocol": ["paper"]}},
        {"sparse": {"method": "dare_ties", "density": 0.1, "seed": 2}},
        {"wemoe": {"steps": 10, "batch_size": 4}},
        {"lines": {"merge": "ties", "density": 0.5}},
    ],
    "protocol": ["standard", "paper"],
    "seed": 1,
    "rows": 10,
    "batch_size": 8,
}
OWN_TASKS = {
    **SUITE,
    "experts": {"tox": "one", "sim": "two", "more": "three"},
    "tasks": {
        "toxicity": {"expert": "tox", "text": "comment", "label": "is_toxic", "labels": ["no", "yes"], "metric": "f1"},
        "similarity": {"expert": "sim", "text": "a", "text_pair": "b", "split": "test", "cluster": "page"},
        "cola": {"expert": "more", "data": {"hub": "glue", "config": "cola", "split": "validation"}},
    },
    "router": {"data": "rows.jsonl", "layer": "auto", "epochs": 3},
}
ROWS: dict[str, dict[str, Any]] = {
    "cola": {"sentence": "the cat", "label": 1},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 2.5},
    "mmlu": {"question": "why", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "law_of_cats"},
    "truthfulqa": {"question": "why", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}},
    "bbq": {"context": "x", "question": "why", "ans0": "a", "ans1": "b", "ans2": "c", "label": 1},
    "cnn_dailymail": {"article": "the cat sat", "highlights": "a cat"},
}


def written(file: Path, text: str) -> Path:
    """Write a text; half a surrogate pair is written as it is, and is then no UTF-8."""
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    return file


def as_yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "some.yaml"


@cases(300)
@given(data=mutated(RECIPE))
def test_recipes(file: Path, data: Any) -> None:
    ends_well(lambda: read_recipe(written(file, as_yaml(data))))


@cases(200)
@given(data=mutated([MERGE, *MERGEKIT]))
def test_merge_recipes(file: Path, data: Any) -> None:
    ends_well(lambda: read_merge_recipe(written(file, as_yaml(data))))


@cases(200)
@given(data=st.sampled_from([SUITE, OWN_TASKS]).flatmap(mutated))
def test_suites(file: Path, data: Any) -> None:
    ends_well(lambda: read_suite(str(written(file, as_yaml(data)))).expert_paths)


@cases(200)
@given(text=st.sampled_from([RECIPE, MERGE, SUITE]).flatmap(lambda data: scribbled(as_yaml(data))))
def test_scribbled_yaml(file: Path, text: str) -> None:
    written(file, text)
    ends_well(lambda: read_recipe(file))
    ends_well(lambda: read_merge_recipe(file))
    ends_well(lambda: read_suite(str(file)))


@cases(450)
@given(data=st.data(), task=st.sampled_from(sorted(ROWS)))
def test_rows(file: Path, data: Any, task: str) -> None:
    row = ROWS[task]
    bad = data.draw(mutated({"row": row})) if data.draw(st.booleans()) else scribbled(json.dumps({"row": row}))
    line = json.dumps(bad.get("row"), default=str) if isinstance(bad, dict) else data.draw(bad)
    written(file, f"{json.dumps(row)}\n{line}\n")

    def read() -> None:
        rows = read_rows(file, TASKS[task])
        TASKS[task].inputs(rows, rows)

    ends_well(read)


@cases(150)
@given(row=mutated({"text": "the cat", "text_pair": "sat", "task": "law"}))
def test_router_rows(file: Path, row: Any) -> None:
    good = {"text": "x", "task": "law"}
    written(file, f"{json.dumps(good)}\n{json.dumps(row, default=str)}\n")
    ends_well(lambda: read_router_rows(file, ["law"]))


ARGUMENTS = [
    "-v",
    "-q",
    "--help",
    "build",
    "merge",
    "methods",
    "tasks",
    "convert",
    "--suite",
    "no-such",
    "--limit",
    "-1",
]


@cases(100)
@given(words=st.lists(st.sampled_from([*ARGUMENTS, "\x1b[31m", "", "--", "--=", "\udc80", "9" * 99]), max_size=4))
def test_command_lines(words: list[str]) -> None:
    """No word names a file that is there, so nothing can be done but to say so."""
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *said, **options: printed.append(" ".join(map(str, said))))
        patch.setattr("argparse.ArgumentParser._print_message", lambda *said: None)
        try:
            status = cli.main(words)
        except SystemExit as end:
            status = int(end.code or 0)
    assert status in (0, 2)
    if status == 2:
        (line,) = printed
        assert line.isprintable()


@pytest.fixture(scope="module")
def twin(causal_twins: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz") / "twin"
    shutil.copytree(causal_twins("llama"), directory)
    return directory


@cases(100)
@given(data=st.data())
def test_a_twins_own_file(twin: Path, data: Any) -> None:
    kept = (twin / "twin.json").read_text()
    try:
        first = {key: value for key, value in json.loads(kept).items() if key != "sha256"} | {"format_version": 1}
        manifest = data.draw(mutated({"manifest": data.draw(st.sampled_from([first, json.loads(kept)]))})).get(
            "manifest"
        )
        written(twin / "twin.json", json.dumps(manifest, default=str))
        ends_well(lambda: load_parts(twin))
    finally:
        (twin / "twin.json").write_text(kept)


@cases(100)
@given(data=st.data())
def test_an_adapters_config(twin: Path, data: Any) -> None:
    folder = twin / "experts" / "mmlu"
    file = folder / "adapter_config.json"
    kept = file.read_text()
    skeleton = skeleton_of(read_config(twin / "model"), "causal_lm")
    base = open_checkpoint(twin / "model", skeleton)
    try:
        config = data.draw(mutated({"config": json.loads(kept)})).get("config")
        written(file, json.dumps(config, default=str))
        ends_well(lambda: dict(open_expert(folder, base, skeleton)))
    finally:
        file.write_text(kept)
