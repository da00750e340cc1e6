"""How long a run would take: what a cell costs and a row costs, also on a machine that other programs keep busy."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from twin_bench.leaderboard.forecast import Clock, timed


class Machine:
    """A machine on which a cell takes `cell` seconds of processor time and each row `row`.

    Run after run passes as many times as long as `delays` say, because other programs take the processor. What is
    loaded once takes 5 seconds more.
    """

    def __init__(self, cell: float, row: float, delays: Sequence[float] = (1.0,)) -> None:
        self.cell, self.row, self.delays = cell, row, list(delays)
        self.passed = self.worked = 0.0
        self.asked: list[int] = []

    def score(self, rows: int) -> None:
        work = self.cell + rows * self.row + (0 if self.asked else 5)
        self.passed += work * self.delays[len(self.asked) % len(self.delays)]
        self.worked += work
        self.asked.append(rows)

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.passed, lambda: self.worked)


@pytest.mark.parametrize("delays", [(1.0,), (7.0,), (1.0, 9.0, 3.0)])
def test_a_cell_and_its_rows_cost_what_they_cost_where_nothing_else_runs(delays: Sequence[float]) -> None:
    """A cell's own half a second is not counted for each row, and neither is the time of other programs."""
    machine = Machine(0.5, 0.01, delays)
    assert timed(machine.score, 32, on_processor=True, clock=machine.clock) == pytest.approx((0.5, 0.01))
    assert set(machine.asked) == {16, 32}


def test_a_gpus_time_is_that_which_passes() -> None:
    """The processor only waits for it. The shortest run is one that nothing has delayed."""
    machine = Machine(0.025, 0.002, (3.0, 1.0, 2.0))
    machine.worked = -1.0
    clock = Clock(lambda: machine.passed, lambda: 0.0)
    assert timed(machine.score, 16, on_processor=False, clock=clock) == pytest.approx((0.025, 0.002))


def test_slow_rows_are_asked_once_more_and_not_three_times() -> None:
    machine = Machine(1.0, 3.0)
    assert timed(machine.score, 4, on_processor=True, clock=machine.clock) == pytest.approx((1.0, 3.0))
    assert machine.asked == [2, 2, 4]


def test_of_a_single_row_a_cells_own_time_is_not_known() -> None:
    machine = Machine(0.5, 0.25)
    assert timed(machine.score, 1, on_processor=True, clock=machine.clock) == pytest.approx((0.0, 0.75))
