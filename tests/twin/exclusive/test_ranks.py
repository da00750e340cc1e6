"""Ranks by energy and by budget, against numpy, and factors with few bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.errors import InputError
from twin_bench.twin.exclusive import Exclusive, exclusive_vector
from twin_bench.twin.exclusive.quantised import levels, quantised

SHAPES = {"tall": (40, 12), "wide": (12, 64), "square": (20, 20)}
DECAY = {"tall": 0.5, "wide": 0.9, "square": 0.7}


def zeros() -> dict[str, Tensor]:
    return {**{name: torch.zeros(shape) for name, shape in SHAPES.items()}, "bias": torch.zeros(10)}


@pytest.fixture(scope="module")
def expert() -> dict[str, Tensor]:
    """Return matrices whose singular values fall at rates of their own, and a vector."""
    generator = torch.Generator().manual_seed(0)
    found = {"bias": torch.randn(10, generator=generator)}
    for name, (m, n) in SHAPES.items():
        U, V = (torch.linalg.qr(torch.randn(k, min(m, n), generator=generator)).Q for k in (m, n))
        found[name] = U * DECAY[name] ** torch.arange(min(m, n)) @ V.T
    return found


def spectra(expert: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.linalg.svd(expert[name].double().numpy(), compute_uv=False) for name in SHAPES}


def ranks(found: Exclusive) -> dict[str, int]:
    return {name: len(found.factors[name].A) if name in found.factors else 0 for name in SHAPES}


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
def test_energy_is_the_smallest_rank_that_holds_it(expert: dict[str, Tensor], energy: float) -> None:
    found = exclusive_vector(expert, zeros(), energy=energy)
    for name, S in spectra(expert).items():
        held = np.cumsum(S**2) / np.sum(S**2)
        rank = ranks(found)[name]
        assert held[rank - 1] >= energy
        assert rank == 1 or held[rank - 2] < energy
        U, _, Vh = np.linalg.svd(expert[name].double().numpy(), full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        np.testing.assert_allclose(torch.mm(*found.factors[name]).numpy(), best, atol=1e-5)
    assert len(set(ranks(found).values())) > 1


def test_all_the_energy_is_the_matrix(expert: dict[str, Tensor]) -> None:
    found = exclusive_vector(expert, zeros(), energy=1.0)
    for name in SHAPES:
        torch.testing.assert_close(torch.mm(*found.factors[name]), expert[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_budget_is_spent_on_the_most_energy_a_byte(expert: dict[str, Tensor], bits: int | None) -> None:
    """No direction that was left out holds more for each byte than one that was taken, but for the last one's size."""
    budget = {None: 4000, 8: 1200, 4: 700}[bits]
    found = exclusive_vector(expert, zeros(), budget_bytes=budget, bits=bits)
    counts = ranks(found)
    cost = {
        name: {None: 4 * (m + n), 8: m + n + 8, 4: -(-m // 2) - (-n // 2) + 4 * (-(-m // 64) - (-n // 64))}[bits]
        for name, (m, n) in SHAPES.items()
    }
    left = budget - 40
    expected = dict.fromkeys(SHAPES, 0)
    gains = sorted(((S[i] ** 2 / cost[name], name) for name, S in spectra(expert).items() for i in range(len(S))))
    for _, name in reversed(gains):
        if cost[name] <= left:
            expected[name] += 1
            left -= cost[name]
    assert counts == expected
    assert found.nbytes() <= budget
    if bits != 4:
        assert found.nbytes() == budget - left
    assert len(set(counts.values())) == 3


def test_a_share_is_of_the_experts_bytes(expert: dict[str, Tensor]) -> None:
    numbers = sum(tensor.numel() for tensor in expert.values())
    found = exclusive_vector(expert, zeros(), budget=0.5)
    assert ranks(found) == ranks(exclusive_vector(expert, zeros(), budget_bytes=int(0.5 * 4 * numbers)))
    assert 0.9 * 2 * numbers < found.nbytes() <= 2 * numbers


def test_a_budget_below_the_smallest_direction_is_refused(expert: dict[str, Tensor]) -> None:
    least = 40 + 4 * (20 + 20)
    assert ranks(exclusive_vector(expert, zeros(), budget_bytes=least)) == {"tall": 0, "wide": 0, "square": 1}
    message = (
        rf"a budget of {least - 1} bytes is too small .* its vectors take 40, .* \(square\) 160; give at least 200"
    )
    with pytest.raises(InputError, match=message):
        exclusive_vector(expert, zeros(), budget_bytes=least - 1, name="cola")
    bias = {"bias": expert["bias"]}
    with pytest.raises(InputError, match="its vectors take 40; give at least 40"):
        exclusive_vector(bias, {"bias": torch.zeros(10)}, budget_bytes=39)
    assert exclusive_vector(bias, {"bias": torch.zeros(10)}, budget_bytes=40).nbytes() == 40


def test_the_levels_are_those_of_normal_float_4() -> None:
    found = levels().tolist()
    assert (len(found), found[0], found[7], found[15]) == (16, -1.0, 0.0, 1.0)
    # Appendix E of arXiv:2305.14314
    published = (-0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0795803, 0.1609302)
    assert found[1:7] + found[8:10] == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_8_bits_round_to_the_directions_own_scale(expert: dict[str, Tensor], dtype: torch.dtype) -> None:
    whole = exclusive_vector({n: t.to(dtype) for n, t in expert.items()}, zeros(), rank=5)
    few = exclusive_vector({n: t.to(dtype) for n, t in expert.items()}, zeros(), rank=5, bits=8)
    for name in SHAPES:
        for side, kept in (("B", whole.factors[name].B.T), ("A", whole.factors[name].A)):
            scale = kept.abs().amax(dim=1, keepdim=True) / 127
            expected = (kept / scale).round() * scale
            own = few.factors[name].B.T if side == "B" else few.factors[name].A
            torch.testing.assert_close(own, expected.float(), atol=1e-6, rtol=1e-6)
            codes = few.quantised[name].parts[f"{side}.codes"]
            assert (codes.dtype, codes.abs().max()) == (torch.int8, 127)


def test_4_bits_are_the_nearest_levels_in_blocks_of_64(expert: dict[str, Tensor]) -> None:
    whole, few = (exclusive_vector(expert, zeros(), rank=5, **more) for more in ({}, {"bits": 4}))
    steps = levels().numpy()
    for name in SHAPES:
        for side in ("B", "A"):
            kept, own = (getattr(one.factors[name], side) for one in (whole, few))
            flat = (kept.T if side == "B" else kept).numpy().ravel()
            expected = np.empty_like(flat)
            for start in range(0, len(flat), 64):
                block = flat[start : start + 64]
                size = np.abs(block).max()
                nearest = np.abs(block[:, None] / size - steps).argmin(axis=1)
                expected[start : start + 64] = steps[nearest] * size
            np.testing.assert_allclose((own.T if side == "B" else own).numpy().ravel(), expected, atol=1e-6)
            assert few.quantised[name].parts[f"{side}.codes"].numel() == -(-len(flat) // 2)


def test_bytes_of_few_bits(expert: dict[str, Tensor]) -> None:
    few = {bits: exclusive_vector(expert, zeros(), rank=5, bits=bits).nbytes() for bits in (8, 4)}
    numbers = [5 * side for shape in SHAPES.values() for side in shape]
    assert few[8] == sum(numbers) + 6 * 5 * 4 + 40
    assert few[4] == sum(-(-count // 2) + 4 * -(-count // 64) for count in numbers) + 40


@pytest.mark.parametrize("bits", [8, 4])
def test_directions_of_zeros_stay_zero(bits: int) -> None:
    found = quantised(Factors(torch.zeros(5, 2), torch.zeros(2, 7)), bits).factors()
    assert torch.equal(found.B, torch.zeros(5, 2))
    assert torch.equal(found.A, torch.zeros(2, 7))
