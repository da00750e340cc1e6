"""The leaderboard through HELM: its figures against HELM's own files, and both harnesses on the same prompts."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.metrics.evaluate_instances_metric import EvaluateInstancesMetric
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.statistic import Stat
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.run_specs.classic_run_specs import get_synthetic_reasoning_spec
from lm_eval.api.instance import Instance

from tests.support.families import Family
from tests.support.models import WORDS
from tests.support.rows import task_rows, write_generative_rows
from tests.support.scored import assert_weights, found
from tests.support.suites import rows_of, run
from twin_bench.data.metrics import mean
from twin_bench_helm.harness import Helm, copy_scenarios
from twin_bench_lm_eval.causal import CausalTwin

TASKS = ("mmlu", "bbq", "cnn_dailymail")


class Together(EvaluateInstancesMetric):  # type: ignore[misc]
    """A metric of all rows at once, as a corpus's BLEU is: it has no value of a row."""

    def evaluate_instances(self, request_states: list[RequestState], eval_cache_path: str) -> list[Stat]:
        return [Stat(MetricName("bleu")).add(40.0 + len(request_states))]


@run_spec_function("together")  # type: ignore[untyped-decorator]
def together() -> RunSpec:
    return dataclasses.replace(
        get_synthetic_reasoning_spec(mode="pattern_match"),
        name="together:",
        metric_specs=[MetricSpec(class_name=f"{__name__}.Together")],
    )


