"""The planner, as the pure function it is."""

from __future__ import annotations

import itertools

import pytest
import torch

from twin_bench.twin.plan import STEP_TOKENS, Costs, Group, batches, plan

COSTS = Costs(fuse=(100.0, 100.0, 100.0), rebuild=20.0, columns=(1.0, 1.0, 1.0), joint=1.0)


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


def test_nothing_to_fuse() -> None:
    assert plan(torch.zeros(0, 3), [], COSTS) == []
    (group,) = plan(torch.zeros(4, 0), [9] * 4, Costs((), 20.0, (), 0.0))
    assert group.rows == (0, 1, 2, 3)
    assert group.weights is not None


def test_batches_are_cut_longest_first_and_hold_every_row_once() -> None:
    group = Group((0, 1, 2, 3, 4), torch.ones(1))
    cut = batches(group, [5, 9, 1, 9, 7], 2)
    assert [batch.rows for batch in cut] == [(1, 3), (4, 0), (2,)]
    assert all(batch.weights is group.weights for batch in cut)


@pytest.mark.parametrize(("steps", "overhead"), [(0, 0.5), (0, 32.0), (0, 200.0), (4, 32.0)])
def test_batches_cost_the_least_of_all_cuts(steps: int, overhead: float) -> None:
    """Against every way to cut eleven rows, in order of their length, into batches of at most four."""
    lengths = torch.randint(3, 90, (11,), generator=torch.Generator().manual_seed(0)).tolist()
    cut = batches(Group(tuple(range(11)), None), lengths, 4, steps=steps, overhead=overhead)
    assert sorted(row for batch in cut for row in batch.rows) == list(range(11))
    assert max(len(batch.rows) for batch in cut) <= 4

    def cost(parts: list[list[int]]) -> float:
        return sum(len(part) * max(part) + overhead + STEP_TOKENS * steps for part in parts)

    ordered = sorted(lengths, reverse=True)
    every = []
    for marks in itertools.product([False, True], repeat=10):
        ends = [i + 1 for i, mark in enumerate(marks) if mark] + [11]
        parts = [ordered[a:b] for a, b in itertools.pairwise([0, *ends])]
        if max(map(len, parts)) <= 4:
            every.append(cost(parts))
    assert cost([[lengths[row] for row in batch.rows] for batch in cut]) == pytest.approx(min(every))
