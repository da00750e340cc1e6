"""PCB-Merging against its steps on one flat float64 vector an expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import twin_bench
from tests.support.merges import models
from twin_bench import InputError


def flat(base: Any, expert: Any) -> NDArray[np.float64]:
    return np.concatenate([(expert[n].float() - base[n].float()).double().numpy().ravel() for n in base])


def rescaled(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return (x - x.min()) / (x.max() - x.min())


def pcb(taus: list[NDArray[np.float64]], density: float) -> NDArray[np.float64]:
    """The paper's three steps with the authors' choices: intra-balancing, inter-balancing, drop and rescale."""
    size, together = len(taus[0]), sum(taus)
    numerator, denominator = np.zeros(size), np.zeros(size)
    for tau in taus:
        ascending = np.sort(np.abs(tau))
        magnitude = np.clip(np.abs(tau), ascending[int(size * 1e-4)], ascending[int(size * (1 - 1e-4) - 1)])
        intra = np.exp(len(taus) * rescaled(magnitude) ** 2)
        inter = np.tanh(tau * together)
        score = intra * inter
        weight = rescaled(np.maximum(score, np.sort(score)[int(size * (1 - density))]))
        numerator += weight * np.copysign(magnitude, tau) * (tau != 0)
        denominator += weight
    return numerator / np.maximum(denominator, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.6, 1.0])
def test_pcb_is_its_formula(dtype: torch.dtype, density: float) -> None:
    base, tuned = models(dtype)
    generator = torch.Generator().manual_seed(5)
    base["large"] = torch.zeros(130, 100, dtype=dtype)  # so many entries that both ends are clipped
    for expert in tuned.values():
        expert["large"] = torch.randn(130, 100, generator=generator).mul(0.1).to(dtype)
    taus = [flat(base, expert) for expert in tuned.values()]
    start = np.concatenate([tensor.double().numpy().ravel() for tensor in base.values()])
    expected = torch.from_numpy(start + 1.2 * pcb(taus, density)).to(dtype)
    merged = twin_bench.merge("pcb", base, tuned, scaling=1.2, density=density)
    found = torch.cat([merged[name].flatten() for name in base])
    tolerance = {torch.float32: {"rtol": 1e-3, "atol": 2e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-3}}[dtype]
    torch.testing.assert_close(found, expected, **tolerance)


def test_the_smallest_magnitudes_are_clipped_too() -> None:
    generator = torch.Generator().manual_seed(6)
    base = {"w": torch.zeros(10_100)}
    signs, magnitudes = torch.randn(2, 10_100, generator=generator).sign(), torch.rand(2, 10_100, generator=generator)
    taus = signs * (1 + magnitudes)
    taus[:, 0] = torch.tensor([0.01, 1.5])  # far below all the others, of which 1e-4 is one
    tuned = {"a": {"w": taus[0]}, "b": {"w": taus[1]}}
    found = twin_bench.merge("pcb", base, tuned, density=1.0)["w"]
    expected = torch.from_numpy(pcb([flat(base, expert) for expert in tuned.values()], 1.0))
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=2e-4)
    assert found[0] > 1


def test_of_equal_experts_the_largest_entries_come_back() -> None:
    base, tuned = models(experts=1)
    expert = tuned["task0"]
    merged = twin_bench.merge("pcb", base, {"a": expert, "b": expert, "c": expert}, density=0.2)
    tau, found = flat(base, expert), flat(base, merged)
    descending = np.argsort(-np.abs(tau))
    survivors = descending[1 : len(tau) - int(len(tau) * 0.8) - 1]  # the very largest is clipped, the last is q itself
    np.testing.assert_allclose(found[survivors], tau[survivors], atol=1e-6)
    assert not found[descending[len(survivors) + 1 :]].any()


def test_an_expert_that_learnt_nothing_and_one_of_constant_magnitude_are_no_trouble() -> None:
    base, tuned = models(experts=1)
    constant = {name: tensor + 0.5 for name, tensor in base.items()}
    for name, found in twin_bench.merge("pcb", base, {"idle": base, "one": tuned["task0"], "flat": constant}).items():
        assert torch.isfinite(found).all()
        assert found.shape == base[name].shape


def test_many_experts_do_not_overflow() -> None:
    generator = torch.Generator().manual_seed(0)
    tuned = {str(task): {"w": torch.randn(50, generator=generator)} for task in range(100)}
    assert torch.isfinite(twin_bench.merge("pcb", {"w": torch.zeros(50)}, tuned)["w"]).all()


def test_errors() -> None:
    with pytest.raises(InputError, match=r"pcb: density must be in \(0, 1\]"):
        twin_bench.merge("pcb", *models(), density=1.2)
