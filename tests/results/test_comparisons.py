"""Paired comparisons within a directory: methods on the same rows, ties, Holm, a reference of the user's choice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import twin_bench
from tests.support.cells import Scored, answered, write_made
from twin_bench.cli import main
from twin_bench.results.stored import load_leaderboard

ROWS = 400
DRAW = np.random.default_rng(7)
TARGETS = DRAW.integers(0, 2, ROWS)
HARD = DRAW.random(ROWS)


def right_on(method: str, share: float, other: float = 0.0, **changes: Any) -> Scored:
    """Return answers that are right on the easiest rows, but for a share `other` of all rows, which is turned round."""
    right = (share > HARD) ^ (np.random.default_rng(len(method)).random(ROWS) < other)
    return answered(method, "cola", TARGETS.tolist(), np.where(right, TARGETS, 1 - TARGETS).tolist(), **changes)


def scored() -> list[Scored]:
    methods = [("experts", 0.9, 0.0), ("constant", 0.5, 0.3), ("average", 0.8, 0.0), ("same", 0.8, 0.0)]
    methods += [("ties", 0.775, 0.015), ("slerp", 0.5, 0.0)]
    return [right_on(*method) for method in methods]


def lines(out: Path, reason: str, **options: Any) -> dict[str, dict[str, Any]]:
    found = load_leaderboard(out, **options).comparisons
    return {line["method"]: line for line in found[found["reason"] == reason].to_dict("records")}


def test_a_method_is_no_better_than_itself_under_another_label(tmp_path: Path) -> None:
    write_made(scored(), tmp_path)
    against = lines(tmp_path, "reference", compare_to="average")
    same = against["same"]
    assert [same[key] for key in ("difference", "ci_low", "ci_high", "p", "p_holm")] == [0, 0, 0, 1, 1]
    assert against.keys() == {"same", "ties", "slerp"}
    table = load_leaderboard(tmp_path).summary.set_index("method")
    for column in ("rank_low", "rank_high", "tie_group"):
        assert table[column]["average"] == table[column]["same"]
    assert table["tie_group"].to_dict() == pytest.approx(
        {"experts": math.nan, "constant": math.nan, "average": 1, "same": 1, "ties": 2, "slerp": 3}, nan_ok=True
    )
    assert list(table.loc["average", ["rank_low", "rank_high"]]) == [1, 2]
    assert list(table.loc["slerp", ["rank_low", "rank_high"]]) == [4, 4]


def test_the_same_rows_tell_apart_what_independent_errors_cannot(tmp_path: Path) -> None:
    write_made(scored(), tmp_path)
    board = load_leaderboard(tmp_path)
    ties = lines(tmp_path, "best")["ties"]
    assert ties["against"] == "average"
    errors = board.summary.set_index("method")["stderr"]
    independent = 1.96 * math.hypot(errors["ties"], errors["average"])
    assert (ties["ci_high"] - ties["ci_low"]) / 2 < 0.6 * independent
    assert ties["ci_high"] < 0 < ties["difference"] + independent
    scores = board.cells.set_index("method")["score"]
    assert ties["difference"] == pytest.approx(100 * (scores["ties"] - scores["average"]) / scores["experts"])


def test_p_is_corrected_for_how_many_are_compared(tmp_path: Path) -> None:
    write_made(scored(), tmp_path)
    for reason, count in (("best", 3), ("constant", 4)):
        found = sorted(lines(tmp_path, reason).values(), key=lambda line: line["p"])
        assert len(found) == count
        running, expected = 0.0, []
        for place, line in enumerate(found):  # Holm: the smallest times their number, the next times one less, ...
            running = max(running, (count - place) * line["p"])
            expected.append(min(1.0, running))
        assert [line["p_holm"] for line in found] == pytest.approx(expected)


def test_methods_that_are_told_the_task_are_ranked_and_compared_among_themselves(tmp_path: Path) -> None:
    told = [right_on(name, share, track="task-id given") for name, share in (("emr", 0.89), ("told", 0.7))]
    write_made([*scored(), *told], tmp_path)
    table = load_leaderboard(tmp_path).summary.set_index("method")
    assert table["rank_low"][["emr", "told", "average"]].to_list() == [1, 2, 1]
    best = lines(tmp_path, "best")
    assert (best["told"]["against"], best["ties"]["against"]) == ("emr", "average")
    assert "emr" not in best


def test_a_harness_without_samples_has_unpaired_comparisons(tmp_path: Path) -> None:
    write_made([(cell, None) for cell, _ in scored()], tmp_path)
    ties = lines(tmp_path, "best")["ties"]
    cells = load_leaderboard(tmp_path).cells.set_index("method")
    error = 100 * math.hypot(cells["stderr"]["ties"], cells["stderr"]["average"]) / cells["score"]["experts"]
    assert (ties["ci_high"] - ties["ci_low"]) / 2 == pytest.approx(1.96 * error, rel=0.05)


def test_an_unknown_label_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_made(scored(), tmp_path)
    with pytest.raises(twin_bench.InputError, match="--compare-to averge: no such row; did you mean 'average'"):
        twin_bench.compare(tmp_path, reference="averge")
    assert main(["report", str(tmp_path), "--compare-to", "averge"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --compare-to averge: no such row")
    assert not (tmp_path / "leaderboard.json").exists()
