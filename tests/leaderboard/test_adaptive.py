"""Methods that learn or route at test time, through the leaderboard on a tiny family."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.contenders import served
from tests.support.dense import interpolated_logits
from tests.support.families import Family
from tests.support.models import WORDS
from tests.support.rows import TASKS, task_rows
from tests.support.suites import rows_of, run
from twin_bench.adaptive import learning
from twin_bench.contenders import Contender
from twin_bench.errors import UnsuitedError
from twin_bench.leaderboard.inputs import cell_key, input_digests
from twin_bench.leaderboard.suite import Suite
from twin_bench.twin.classifier import TwinClassifier

ADAMERGING = {"adamerging": {"steps": 3, "learning_rate": 0.05}}
ADARANK = {"adarank": {"steps": 3, "learning_rate": 0.05}}

SCORED = ("cola", "stsb")
WEMOE = {"wemoe": {"steps": 3, "learning_rate": 0.05}}


@pytest.fixture(scope="module")
def suite(tiny: dict[str, Any]) -> dict[str, Any]:
    return {
        **tiny,
        "protocol": ["standard", "routed"],
        "methods": [ADAMERGING, ADARANK, "dawin", {"smile": {"rank": 4, "gate_rank": 2}}, WEMOE],
    }


def backbone(made: Contender) -> dict[str, torch.Tensor]:
    return {name: p for name, p in made.twin.model.named_parameters() if name.startswith("bert.")}


def with_rows(data: Path, folder: Path, change: Any) -> str:
    """Write the scored rows of `data` to `folder`, each as `change(task, row)` returns it."""
    for task in TASKS:
        (folder / task).mkdir(parents=True)
        rows = [json.loads(line) for line in (data / task / "validation.jsonl").read_text().splitlines()]
        lines = [json.dumps(change(task, row)) + "\n" for row in rows]
        (folder / task / "validation.jsonl").write_text("".join(lines))
    return str(folder)


@pytest.fixture(scope="module")
def board(suite: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("board")
    assert run({**suite, "tasks": list(SCORED)}, folder, "--limit", "20") == 0
    return rows_of(folder), (folder / "out" / "leaderboard.md").read_text()


def test_rows_say_that_test_inputs_were_seen(board: Any) -> None:
    rows, table = board
    for method, task in itertools.product(("adamerging", "adarank", "wemoe"), SCORED):
        row = rows["standard", method, task]
        assert row["track"] == "test-time"
        assert row["notes"]["adapted_on"] == {"inputs": "unlabelled test inputs", "rows": {"cola": 20}}
        assert row["n"] == 20
    for task in SCORED:
        assert rows["standard", "dawin", task]["track"] == "per-input"
        assert "adapted_on" not in rows["standard", "dawin", task]["notes"]
    assert {method for protocol, method, _ in rows if protocol == "routed"} == {"pretrained", "experts", "constant"}
    line = "learned on unlabelled test inputs, the same rows that it is scored on: cola 20"
    assert f"adamerging (standard): {line}" in table


def test_before_its_first_step_adamerging_is_task_arithmetic(suite: dict[str, Any], tmp_path: Path) -> None:
    methods = [{"task_arithmetic": {"scaling": 0.3}}, {"adamerging": {"steps": 0}}]
    static, start = (
        backbone(served({**suite, "methods": methods}, n, tmp_path)) for n in map(next, map(iter, methods))
    )
    learnt = backbone(served(suite, "adamerging", tmp_path))
    for name, parameter in start.items():
        torch.testing.assert_close(parameter, static[name], rtol=1e-5, atol=1e-6)
    assert any((learnt[name] - parameter).abs().max() > 1e-3 for name, parameter in start.items())


def test_labels_of_the_scored_rows_do_not_reach_what_is_learnt(
    suite: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    relabelled = with_rows(data, tmp_path / "relabelled", lambda task, row: {**row, "label": 0})
    first = backbone(served(suite, "adamerging", tmp_path / "first"))
    second = backbone(served({**suite, "data": relabelled}, "adamerging", tmp_path / "second"))
    assert all(torch.equal(second[name], parameter) for name, parameter in first.items())


def test_rows_that_are_not_scored_are_not_seen(suite: dict[str, Any], data: Path, tmp_path: Path) -> None:
    def edited(task: str, row: dict[str, Any]) -> dict[str, Any]:
        beyond = row["idx"] >= 10
        return {key: "dog" if beyond and isinstance(value, str) else value for key, value in row.items()}

    other = {**suite, "data": with_rows(data, tmp_path / "edited", edited)}
    limited = backbone(served(suite, "adamerging", tmp_path / "first", rows=10))
    again = backbone(served(other, "adamerging", tmp_path / "second", rows=10))
    assert all(torch.equal(again[name], parameter) for name, parameter in limited.items())
    whole = backbone(served(other, "adamerging", tmp_path / "second"))
    assert any(not torch.equal(whole[name], parameter) for name, parameter in limited.items())


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with each of Adam's steps, of which the run is killed in the sixth."""
    taken: list[int] = []
    step = torch.optim.Adam.step

    def counted(adam: torch.optim.Adam) -> None:
        taken.append(1)
        if len(taken) == 6:
            raise KeyboardInterrupt
        time.sleep(0.1)
        step(adam)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    monkeypatch.setattr(learning, "STEPS_KEPT", 3)
    return taken


