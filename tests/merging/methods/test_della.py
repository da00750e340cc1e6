"""DELLA against its steps taken one row at a time, its statistics, and DARE + TIES."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import twin_bench
from tests.support.merges import models
from twin_bench import InputError
from twin_bench.merging.drawing import draws

CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 1e-5}}


def pruned_row(row: list[float], uniform: list[float], density: float, epsilon: float) -> list[float]:
    """Drop, step one: a keep probability for each rank, the smallest magnitude first."""
    steps = max(len(row) - 1, 1)
    start = density - epsilon * (len(row) > 1)
    result = [0.0] * len(row)
    for rank, i in enumerate(sorted(range(len(row)), key=lambda i: (abs(row[i]), i))):
        keep = start + 2 * epsilon * rank / steps
        result[i] = row[i] / keep * (uniform[i] < keep)
    return result


def fused(entries: list[float]) -> float:
    """Elect and fuse, steps two and three, of one entry of all experts."""
    total = sum(entries)
    agreeing = [x for x in entries if x * total > 0]
    return sum(agreeing) / max(len(agreeing), 1)


def della(taus: dict[str, Tensor], name: str, density: float, epsilon: float, seed: int) -> Tensor:
    columns = []
    for task, tau in taus.items():
        uniform = draws(seed, task, name, tau.shape)
        rows = zip(torch.atleast_2d(tau).tolist(), torch.atleast_2d(uniform).tolist(), strict=True)
        columns.append([x for row, u in rows for x in pruned_row(row, u, density, epsilon)])
    shape = next(iter(taus.values())).shape
    return torch.tensor([fused(list(xs)) for xs in zip(*columns, strict=True)], dtype=torch.float64).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("density", "epsilon"), [(0.3, 0.15), (0.5, 0.5 - 1e-3), (0.8, 0.05)])
def test_della_is_its_formula(dtype: torch.dtype, density: float, epsilon: float) -> None:
    base, tuned = models(dtype)
    base["one_wide"] = torch.ones(6, 1, dtype=dtype)
    for shift, expert in enumerate(tuned.values()):
        expert["one_wide"] = torch.arange(6.0).view(6, 1).add(shift).to(dtype)
    merged = twin_bench.merge("della", base, tuned, scaling=0.8, density=density, epsilon=epsilon, seed=11)
    for name in base:
        taus = {task: expert[name].float() - base[name].float() for task, expert in tuned.items()}
        expected = base[name].double() + 0.8 * della(taus, name, density, epsilon, 11)
        torch.testing.assert_close(merged[name], expected.to(dtype), **CLOSE[dtype])


def test_without_spread_it_is_dare_ties_draw_by_draw() -> None:
    base, tuned = models()
    spreadless = twin_bench.merge("della", base, tuned, density=0.4, epsilon=0.0, seed=3)
    for name, expected in twin_bench.merge("dare_ties", base, tuned, density=0.4, seed=3).items():
        assert torch.equal(spreadless[name], expected)


def test_large_entries_are_kept_more_often_and_the_mean_is_unbiased() -> None:
    rows, length = 4000, 21
    tau = torch.linspace(0.1, 1.0, length).mul(torch.tensor([1.0, -1.0]).repeat(length)[:length]).expand(rows, length)
    merged = twin_bench.merge("della", {"w": torch.zeros(rows, length)}, {"a": {"w": tau}}, density=0.5, epsilon=0.3)
    kept = (merged["w"] != 0).double().mean(dim=0)
    five_errors = 5 * 0.5 / rows**0.5
    assert (kept - torch.linspace(0.2, 0.8, length)).abs().max() < five_errors
    assert ((merged["w"] / tau).double().mean(dim=0) - 1).abs().max() < five_errors / 0.2


def test_another_seed_draws_otherwise() -> None:
    base, tuned = models()
    first, again, other = (twin_bench.merge("della", base, tuned, seed=seed)["square"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "options", [{"density": 0.1}, {"density": 0.9}, {"epsilon": -0.1}, {"density": 0.3, "epsilon": 0.3}]
)
def test_errors(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"della: density - epsilon and density \+ epsilon must be in \(0, 1\]"):
        twin_bench.merge("della", *models(), **options)
    with pytest.raises(InputError, match=r"density must be in \(0, 1\]"):
        twin_bench.merge("della", *models(), density=0.0)
