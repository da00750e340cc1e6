"""Killed runs, damaged files, a full disk: the next run ends with the same scores, and an error is one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.faults import copied_at_each_write, full_disk
from twin_bench.cli import main
from twin_bench.config import parse
from twin_bench.contenders import Contender
from twin_bench.errors import InputError
from twin_bench.files import TEMPORARY, digest_files
from twin_bench.leaderboard.harness import Evaluated, Job
from twin_bench.leaderboard.run import run_suite
from twin_bench.leaderboard.suite import Suite
from twin_bench.merging.export import merge_to_directory
from twin_bench.merging.recipe import MergeRecipe
from twin_bench.report.files import FILES, write_report
from twin_bench.results.stored import load_leaderboard, write_board
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe
from twin_bench_lm_eval.harness import LmEval

METHODS = [
    "average",
    "fisher",
    {"adamerging": {"steps": 2, "batch_size": 2}},
    {"twin": {"exclusive": {"rank": 1}, "router": {"epochs": 1}}},
]


@pytest.fixture
def suite(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Suite:
    """A suite of every kind of thing that is kept: statistics, learning, a twin, features, a tuned choice."""
    monkeypatch.setattr(LmEval, "score", logits_in_place_of_a_score)
    return small_suite(tiny)


def small_suite(tiny: dict[str, Any]) -> Suite:
    changes = {
        "tasks": ["mnli"],
        "experts": {"mnli": tiny["experts"]["mnli"]},
        "methods": METHODS,
        "rows": 4,
        "calibration_rows": 4,
    }
    return parse(Suite, {**tiny, **changes}, "suite")


def logits_in_place_of_a_score(_: Any, contender: Contender, job: Job) -> Evaluated:
    """Score a model by its logits: any bit that changes in its parameters shows."""
    asked = job.asked.scored_inputs(4)
    texts = [(given.text, given.text_pair) for given in asked]
    found = contender.twin.classify(texts, [given.task for given in asked], batch_size=4)
    total = sum(float(torch.as_tensor(prediction.logits).abs().sum()) for prediction in found)
    return Evaluated(total, 1.0, len(asked))


def scores(suite: Suite, out: Path) -> dict[tuple[str, str], Any]:
    board = run_suite(suite, out)
    write_board(board, out)
    write_report(load_leaderboard(out, draws=100), out)
    return {(cell.method, cell.task): (cell.score, cell.key, cell.settings, cell.notes) for cell in board.cells}


def require_nothing_left_over(folder: Path) -> None:
    assert not [path for path in folder.rglob("*") if path.name.endswith(TEMPORARY)]


def test_a_leaderboard_killed_after_each_of_its_writes(suite: Suite, tmp_path: Path) -> None:
    with copied_at_each_write(tmp_path / "out", tmp_path / "copies") as copies:
        expected = scores(suite, tmp_path / "out")
    assert len(expected) == len(METHODS) + 2
    assert len({score for score, *_ in expected.values()}) == len(expected) - 1  # the average of one expert is itself
    assert len(copies) > 30
    for out in copies:
        assert scores(suite, out) == expected, out.name
        assert all((out / name).is_file() for name in FILES)
        require_nothing_left_over(out)


KEPT = {
    "a cell": "cells/standard/average/*.json",
    "the twin": "twins/*/*/experts/mnli/adapter_model.safetensors",
    "the twin's settings": "twins/*/*/twin.json",
    "the build's time": "twins/*/*.json",
    "statistics": "twins/*/fisher-*/*.safetensors",
    "what was learnt": "twins/*/adamerging-*",
    "features": "features/**/*.safetensors",
}


@pytest.fixture(scope="module")
def finished(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Suite, Path, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LmEval, "score", logits_in_place_of_a_score)
        found, out = small_suite(tiny), tmp_path_factory.mktemp("finished")
        return found, out, scores(found, out)


@pytest.mark.parametrize("kind", KEPT)
def test_a_flipped_bit_is_found_or_harmless(finished: Any, suite: Suite, tmp_path: Path, kind: str) -> None:
    """Whatever stands between the file and the scores is removed, so that the file is read."""
    _, done, expected = finished
    name = min(file.relative_to(done) for file in done.glob(KEPT[kind]))
    whole = (done / name).read_bytes()
    for place in (9, len(whole) // 3, len(whole) // 2, len(whole) - 3):
        out = Path(shutil.copytree(done, tmp_path / f"{place}"))
        (out / name).write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        if kind != "a cell":
            shutil.rmtree(out / "cells")
        if kind == "features":
            shutil.rmtree(out / "twins")
        said = ""
        try:
            assert scores(suite, out) == expected
        except InputError as error:
            said = str(error)
        assert not said or (str(out / name.parts[0]) in said and "build the twin again" in said)


@pytest.mark.parametrize("kind", ["twin", "merge"])
def test_a_build_and_a_merge_killed_after_each_of_their_writes(families: Any, tmp_path: Path, kind: str) -> None:
    """The next one finds no half of the last one's folder, and writes the same."""
    recipe = families("bert").recipe

    def make(folder: Path) -> str:
        if kind == "twin":
            build_twin(Recipe.model_validate(recipe), folder)
        else:
            given = {key: recipe[key] for key in ("base_model", "experts")}
            merge_to_directory(MergeRecipe.model_validate({**given, "merge": {"method": "average"}}), folder)
        return digest_files(folder)

    with copied_at_each_write(tmp_path / "made", tmp_path / "copies") as copies:
        expected = make(tmp_path / "made" / kind)
    assert len(copies) >= 2
    for copy in copies:
        if (copy / kind).exists():
            assert digest_files(copy / kind) == expected, copy.name
        else:
            assert make(copy / kind) == expected, copy.name
        require_nothing_left_over(copy)


@pytest.mark.parametrize("command", ["build", "merge", "leaderboard"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    families: Any, suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    recipe, out = families("bert").recipe, tmp_path / "out"
    given = {
        "build": recipe,
        "merge": {key: recipe[key] for key in ("base_model", "experts")} | {"merge": {"method": "average"}},
        "leaderboard": suite.model_dump(exclude_none=True) | {"methods": [METHODS[-1]]},
    }[command]
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given))
    named = ["--suite", str(tmp_path / "given.yaml"), "--out", str(out)]
    with full_disk(8_000):
        assert main([command, *(named if command == "leaderboard" else [str(tmp_path / "given.yaml"), str(out)])]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: {out}")
    assert line.endswith("File too large")
    require_nothing_left_over(tmp_path)
    assert not [file for file in tmp_path.rglob("*.safetensors") if "features" not in file.parts]
