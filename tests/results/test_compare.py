"""Two directories side by side: the rows that both have scored, in whatever order, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

import twin_bench
from tests.support.cells import Scored, answered, write_made
from twin_bench.cli import main

DRAW = np.random.default_rng(3)
TARGETS = {"cola": DRAW.integers(0, 2, 100), "mnli": DRAW.integers(0, 3, 100)}
ANSWERS = {
    (side, task): np.where(DRAW.random(100) < skill, own, (own + 1) % 2)
    for task, own in TARGETS.items()
    for side, skill in (("first", 0.9), ("second", 0.7))
}


def part(side: str, method: str, task: str, rows: Any, **changes: Any) -> Scored:
    own = TARGETS[task][rows].tolist(), ANSWERS[side, task][rows].tolist()
    return answered(method, task, *own, identities=[f"{task}{row}" for row in rows], **changes)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Return a run on the rows 0 to 59 and one on the rows 99 to 20, of mnli 30 to 49, which also has other methods."""
    early, late, few = np.arange(60), np.arange(20, 100)[::-1], np.arange(30, 50)
    first = [part("first", "average", task, early) for task in TARGETS]
    second = [part("second", "average", "cola", late), part("second", "average", "mnli", few)]
    write_made([*first, part("first", "ties", "cola", early)], tmp_path / "a")
    write_made([*second, part("second", "slerp", "cola", late)], tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def test_scores_are_of_the_rows_that_both_have(two: tuple[Path, Path]) -> None:
    found = twin_bench.compare(*two).set_index("task")
    assert list(found["method"]) == 3 * ["average"]
    shared = {"cola": np.arange(20, 60), "mnli": np.arange(30, 50)}
    expected = {
        (side, task): 100 * float(np.mean(ANSWERS[side, task][rows] == TARGETS[task][rows]))
        for task, rows in shared.items()
        for side in ("first", "second")
    }
    for task, rows in shared.items():
        assert found["rows"][task] == len(rows)
        for side in ("first", "second"):
            assert found[side][task] == pytest.approx(expected[side, task])
        gap = expected["first", task] - expected["second", task]
        assert found["difference"][task] == pytest.approx(gap)
        assert found["ci_low"][task] <= gap <= found["ci_high"][task]
    assert found["rows"]["(mean)"] == 60
    means = [(expected[side, "cola"] + expected[side, "mnli"]) / 2 for side in ("first", "second")]
    assert found.loc["(mean)", ["first", "second"]].to_list() == pytest.approx(means)
    assert found["p_holm"].isna().to_dict() == {"cola": True, "mnli": True, "(mean)": False}
    rows = shared["cola"]
    right = {side: ANSWERS[side, "cola"][rows] == TARGETS["cola"][rows] for side in ("first", "second")}
    alone = [int((right[one] & ~right[other]).sum()) for one, other in (("first", "second"), ("second", "first"))]
    assert alone == [9, 3]
    mid_p = 2 * binom.cdf(2, 12, 0.5) + binom.pmf(3, 12, 0.5)  # McNemar's
    assert found["p"]["cola"] == pytest.approx(mid_p, abs=0.03)


def test_the_other_way_round_the_signs_are_turned_and_a_run_is_like_itself(two: tuple[Path, Path]) -> None:
    there, back = twin_bench.compare(*two), twin_bench.compare(*reversed(two))
    assert list(back["difference"]) == pytest.approx(list(-there["difference"]))
    assert list(back["ci_low"]) == pytest.approx(list(-there["ci_high"]))
    assert list(back["p"]) == pytest.approx(list(there["p"]))
    itself = twin_bench.compare(two[0], two[0])
    assert set(itself["method"]) == {"average", "ties"}
    assert (itself[["difference", "ci_low", "ci_high"]] == 0).all(axis=None)
    assert (itself["p"] == 1).all()


def test_the_command_prints_and_writes_the_same(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "compared.csv"
    assert main(["compare", *map(str, two), "--csv", str(file)]) == 0
    found, said = twin_bench.compare(*two), capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(file), found, check_dtype=False)
    for line in found.to_dict("records"):
        (shown,) = [text for text in said.splitlines() if text.split()[1:3] == ["average", line["task"]]]
        assert shown.split()[3:6] == [str(line["rows"]), f"{line['first']:.1f}", f"{line['second']:.1f}"]


def test_nothing_in_common_is_one_line(two: tuple[Path, Path], tmp_path: Path) -> None:
    write_made([part("first", "average", "cola", np.arange(10))], tmp_path / "c")
    with pytest.raises(twin_bench.InputError, match="no method and task of both has rows in common"):
        twin_bench.compare(tmp_path / "c", two[1])
    write_made([part("first", "average", "cola", np.arange(60), metric="mcc")], tmp_path / "d")
    with pytest.raises(twin_bench.InputError, match="no method and task of both has rows in common"):
        twin_bench.compare(tmp_path / "d", two[0])  # another metric
