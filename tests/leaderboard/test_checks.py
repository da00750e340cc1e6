"""Whatever can be known to be wrong is said before the first cell is scored."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import tiny_classifier
from tests.support.suites import rows_of, run
from twin_bench.errors import UnsuitedError
from twin_bench.merging.registry import REGISTRY, find_method
from twin_bench.report.files import FILES
from twin_bench.results.stored import FILE
from twin_bench_lm_eval.harness import LmEval


@pytest.fixture
def refused(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs a changed suite, which must fail before it scores, and returns the error's line."""
    monkeypatch.setattr(LmEval, "score", lambda *_: pytest.fail("a cell was scored"))

    def line(change: dict[str, Any], *arguments: str) -> str:
        assert run({**tiny, "methods": ["average"], **change}, tmp_path, *arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ")
        assert not any(file.is_file() for file in (tmp_path / "out").glob("leaderboard.*"))
        return lines[-1]

    return line


@pytest.mark.parametrize("split", ["validation", "train"])
def test_a_bad_row_of_the_third_task(refused: Any, data: Path, tmp_path: Path, split: str) -> None:
    copy = shutil.copytree(data, tmp_path / "rows")
    file = copy / "mnli" / f"{split}.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = json.dumps({**json.loads(lines[4]), "label": 3})
    file.write_text("\n".join(lines) + "\n")
    assert f"mnli/{split}.jsonl, line 5: label 3; mnli needs one of: 0 entailment" in refused({"data": str(copy)})


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"ties": {"density": 0}}, "ties: density must be in (0, 1], not 0"),
        ({"mine": {"method": "ties", "density": 1.5}}, "mine: ties: density must be in (0, 1], not 1.5"),
        ({"fisher": {"floor": -1}}, "fisher: floor must be above 0, not -1"),
        ({"adamerging": {"steps": -5}}, "adamerging: steps must be a whole number, 0 or more, not -5"),
        ({"wemoe": {"batch_size": 0}}, "wemoe: batch_size must be a whole number from 1, not 0"),
        ({"smile": {"top_k": 4}}, "smile: top_k must be a whole number from 1 to 3, the number of experts, not 4"),
        ({"twin": {"router": {"layer": 99}}}, "twin: router.layer 99: the base model has 2 blocks; -1 to 2, or auto"),
        (
            {"twin": {"router": {"data": "rows.jsonl"}}},
            "twin: router.data: all routers of a suite read the same rows; give router at",
        ),
        ({"twin": {"router": {"top_k": 4}}}, "twin: router.top_k 4: there are 3 experts"),
        ({"twin": {"shared": {"method": "ties", "density": 0}}}, "ties: density must be in (0, 1], not 0"),
    ],
)
def test_an_option_out_of_its_range(refused: Any, entry: dict[str, Any], says: str) -> None:
    assert says in refused({"methods": ["average", entry]})


def test_a_head_of_another_task(refused: Any, tiny: dict[str, Any], tmp_path: Path, family: Any) -> None:
    tiny_classifier("bert", num_labels=3, seed=9, like=family.base).save_pretrained(tmp_path / "three")
    for file in Path(tiny["experts"]["cola"]).glob("*token*"):
        shutil.copy(file, tmp_path / "three")
    said = refused({"experts": {**tiny["experts"], "cola": str(tmp_path / "three")}})
    assert "expert 'cola'" in said
    assert "its head has 3 labels, GLUE has 2" in said


@pytest.mark.parametrize("name", [FILE, *FILES])
def test_a_file_that_cannot_be_written(refused: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / name / "x").mkdir(parents=True)
    assert f"out/{name}: a folder stands where a file is to be written" in refused({})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": [{"ties": {"protocol": "paper"}}]}, "ties: protocol paper is not among the suite's (standard)"),
        ({"tasks": ["cola", "cola"]}, "'cola' is listed twice"),
        (
            {"tasks": {name: {"expert": "cola", "text": "sentence", "labels": ["a", "b"]} for name in ("Tox", "tox")}},
            "two tasks are named 'Tox' and 'tox', which differ in case alone; rename one",
        ),
        ({"protocol": ["standard", "standard"]}, "'standard' is listed twice"),
        ({"methods": ["ties", {"TIES": {"method": "average"}}]}, "'ties' and 'TIES', which differ in case alone"),
        ({"name": "[/x] \x1b[31m"}, "name '[/x] \\x1b[31m': expected a letter or digit"),
        ({"name": "=cmd|' /C calc'!A0"}, "expected a letter or digit"),
        ({"name": "x" * 101}, "expected a letter or digit"),
    ],
)
def test_a_suite_that_would_lose_or_mix_up_rows(refused: Any, change: dict[str, Any], says: str) -> None:
    assert says in refused(change)


def test_a_method_under_none_of_the_protocols_is_named(tiny: dict[str, Any], tmp_path: Path) -> None:
    suite = {**tiny, "tasks": ["cola"], "protocol": "routed", "methods": ["average"]}
    assert run(suite, tmp_path) == 0
    assert {method for _, method, _ in rows_of(tmp_path)} == {"pretrained", "experts", "constant"}
    assert "Under none of the suite's protocols: average." in (tmp_path / "out" / "leaderboard.md").read_text()


def test_a_reason_with_markup_or_control_characters_is_shown_as_text(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsuited(*_: Any, **options: Any) -> Any:
        raise UnsuitedError("[/x] <script>alert(1)</script> \x1b[31mred")

    monkeypatch.setitem(REGISTRY, "average", dataclasses.replace(find_method("average"), function=unsuited))
    assert run({**tiny, "tasks": ["cola"], "methods": ["average"]}, tmp_path) == 0
    out = tmp_path / "out"
    assert r"[/x] <script>alert(1)</script> \x1b[31mred" in " ".join(capsys.readouterr().out.split("\n"))
    for name in ("leaderboard.md", "index.html"):
        text = (out / name).read_text()
        assert "&lt;script&gt;" in text
        assert "<script>alert" not in text
        assert "\x1b" not in text


def test_a_method_that_looks_for_its_own_models_names_runs(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options are tried on tensors with other names than the model's."""

    def own(vectors: Any, **options: Any) -> Any:
        names = [name for name in vectors if "encoder.layer.1." in name]
        assert min(names)  # ValueError where there are none
        return average(vectors)

    average = find_method("average").function
    monkeypatch.setitem(REGISTRY, "average", dataclasses.replace(find_method("average"), function=own))
    assert run({**tiny, "tasks": ["cola"], "methods": ["average"]}, tmp_path) == 0
    assert ("standard", "average", "cola") in rows_of(tmp_path)


def test_a_model_that_overflows_is_skipped_and_the_rest_is_scored(tiny: dict[str, Any], tmp_path: Path) -> None:
    big = {"big": {"method": "task_arithmetic", "scaling": 1e30}}
    assert run({**tiny, "methods": [big, "average"]}, tmp_path) == 0
    assert {method for _, method, _ in rows_of(tmp_path)} == {"pretrained", "experts", "constant", "average"}
    (skipped,) = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert skipped["method"] == "big"
    assert skipped["reason"].startswith("cola: logits in float32: rows ")
    assert skipped["reason"].endswith("check the experts' weights, and scale the merge down")