def raw_files(root: Path) -> Path:
    """Write HELM's raw files of two MMLU subjects and one of BBQ's categories."""
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=4))

    for split, count in (("dev", 5), ("val", 2), ("test", 4)):
        for subject in ("anatomy", "astronomy"):
            file = root / "mmlu" / "data" / split / f"{subject}_{split}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [",".join([*(text() for _ in range(5)), draw.choice("ABC")]) for _ in range(count)]
            file.write_text("\n".join(rows) + "\n")
    lines = []
    for index in range(40):
        answers = {f"ans{i}": text() for i in range(3)}
        info = {"ans0": ["old man", "old"], "ans1": ["young man", "nonOld"], "ans2": ["unknown", "unknown"]}
        lines.append(
            {
                **{"example_id": index, "question_index": "1", "question_polarity": ("neg", "nonneg")[index % 2]},
                **{"context_condition": ("ambig", "disambig")[index // 2 % 2], "category": "Age"},
                **{"answer_info": info, "additional_metadata": {"stereotyped_groups": ["old"]}},
                **{"context": text(), "question": text(), "label": draw.randrange(3), **answers},
            }
        )
    (root / "bbq" / "data").mkdir(parents=True)
    (root / "bbq" / "data" / "Age").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def suite(wide_llama: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("helm-suite")
    return {
        "name": "tiny-helm",
        "base_model": wide_llama.recipe["base_model"],
        "experts": wide_llama.recipe["experts"],
        "data": str(write_generative_rows(root / "data")),
        "helm": str(raw_files(root / "helm")),
        "tasks": list(TASKS),
        "rows": 6,
        "batch_size": 3,
        "methods": [
            {"twin": {"router": {"epochs": 3}}},
            {"told": {"method": "twin", "exclusive": {"density": 1.0}, "router": {"epochs": 3}, "weights": "task"}},
        ],
    }


@pytest.mark.slow
def test_figures_are_helms_own_and_lm_eval_answers_the_same_prompts_alike(
    suite: dict[str, Any], tmp_path: Path
) -> None:
    assert run(suite, tmp_path, "--harness", "helm") == 0
    cells = {(method, task): row for (_, method, task), row in rows_of(tmp_path).items()}
    methods = ("pretrained", "experts", "constant", "twin", "told")
    assert cells.keys() == {(method, task) for method in methods for task in TASKS}
    runs = tmp_path / "out" / "helm" / "benchmark_output" / "runs" / "leaderboard"
    metrics = {"mmlu": ("exact_match", "test"), "bbq": ("exact_match", "test"), "twin_cnndm": ("rouge_2", "test")}
    built = [path for path in (tmp_path / "out" / "twins").glob("*/*") if path.is_dir()]
    (directory,) = (path for path in built if json.loads((path / "twin.json").read_text())["exclusive"]["density"] < 1)
    lm = CausalTwin(str(directory), device="cpu", batch_size=2)
    asked = 0
    for name, (metric, split) in metrics.items():
        total = count = 0.0
        for folder in runs.glob(f"{name}:*model=twin_merged_standard-twin*"):
            for stat in json.loads((folder / "stats.json").read_text()):
                if stat["name"] == {"name": metric, "split": split}:
                    per_row = json.loads((folder / "per_instance_stats.json").read_text())
                    n = len({row["instance_id"] for row in per_row if not row.get("perturbation")})
                    total, count = total + n * stat["mean"], count + n
            states = json.loads((folder / "scenario_state.json").read_text())["request_states"]
            if name != "twin_cnndm":  # which HELM samples
                prompts = [state["request"]["prompt"] for state in states]
                options = {"until": ["\n"], "max_gen_toks": 1, "do_sample": False}
                texts = lm.generate_until(
                    [Instance("generate_until", {}, (prompt, options), i) for i, prompt in enumerate(prompts)]
                )
                assert texts == [state["result"]["completions"][0]["text"] for state in states]
                asked += len(texts)
        task = {"twin_cnndm": "cnn_dailymail"}.get(name, name)
        assert cells["twin", task]["n"] == count == 6
        assert cells["twin", task]["score"] == pytest.approx(100 * total / count)
        assert cells["twin", task]["notes"]["harness"].startswith("crfm-helm")
    assert asked == 12
    for task in ("mmlu", "bbq"):  # at full rank the twin that is told the task is the expert
        assert cells["told", task]["score"] == cells["experts", task]["score"]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells-helm").rglob("*.json")}
    assert run(suite, tmp_path, "--harness", "helm") == 0
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells-helm").rglob("*.json")}


def test_raw_files_are_copied_again_where_they_or_their_copies_have_changed(tmp_path: Path) -> None:
    """HELM scores the copies, and a cell's key holds the sources' digest: they may never part."""
    raw, data, into = raw_files(tmp_path / "raw"), write_generative_rows(tmp_path / "data"), tmp_path / "scenarios"
    (summaries,) = task_rows(data, "cnn_dailymail")
    first = copy_scenarios(raw, summaries, into)
    age, pickled = into / "bbq" / "data" / "Age", into / "summarization" / "data" / "cnndm.pk"
    whole, articles = age.read_bytes(), pickled.read_bytes()
    (into / "bbq" / "data" / "Age.lock").write_text("HELM's own")
    assert copy_scenarios(raw, summaries, into) == first
    assert (into / "bbq" / "data" / "Age.lock").is_file()
    age.write_bytes(whole.replace(b'"label": 0', b'"label": 1'))
    assert copy_scenarios(raw, summaries, into) == first
    assert age.read_bytes() == whole
    (raw / "bbq" / "data" / "Age").write_bytes(whole[: len(whole) // 2])
    assert copy_scenarios(raw, summaries, into) != first
    assert age.read_bytes() == whole[: len(whole) // 2]
    rows = data / "cnn_dailymail" / "validation.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    copy_scenarios(raw, summaries, into)
    assert pickled.read_bytes() != articles


def test_what_helm_lacks_is_named(
    suite: dict[str, Any], families: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = families("bert").recipe
    for changes, says in (
        (
            {"tasks": ["mmlu", "truthfulqa"], "experts": {**suite["experts"], "truthfulqa": suite["experts"]["bbq"]}},
            "TruthfulQA.csv: no such file",
        ),
        ({"helm": str(tmp_path / "nowhere")}, "name a directory of HELM's raw files"),
        ({"tasks": ["cola"], "base_model": bert["base_model"], "experts": bert["experts"]}, "these are classifiers"),
    ):
        assert run({**suite, **changes}, tmp_path, "--harness", "helm") == 2
        assert says in capsys.readouterr().err


def test_any_run_entry_is_a_task(suite: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of MMLU with one subject it is the built-in task; an entry that needs no raw file is nobody's here."""
    subject = tmp_path / "raw"
    for file in Path(suite["helm"]).rglob("anatomy*.csv"):
        copy = subject / file.relative_to(suite["helm"])
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    asked = {**suite, "helm": str(subject), "methods": ["average"], "rows": None}
    assert run({**asked, "tasks": ["mmlu"]}, tmp_path / "built-in", "--harness", "helm", "--limit", "4") == 0
    entries = {
        "anatomy": {"expert": "mmlu", "helm": "mmlu:subject=anatomy,eval_split=test", "metric": "exact_match"},
        "pattern": {"expert": None, "helm": "synthetic_reasoning:mode=pattern_match"},
        "together": {"expert": None, "helm": "together", "metric": "bleu"},
    }
    own = {**asked, "tasks": entries, "data": None, "experts": {"mmlu": suite["experts"]["mmlu"]}}
    own = {key: value for key, value in own.items() if value is not None}
    said = found(Helm, own, tmp_path / "own", "--harness", "helm", "--limit", "4")
    built_in, rows = rows_of(tmp_path / "built-in"), rows_of(tmp_path / "own")
    for method in ("pretrained", "experts"):
        for field in ("score", "stderr", "n"):
            known = built_in["standard", method, "mmlu"][field]
            assert rows["standard", method, "anatomy"][field] == known
    pattern = rows["standard", "average", "pattern"]
    assert (pattern["metric"], pattern["normalized"], pattern["expert"]) == ("exact_match", None, None)
    assert 0 < pattern["n"] < 4  # HELM draws four of its valid and test rows, and the test rows are scored
    assert ("standard", "experts", "pattern") not in rows
    corpus = rows["standard", "average", "together"]
    assert (corpus["score"], corpus["stderr"], corpus["n"]) == (40 + pattern["n"], None, pattern["n"])
    samples = said["average", "together"].samples
    assert samples.identities == said["average", "pattern"].samples.identities
    assert samples.pooled is None
    assert all(map(math.isnan, samples.scores))
    for changes, says in (
        ({"metric": "exactmatch"}, "HELM has no metric 'exactmatch'; did you mean 'exact_match'"),
        ({"few_shot": 2}, "few_shot: HELM's run entry says it"),
    ):
        changed = {**own, "tasks": {"anatomy": {**entries["anatomy"], **changes}}}
        assert run(changed, tmp_path / "wrong", "--harness", "helm", "--limit", "2") == 2
        assert says in capsys.readouterr().err
    assert run({**own, "tasks": {"anatomy": {"expert": "mmlu"}}}, tmp_path / "wrong", "--harness", "helm") == 2
    assert "task 'anatomy' is lm-eval's; for --harness helm give helm: a run entry" in capsys.readouterr().err


def test_the_samples_of_a_cell_give_its_score(suite: dict[str, Any], tmp_path: Path) -> None:
    experts = {task: suite["experts"][task] for task in TASKS[:2]}
    changed = {**suite, "tasks": [*experts], "experts": experts, "methods": suite["methods"][:1]}
    said = found(Helm, changed, tmp_path, "--harness", "helm")
    for (method, task), one in said.items():
        samples = one.samples
        assert one.evaluated.n == len(samples.identities) == len(set(samples.identities)) == one.row["n"]
        assert samples.pooled == "mean"
        rows = list(zip(samples.predictions, samples.targets, strict=True))
        assert [float(answer == right) for answer, right in rows] == list(samples.scores)
        assert set(samples.targets) <= set("ABCD")
        assert 100 * mean(samples.scores) == one.row["score"]
        assert 0 < (one.evaluated.model_seconds or 0) < one.row["seconds"]
        assert samples.identities == said["twin", task].samples.identities
        if method == "twin":
            assert_weights(one, [(text, None) for text in samples.texts or ()], None)
        else:
            assert samples.weights == {}
