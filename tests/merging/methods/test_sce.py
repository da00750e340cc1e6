"""SCE against its formula, entry by entry in Python floats."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import twin_bench
from tests.support.matrices import SHAPES, random_experts
from twin_bench import InputError


def entry_by_entry(base: torch.Tensor, experts: list[torch.Tensor], select: float) -> torch.Tensor:
    origin = base.double().flatten().tolist()
    flat = [(expert.double() - base.double()).flatten().tolist() for expert in experts]
    columns = [list(column) for column in zip(*flat, strict=True)]
    if select < 1:
        variances = [statistics.pvariance(column) for column in columns]
        ranked = sorted(range(len(columns)), key=lambda index: -variances[index])
        kept = set(ranked[: int(select * sum(variance != 0 for variance in variances))])
        columns = [column if index in kept else [0.0] * len(column) for index, column in enumerate(columns)]
    squares = [math.fsum(column[task] ** 2 for column in columns) for task in range(len(flat))]
    merged = []
    for column in columns:
        sign = 1 if math.fsum(column) >= 0 else -1
        agreeing = [(w, value) for w, value in zip(squares, column, strict=True) if value * sign > 0]
        total = math.fsum(w for w, _ in agreeing)
        merged.append(math.fsum(w * value for w, value in agreeing) / total if total else 0.0)
    found = [a + b for a, b in zip(origin, merged, strict=True)]
    return torch.tensor(found, dtype=torch.float64).view(base.shape)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("select", [0.1, 0.5, 1.0])
def test_is_mergekits_formula(select: float, dtype: torch.dtype, tolerance: float) -> None:
    base, experts = random_experts(4, dtype=dtype)
    merged = twin_bench.merge("sce", base, experts, select_topk=select)
    for name in SHAPES:
        expected = entry_by_entry(base[name], [expert[name] for expert in experts.values()], select)
        assert merged[name].dtype is dtype
        torch.testing.assert_close(merged[name].double(), expected, rtol=tolerance, atol=tolerance)


def test_entries_that_all_experts_changed_alike_do_not_count_among_those_that_vary() -> None:
    base = {"w": torch.zeros(4)}
    experts = {"a": {"w": torch.tensor([5.0, 1.0, 2.0, 0.0])}, "b": {"w": torch.tensor([5.0, -1.0, 4.0, 0.0])}}
    found = twin_bench.merge("sce", base, experts, select_topk=0.5)["w"]
    assert found.tolist() == [0.0, 1.0, 0.0, 0.0]  # of two entries one is kept: the second, variance 1; the third has 1
    assert twin_bench.merge("sce", base, {"a": experts["a"]})["w"].tolist() == experts["a"]["w"].tolist()


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_refuses_a_fraction_out_of_range(value: float) -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match=r"sce: select_topk must be in \(0, 1\]"):
        twin_bench.merge("sce", base, experts, select_topk=value)
