"""The rows' answers that lm-eval's cells come with: they alone give the score, and the weights are the twin's."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.families import Family
from tests.support.rows import write_generative_rows
from tests.support.scored import assert_weights, found
from tests.support.task_files import CHOICE, TEXT, loaded, own_task
from twin_bench.data.metrics import find_metric, mean
from twin_bench.data.named import NamedTask
from twin_bench.results.samples import Samples, read_samples, write_samples
from twin_bench_lm_eval.harness import LmEval
from twin_bench_lm_eval.named import described, training_answers

METHODS = ["average", {"twin": {"router": {"epochs": 3}}}, {"told": {"method": "twin", "weights": "task"}}]
EVERY = ("pretrained", "experts", "average", "twin", "told")


@pytest.fixture(scope="module")
def classifiers(tiny: dict[str, Any], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what is said of classifiers: labels, a number, probabilities, and an error of which less is better."""
    folder = tmp_path_factory.mktemp("classifiers")
    shutil.copytree(data, folder / "data")
    shutil.copytree(data / "cola", folder / "data" / "sure")
    for file in (folder / "data" / "mnli").iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row | {"page": row["idx"] // 4}) + "\n" for row in rows))
    tasks = {
        "cola": {"metric": "mcc"},
        "mnli": {"cluster": "page"},
        "stsb": {},
        "sure": {"expert": "cola", "text": "sentence", "labels": ["no", "yes"], "metric": "auroc"},
    }
    suite = {**tiny, "data": str(folder / "data"), "tasks": tasks, "methods": METHODS}
    return suite, found(LmEval, suite, folder)


def test_the_score_of_a_classifier_is_the_metric_of_its_samples(classifiers: Any) -> None:
    _, said = classifiers
    assert said.keys() == {(method, task) for method in EVERY for task in ("cola", "mnli", "stsb", "sure")}
    for (_, task), one in said.items():
        samples, metric = one.samples, find_metric(one.row["metric"])
        assert samples.pooled == "metric"
        assert metric.score(samples.targets, samples.predictions) == one.row["score"]
        rows = one.asked.read("validation")
        assert samples.targets == pytest.approx([row["label"] for row in rows])
        if metric.name == "acc":
            assert 100 * mean(samples.scores) == pytest.approx(one.row["score"])
            assert list(samples.clusters or ()) == [row["page"] for row in rows]
        else:
            assert samples.clusters is None
        if task == "sure":
            right = [answer[target] for answer, target in zip(samples.predictions, samples.targets, strict=True)]
            assert list(samples.scores) == right
            assert all(sum(answer) == pytest.approx(1) for answer in samples.predictions)
        if task == "stsb":
            squared = find_metric("mse").score(samples.targets, samples.predictions)
            assert mean(samples.scores) == pytest.approx(squared)
        assert one.evaluated.n == len(samples.identities) == len(samples.texts or ()) == 30
        assert 0 < (one.evaluated.model_seconds or 0) < one.row["seconds"]


def test_identities_are_the_inputs_and_weights_are_the_twins(classifiers: Any) -> None:
    _, said = classifiers
    for task in ("cola", "mnli"):
        assert len({tuple(said[method, task].samples.identities) for method in EVERY}) == 1
    assert said["twin", "cola"].samples.identities == said["twin", "sure"].samples.identities
    for task, fields in (("cola", ["sentence"]), ("mnli", ["premise", "hypothesis"])):
        texts = [
            (row[fields[0]], row[fields[1]] if fields[1:] else None)
            for row in said["twin", task].asked.read("validation")
        ]
        for method in ("twin", "told"):
            assert_weights(said[method, task], texts, [task] * len(texts))
        assert said["told", task].samples.weights[task] == [1.0] * 30
        for method in ("pretrained", "experts", "average"):
            assert said[method, task].samples.weights == {}
    assert len({round(weight, 6) for weight in said["twin", "cola"].samples.weights["cola"]}) > 5


def test_the_order_of_the_rows_changes_no_row(classifiers: Any, tmp_path: Path) -> None:
    suite, said = classifiers
    shutil.copytree(suite["data"], tmp_path / "data")
    file = tmp_path / "data" / "mnli" / "validation.jsonl"
    file.write_text("".join(line + "\n" for line in reversed(file.read_text().splitlines())))
    changed = {**suite, "methods": [METHODS[1]], "data": str(tmp_path / "data")}
    other = found(LmEval, changed, tmp_path)["twin", "mnli"].samples

    def frame(samples: Samples) -> Any:
        return samples.frame().sort_values("identity", ignore_index=True)

    before = said["twin", "mnli"].samples
    assert list(other.identities) == list(before.identities)[::-1]
    columns = ["identity", "prediction", "target", "score", "cluster", "text"]
    assert frame(other)[columns].equals(frame(before)[columns])
    for name in before.weights:
        column = f"weight_{name}"
        assert frame(other)[column].tolist() == pytest.approx(frame(before)[column].tolist(), abs=1e-6)


@pytest.fixture(scope="module")
def texts(wide_llama: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what is said of language models: the project's tasks, and lm-eval's of each kind and a group of them."""
    folder = tmp_path_factory.mktemp("texts")
    prose = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "question",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    word = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}} :",
        "doc_to_target": " {{options[0]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc"}],
    }
    files = {"letters": TEXT, "prose": prose, "word": word, "choice": CHOICE, "lengths": CHOICE}
    for name, config in files.items():
        own_task(folder, name, {**config, "training_split": "train", "fewshot_split": "train"}, answers=3)
    for file in folder.glob("lengths-*.jsonl"):
        file.write_text(file.read_text().replace('"B"', '"the dog sits on the mat"'))
    for name, leaves in (("both", ["choice", "lengths"]), ("halves", ["choice", "small"])):
        if name == "halves":
            own_task(folder, "small", {**CHOICE, "test_split": "dev"}, answers=3)
        group = {"group": name, "task": leaves, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    experts = wide_llama.recipe["experts"]
    suite = {
        "name": "texts",
        "base_model": wide_llama.recipe["base_model"],
        "experts": {"mmlu": experts["mmlu"], "bbq": experts["bbq"]},
        "data": str(write_generative_rows(folder / "data")),
        "include_path": str(folder),
        "tasks": {
            "mmlu": {"cluster": "subject"},
            "bbq": {"few_shot": 0},
            "cnn_dailymail": {"expert": None},
            "choice": {"expert": "mmlu"},
            "lengths": {"expert": "mmlu", "metric": "acc_norm"},
            "letters": {"expert": "bbq", "metric": "exact_match,first"},
            "word": {"expert": "bbq", "metric": "perplexity"},
            "prose": {"expert": None},
            "both": {"expert": "mmlu"},
            "halves": {"expert": "mmlu"},
        },
        "batch_size": 3,
        "methods": METHODS[:2],
    }
    return suite, found(LmEval, suite, folder)


def test_the_score_of_a_text_is_the_mean_of_its_samples(texts: Any) -> None:
    suite, said = texts
    for method in ("average", "twin"):
        for task in suite["tasks"]:
            one = said[method, task]
            samples, unit = one.samples, 100 if one.asked.task.percent else 1
            assert one.evaluated.n == len(samples.identities) == len(set(samples.identities))
            assert samples.pooled == (None if task in ("word", "prose", "halves") else "mean")
            if samples.pooled:
                assert unit * mean(samples.scores) == one.row["score"]
            if task in ("mmlu", "bbq", "letters", "choice", "lengths", "both", "halves"):
                equal = [
                    float(answer == right) for answer, right in zip(samples.predictions, samples.targets, strict=True)
                ]
                assert equal == list(samples.scores)
            assert (samples.clusters is not None) == (task == "mmlu")
            assert one.evaluated.model_seconds
    prose, word = said["twin", "prose"].samples, said["twin", "word"].samples
    size = sum(len(text.encode()) for text in prose.texts or ())
    assert -sum(prose.predictions) / size / math.log(2) == pytest.approx(said["twin", "prose"].row["score"])
    assert all(math.isnan(score) for score in prose.scores)
    assert math.exp(-mean(word.predictions)) == pytest.approx(said["twin", "word"].row["score"])
    assert set(word.targets) == {"A"}
    assert set(said["twin", "choice"].samples.targets) == {0, 1, 2}
    assert set(said["twin", "mmlu"].samples.targets) <= set("ABCD")


def test_the_weights_of_texts_are_those_of_their_prompts(texts: Any, tmp_path: Path) -> None:
    suite, said = texts
    for task in set(suite["tasks"]) - {"prose"}:
        one = said["twin", task]
        assert_weights(one, [(text, None) for text in one.samples.texts or ()], None)
        assert said["average", task].samples.weights == {}
        write_samples(tmp_path / "samples.parquet", one.samples)
        assert read_samples(tmp_path / "samples.parquet").frame().equals(one.samples.frame())
    (same,) = {own for own in zip(*said["twin", "prose"].samples.weights.values(), strict=True)}
    assert sum(same) == pytest.approx(1, abs=1e-6)


def test_few_shot_examples_are_no_part_of_an_identity(texts: Any, tmp_path: Path) -> None:
    suite, said = texts
    tasks = {"mmlu": {"few_shot": 1}, "choice": {"expert": "mmlu", "few_shot": 2}}
    fewer = {"tasks": tasks, "experts": {"mmlu": suite["experts"]["mmlu"]}, "methods": [], "rows": 4}
    other = found(LmEval, {**suite, **fewer}, tmp_path)
    for task in tasks:
        before, after = said["experts", task].samples, other["experts", task].samples
        assert list(after.identities) == list(before.identities)[:4]
        assert (after.texts or [])[0] != (before.texts or [])[0]


@pytest.mark.parametrize(
    ("config", "answers", "settings", "expected"),
    [
        (CHOICE, 3, {}, [0, 1, 2] * 3),
        (CHOICE, 2, {"metric": "acc_norm"}, [*[0, 1] * 4, 0]),
        (CHOICE, 1, {}, None),  # the right option is always the second, which no model is told
        (CHOICE, 3, {"split": "train"}, None),
        ({**CHOICE, "metric_list": [{"metric": "brier_score"}]}, 3, {}, None),
        (TEXT, 3, {}, ["A", "B", "C"] * 3),
        ({**TEXT, "doc_to_target": "{{question}}"}, 3, {}, [f"train {row}" for row in range(9)]),
        ({**TEXT, "metric_list": [{"metric": "ter"}]}, 3, {}, None),
    ],
)
def test_the_answers_of_training_documents(
    tmp_path: Path, config: dict[str, Any], answers: int, settings: dict[str, str], expected: list[Any] | None
) -> None:
    splits = {"training_split": "train", "fewshot_split": "train"}
    own_task(tmp_path, "own", {**config, **splits}, answers)
    given = loaded(tmp_path, "own", **settings)
    assert training_answers(described(NamedTask("own", **settings), given), given) == expected
