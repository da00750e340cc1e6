"""RAM against its formula, entry by entry."""

from __future__ import annotations

import pytest
import torch

import twin_bench
from tests.support.matrices import SHAPES, random_experts
from twin_bench import InputError


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 5.0])
def test_is_the_mean_over_those_that_changed_an_entry(epsilon: float) -> None:
    base, experts = random_experts(4, dtype=torch.float64)
    merged = twin_bench.merge("ram", base, experts, epsilon=epsilon)
    for name in SHAPES:
        columns = torch.stack([expert[name] - base[name] for expert in experts.values()]).flatten(1).T.tolist()
        expected = []
        for column in columns:
            changed = [value for value in column if abs(value) > epsilon]
            expected.append(sum(changed) / len(changed) if changed else 0.0)
        moved = torch.tensor(expected, dtype=torch.float64).view(SHAPES[name])
        torch.testing.assert_close(merged[name], base[name] + moved)


def test_what_one_expert_alone_changed_is_kept_whole() -> None:
    base = {"w": torch.zeros(4)}
    experts = {"a": {"w": torch.tensor([4.0, 2.0, 1e-6, 0.0])}, "b": {"w": torch.tensor([0.0, 6.0, 3.0, 0.0])}}
    assert twin_bench.merge("ram", base, experts)["w"].tolist() == [4.0, 4.0, 3.0, 0.0]


def test_refuses_a_negative_epsilon() -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match="ram: epsilon must be 0 or more, not -1"):
        twin_bench.merge("ram", base, experts, epsilon=-1)