@pytest.mark.parametrize("method", ["adamerging", "adarank", "wemoe"])
def test_learning_that_is_killed_goes_on_where_it_was_kept(
    suite: dict[str, Any], method: str, tmp_path: Path, steps_taken: list[int]
) -> None:
    longer = {**suite, "methods": [{method: {"steps": 7, "learning_rate": 0.05, "batch_size": 4}}]}
    with pytest.raises(KeyboardInterrupt):
        served(longer, method, tmp_path / "killed")
    resumed = served(longer, method, tmp_path / "killed")
    assert len(steps_taken) == 6 + 4  # three were kept
    unbroken = served(longer, method, tmp_path / "unbroken")
    assert len(steps_taken) == 10 + 7
    again = served(longer, method, tmp_path / "killed")
    assert len(steps_taken) == 17  # all were kept
    assert again.build_seconds > 0.7  # what learning took counts
    expected = unbroken.twin.state_dict()
    for made in (resumed, again):
        assert made.twin.state_dict().keys() == expected.keys()
        assert all(torch.equal(made.twin.state_dict()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", ["adamerging", "wemoe"])
def test_what_decides_what_is_learnt_decides_whether_it_is_learnt_again(
    suite: dict[str, Any], method: str, tmp_path: Path
) -> None:
    def edited(task: str, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, **({"premise": "a dog"} if task == "mnli" and row["idx"] == 0 else {})}

    def files(changes: dict[str, Any], rows: int | None = None) -> int:
        served({**suite, **changes}, method, tmp_path / "kept", rows=rows)
        return len(list((tmp_path / "kept").iterdir()))

    first = {method: {"steps": 1, "learning_rate": 0.05}}
    assert files({"methods": [first]}) == files({"methods": [first]}) == 1
    assert files({"methods": [first], "dtype": "bfloat16", "batch_size": 3}) == 1  # learnt in float32 all the same
    longer, slower = ({method: {**first[method], **option}} for option in ({"steps": 2}, {"learning_rate": 0.04}))
    assert files({"methods": [longer]}) == 2
    assert files({"methods": [slower]}) == 3
    assert files({"methods": [first], "seed": 1}) == 4
    assert files({"methods": [first], "max_length": 5}) == 5
    assert files({"methods": [first], "data": with_rows(Path(suite["data"]), tmp_path / "edited", edited)}) == 6
    assert files({"methods": [first]}, rows=20) == 7
    assert files({"methods": [first], "tasks": ["stsb", "cola", "mnli"]}) == 8  # the same inputs, experts reordered


def test_every_tasks_rows_decide_whether_a_cell_is_run_again(suite: dict[str, Any], data: Path, tmp_path: Path) -> None:
    def edited(task: str, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, **({"sentence": row["sentence"] + " dog"} if task == "cola" else {})}

    other = {**suite, "data": with_rows(data, tmp_path / "edited", edited)}
    keys = []
    for checked in map(Suite.model_validate, (suite, other)):
        tasks = task_rows(Path(str(checked.data)), *checked.tasks)
        inputs = input_digests(checked, {rows.task.name: rows for rows in tasks})
        inputs["rows"] = {name: rows for name, rows in inputs["rows"].items() if name.endswith("validation")}
        keys.append(
            {
                e.label: cell_key(checked, e, "standard", "mnli", inputs, rows=None, where={"harness": "lm-eval"})
                for e in checked.entries()
            }
        )
    assert {label for label, key in keys[0].items() if keys[1][label] != key} == {"adamerging", "adarank", "wemoe"}


def test_language_models_are_refused_with_the_reason(causal_families: Any, tmp_path: Path) -> None:
    family = causal_families("llama")
    recipe = {key: family.recipe[key] for key in ("base_model", "experts")}
    suite = {**recipe, "name": "lm", "data": str(tmp_path), "tasks": list(family.experts)}
    for method in ("adamerging", "adarank", "dawin", "wemoe"):
        with pytest.raises(UnsuitedError, match=f"{method} needs a classifier's entropy; the suite has"):
            served({**suite, "methods": [method]}, method, tmp_path)


def test_a_dawin_of_a_suite_is_the_sample_wise_interpolation(
    family: Family, suite: dict[str, Any], tmp_path: Path
) -> None:
    made = served(suite, "dawin", tmp_path)
    assert isinstance(made.twin, TwinClassifier)
    texts = [(text, None) for text in ("the cat sat", "who ran", "a small red bird or a big blue dog")]
    for task in TASKS:
        for answer, text in zip(made.twin.classify(texts, [task] * 3), texts, strict=True):
            inputs = made.twin.collate(made.twin.encode([text]))
            expected = interpolated_logits(family.base, family.experts, task, inputs)
            torch.testing.assert_close(answer.logits.double(), expected, rtol=1e-4, atol=1e-5)
    backbone_size = sum(p.numel() for name, p in family.base.base_model.named_parameters())
    assert made.parameters == 4 * backbone_size  # every tensor of the three experts differs


@pytest.mark.parametrize("method", ["adamerging", "dawin", "smile", "wemoe"])
def test_a_rows_logits_do_not_depend_on_its_neighbours(suite: dict[str, Any], method: str, tmp_path: Path) -> None:
    """Neighbours of every length, padded to the longest, and of every task."""
    twin = served(suite, method, tmp_path).twin
    assert isinstance(twin, TwinClassifier)
    texts = [(" ".join(WORDS[row : 3 * row + 2]), None) for row in range(8)]
    tasks = [TASKS[row % 3] for row in range(8)]
    together = twin.classify(texts, tasks, batch_size=8)
    spread = torch.stack([answer.logits[0] for answer in together]).std()
    for text, task, answer in zip(texts, tasks, together, strict=True):
        (alone,) = twin.classify([text], [task])
        torch.testing.assert_close(alone.logits, answer.logits, rtol=1e-5, atol=1e-6)
    assert spread > 1e-2


def test_smile_serves_language_models(causal_families: Any, tmp_path: Path) -> None:
    family: Family = causal_families("llama")
    recipe = {key: family.recipe[key] for key in ("base_model", "experts")}
    suite = {**recipe, "name": "lm", "data": str(tmp_path), "tasks": list(family.experts), "methods": ["smile"]}
    made = served(suite, "smile", tmp_path)
    ids = torch.tensor([[9, 10, 11, 12, 13, 14]])
    logits = made.twin(ids).logits
    assert made.parameters > sum(p.numel() for p in family.base.parameters())
    for model in (family.base, *family.experts.values()):
        with torch.no_grad():
            assert (model(ids).logits - logits).abs().max() > 1e-2
    generated = made.twin.generate(ids, max_new_tokens=3, do_sample=False)
    step = made.twin(generated[:, :-1]).logits.argmax(dim=-1)
    assert torch.equal(step[:, ids.shape[1] - 1 :], generated[:, ids.shape[1] :])


@pytest.mark.parametrize("method", ["adamerging", "dawin", "smile", "wemoe"])
def test_half_precision_is_near_single(suite: dict[str, Any], method: str, tmp_path: Path) -> None:
    texts = [(" ".join(WORDS[row : 2 * row + 2]), None) for row in range(6)]
    logits = []
    for dtype in ("bfloat16", "float32"):
        twin = served({**suite, "dtype": dtype}, method, tmp_path).twin
        assert twin.model.dtype is getattr(torch, dtype)
        assert isinstance(twin, TwinClassifier)
        logits.append(torch.stack([answer.logits for answer in twin.classify(texts, ["mnli"] * 6)]))
    torch.testing.assert_close(*logits, rtol=0.1, atol=0.1)
