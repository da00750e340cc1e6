"""The planner, as the pure function it is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from twin_bench.twin.plan import Costs, Group, batches, plan

COSTS = Costs(fuse=(100.0, 100.0, 100.0), rebuild=20.0, columns=(1.0, 1.0, 1.0), joint=1.0, batch=32.0, step=16.0)
H100 = Costs(
    fuse=(3e-4,) * 3,
    rebuild=1e-2,
    columns=(8e-8,) * 3,
    joint=3e-7,
    token=1.6e-5,
    plain=2.5e-2,
    by_row=4e-2,
    fusion=5e-3,
    moved=3e-6,
)
"""About what a 7B model costs on an H100: a forward takes 25 ms at least, and a token of a large batch 16 us."""


def test_equal_rows_share_a_fusion_when_their_tokens_pay_for_it() -> None:
    weights = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0], [0, 0.5, 0.5]])
    # one-hot costs 120 tokens: rows 0 and 2 have 128, row 1 has 64; row 3 (two experts, 220) has 64
    groups = plan(weights, [64, 64, 64, 64], COSTS)
    assert [group.rows for group in groups] == [(0, 2), (1, 3)]
    assert groups[0].weights is not None
    assert groups[0].weights.tolist() == [1.0, 0, 0]
    assert groups[1].weights is None


def test_a_long_row_is_worth_a_fusion_of_its_own() -> None:
    groups = plan(torch.tensor([[0.2, 0.3, 0.5]]), [320], COSTS)
    assert groups[0].weights is not None
    assert plan(torch.tensor([[0.2, 0.3, 0.5]]), [319], COSTS) == [Group((0,), None)]


def test_the_plan_depends_on_the_rows_and_not_on_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.eye(3)[torch.randint(3, (40,), generator=generator)]
    weights[::5] = torch.softmax(torch.randn(8, 3, generator=generator), dim=1)
    lengths = torch.randint(5, 60, (40,), generator=generator)
    order = torch.randperm(40, generator=generator)

    def described(groups: list[Group], names: list[int]) -> list[tuple[list[int], list[float] | None]]:
        return [
            (sorted(names[row] for row in g.rows), None if g.weights is None else g.weights.tolist()) for g in groups
        ]

    straight = described(plan(weights, lengths.tolist(), COSTS), list(range(40)))
    shuffled = described(plan(weights[order], lengths[order].tolist(), COSTS), order.tolist())
    assert straight == shuffled
    assert sorted(row for rows, _ in straight for row in rows) == list(range(40))
    assert [weights is None for _, weights in straight] == [False, False, False, True]


def test_rows_that_can_t_share_a_batch_pay_for_one_each() -> None:
    """Five equal rows that generate two tokens: a fusion (187) costs more than one batch (102), and less than five."""
    weights, lengths = torch.tensor([[1.0, 0, 0]]).repeat(5, 1), [5] * 5
    (together,) = plan(weights, lengths, COSTS, steps=2, batch_size=5)
    (apart,) = plan(weights, lengths, replace(COSTS, mixes=False), steps=2, batch_size=5)
    assert together.weights is None
    assert apart.weights is not None


def test_nothing_to_fuse() -> None:
    assert plan(torch.zeros(0, 3), [], COSTS) == []
    (group,) = plan(torch.zeros(4, 0), [9] * 4, Costs((), 20.0, (), 0.0))
    assert group.rows == (0, 1, 2, 3)
    assert group.weights is not None


def test_batches_are_cut_longest_first_and_hold_every_row_once() -> None:
    group = Group((0, 1, 2, 3, 4), torch.ones(1))
    cut = batches(group, [5, 9, 1, 9, 7], 2, COSTS)
    assert [batch.rows for batch in cut] == [(1, 3), (4, 0), (2,)]
    assert all(batch.weights is group.weights for batch in cut)


@pytest.mark.parametrize(("steps", "overhead"), [(0, 0.5), (0, 32.0), (0, 200.0), (4, 32.0)])
def test_batches_cost_the_least_of_all_cuts(steps: int, overhead: float) -> None:
    """Against every way to cut eleven rows, in order of their length, into batches of at most four."""
    lengths = torch.randint(3, 90, (11,), generator=torch.Generator().manual_seed(0)).tolist()
    cut = batches(Group(tuple(range(11)), None), lengths, 4, replace(COSTS, batch=overhead), steps=steps)
    assert sorted(row for batch in cut for row in batch.rows) == list(range(11))
    assert max(len(batch.rows) for batch in cut) <= 4

    def cost(parts: list[list[int]]) -> float:
        return sum(len(part) * max(part) + overhead + COSTS.step * steps for part in parts)

    ordered = sorted(lengths, reverse=True)
    every = []
    for marks in itertools.product([False, True], repeat=10):
        ends = [i + 1 for i, mark in enumerate(marks) if mark] + [11]
        parts = [ordered[a:b] for a, b in itertools.pairwise([0, *ends])]
        if max(map(len, parts)) <= 4:
            every.append(cost(parts))
    assert cost([[lengths[row] for row in batch.rows] for batch in cut]) == pytest.approx(min(every))


def test_a_gpu_fuses_what_it_generates_for_long() -> None:
    """A fusion takes 11 ms, and every forward of one prompt 15 ms less than on the low-rank path, or 1 ms less."""
    weights = torch.tensor([[0.2, 0.3, 0.5]])
    for steps, fused in ((0, True), (32, True), (512, True)):
        (group,) = plan(weights, [500], H100, steps=steps, batch_size=8)
        assert (group.weights is not None) == fused
    cheap = replace(H100, by_row=2.6e-2)
    assert plan(weights, [500], cheap, batch_size=8)[0].weights is None
    assert plan(weights, [500], cheap, steps=32, batch_size=8)[0].weights is not None


def test_a_gpu_runs_rows_of_different_weights_together() -> None:
    """A batch takes as long as one row, so 32 rows are one batch on the low-rank path, and not 32 fused ones."""
    weights = torch.softmax(torch.randn(32, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    (group,) = plan(weights, [20] * 32, H100, steps=64, batch_size=32)
    assert group == Group(tuple(range(32)), None)
    assert [len(batch.rows) for batch in batches(group, [20] * 16 + [40] * 16, 32, H100, steps=64)] == [32]


def test_a_gpu_cuts_batches_by_length_where_tokens_take_the_time() -> None:
    group = Group(tuple(range(64)), torch.ones(3))
    cut = batches(group, [4000] * 32 + [1000] * 32, 64, H100)
    assert [len(batch.rows) for batch in cut] == [32, 32]
    assert [len(batch.rows) for batch in batches(group, [20] * 32 + [5] * 32, 64, H100)] == [64]
