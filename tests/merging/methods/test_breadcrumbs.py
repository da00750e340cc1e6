"""Model Breadcrumbs against a sort of Python numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import twin_bench
from tests.support.merges import models
from twin_bench import InputError


def middle(tau: Tensor, density: float, gamma: float) -> Tensor:
    """The entries ranked gamma n + 1 to gamma n + density n, one by one."""
    entries = tau.flatten().tolist()
    ranked = sorted(range(len(entries)), key=lambda i: (-abs(entries[i]), i))
    outliers = int(gamma * len(entries))
    kept = set(ranked[outliers : outliers + max(1, int(density * len(entries)))])
    return torch.tensor([x * (i in kept) for i, x in enumerate(entries)], dtype=torch.float64).view(tau.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.006), (0.3, 0.1), (0.9, 0.2), (1.0, 0.0), (1e-6, 0.5)])
def test_breadcrumbs_is_its_formula(dtype: torch.dtype, density: float, gamma: float) -> None:
    base, tuned = models(dtype)
    merged = twin_bench.merge("breadcrumbs", base, tuned, scaling=0.7, density=density, gamma=gamma)
    for name in base:
        taus = [expert[name].float() - base[name].float() for expert in tuned.values()]
        expected = base[name].double() + 0.7 * sum(middle(tau, density, gamma) for tau in taus)
        torch.testing.assert_close(merged[name], expected.to(dtype))


def test_outliers_and_negligible_entries_go_and_the_rest_stays_unscaled() -> None:
    tau = torch.tensor([5.0, -0.1, 2.0, -9.0, 0.01, 1.0, -3.0, 0.5, 0.2, -4.0])
    merged = twin_bench.merge(
        "breadcrumbs", {"w": torch.zeros(10)}, {"a": {"w": tau}}, scaling=1.0, density=0.4, gamma=0.1
    )
    assert merged["w"].tolist() == [5.0, 0.0, 2.0, 0.0, 0.0, 0.0, -3.0, 0.0, 0.0, -4.0]


def test_a_scalar_is_kept() -> None:
    merged = twin_bench.merge("breadcrumbs", {"s": torch.tensor(1.0)}, {"a": {"s": torch.tensor(3.0)}}, scaling=1.0)
    assert merged["s"] == 3.0


def test_keeping_all_is_task_arithmetic() -> None:
    base, tuned = models()
    everything = twin_bench.merge("breadcrumbs", base, tuned, scaling=0.3, density=1.0, gamma=0.0)
    for name, expected in twin_bench.merge("task_arithmetic", base, tuned, scaling=0.3).items():
        torch.testing.assert_close(everything[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.1}, {"gamma": 1.0}, {"gamma": -0.1}])
def test_errors(options: dict[str, float]) -> None:
    (option,) = options
    with pytest.raises(InputError, match=f"breadcrumbs: {option} must be in"):
        twin_bench.merge("breadcrumbs", *models(), **options)
