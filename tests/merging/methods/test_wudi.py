"""WUDI against its loss, differentiated by autograd and minimised by torch.optim.Adam as its authors do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import twin_bench
from tests.support.matrices import MATRICES, random_experts
from twin_bench import InputError
from twin_bench.merging.methods.wudi import gram_factors
from twin_bench.merging.spectral import rounding


def loss(merged: Tensor, taus: Tensor) -> Tensor:
    interference = (merged - taus) @ taus.mT
    return (interference.square().sum(dim=(1, 2)) / taus.square().sum(dim=(1, 2))).sum()


def minimised(taus: Tensor, learning_rate: float, steps: int) -> Tensor:
    merged = torch.nn.Parameter(taus.sum(dim=0))
    adam = torch.optim.Adam([merged], lr=learning_rate)
    for _ in range(steps):
        adam.zero_grad()
        loss(merged, taus).backward()
        adam.step()
    return merged.detach()


def stacked(base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([expert[name].double() - base[name].double() for expert in experts.values()])


@pytest.mark.parametrize(("learning_rate", "steps"), [(1e-5, 30), (2e-3, 80), (3e-2, 40)])
@pytest.mark.parametrize("rank", [None, 1, 2])
def test_is_autograds_adam(rank: int | None, learning_rate: float, steps: int) -> None:
    """Full rank takes one product a step; rank 1 and 2 of three experts two thin ones (on most shapes)."""
    base, experts = random_experts(3, rank=rank, dtype=torch.float64)
    merged = twin_bench.merge("wudi", base, experts, learning_rate=learning_rate, steps=steps, scaling=0.7)
    for name in MATRICES:
        expected = base[name] + 0.7 * minimised(stacked(base, experts, name), learning_rate, steps)
        torch.testing.assert_close(merged[name], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 2])
def test_lower_precisions_stay_close(rank: int | None, dtype: torch.dtype) -> None:
    base, experts = random_experts(4, rank=rank, dtype=dtype, seed=1)
    merged = twin_bench.merge("wudi", base, experts, learning_rate=5e-3, steps=100)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for name in MATRICES:
        expected = base[name].double() + minimised(stacked(base, experts, name), 5e-3, 100)
        assert merged[name].dtype is dtype
        torch.testing.assert_close(merged[name].double(), expected, rtol=tolerance, atol=tolerance)


def test_experts_of_low_rank_end_without_interference() -> None:
    """Three experts of rank 2 read six directions of 12 inputs and more: one tau can agree with all of them."""
    base, experts = random_experts(3, rank=2, dtype=torch.float64)
    merged = twin_bench.merge("wudi", base, experts, learning_rate=1e-2, steps=1000)
    for name in MATRICES:
        taus = stacked(base, experts, name)
        assert loss(merged[name] - base[name], taus) < 1e-4 * loss(taus.sum(dim=0), taus)


@pytest.mark.parametrize("shape", [(80, 64), (64, 80)])
def test_lora_experts_take_two_thin_products_a_step(shape: tuple[int, int]) -> None:
    """Three experts of rank 2 have six inputs; float32's rounding of the parameters they were added to has the rest."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    moves = [
        torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator) for _ in "abc"
    ]
    experts = {f"task{index}": {"w": base + (index + 1) * move} for index, move in enumerate(moves)}
    taus = torch.stack([expert["w"] - base for expert in experts.values()])
    norms = [float(tau.norm()) for tau in taus]
    X, transposed = gram_factors("w", list(taus), norms, noise=rounding(base, taus))
    assert X is not None
    assert X.shape == (shape[1], 6)
    units = [tau / norm for tau, norm in zip(taus, norms, strict=True)]
    torch.testing.assert_close(X @ transposed, sum(unit.T @ unit for unit in units), rtol=1e-4, atol=1e-5)
    merged = twin_bench.merge("wudi", {"w": base}, experts, learning_rate=5e-3, steps=100)["w"]
    torch.testing.assert_close(merged.double(), base.double() + minimised(taus.double(), 5e-3, 100), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_that_cancel_leave_the_base(dtype: torch.dtype) -> None:
    """Adam moves by its learning rate whatever the size of a gradient: there must be none."""
    base, experts = random_experts(1, dtype=dtype)
    base = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    opposite = {name: -tensor for name, tensor in experts["task0"].items()}
    merged = twin_bench.merge("wudi", base, {**experts, "opposite": opposite}, learning_rate=1.0, steps=20)
    assert all(torch.equal(merged[name], base[name]) for name in MATRICES)


def test_without_steps_it_is_task_arithmetic() -> None:
    base, experts = random_experts(3)
    merged = twin_bench.merge("wudi", base, experts, steps=0, scaling=0.4)
    summed = twin_bench.merge("task_arithmetic", base, experts, scaling=0.4)
    for name in MATRICES:
        torch.testing.assert_close(merged[name], summed[name])


def test_one_expert_comes_back_whatever_the_steps() -> None:
    base, experts = random_experts(1)
    for name, found in twin_bench.merge("wudi", base, experts, learning_rate=1.0, steps=50).items():
        torch.testing.assert_close(found, experts["task0"][name])


def test_equal_experts_come_back_once_converged() -> None:
    """From three times tau down to tau, whose rows span the inputs: no other has no interference with it."""
    base, experts = random_experts(1, dtype=torch.float64, size=0.1)
    merged = twin_bench.merge("wudi", base, dict.fromkeys("abc", experts["task0"]), learning_rate=1e-2, steps=500)
    torch.testing.assert_close(merged["tall"], experts["task0"]["tall"], rtol=0, atol=1e-3)


def test_an_expert_that_left_a_matrix_alone_sets_no_condition_on_it() -> None:
    base, experts = random_experts(2, dtype=torch.float64)
    options = {"learning_rate": 1e-2, "steps": 20}
    with_idle = twin_bench.merge("wudi", base, {**experts, "idle": base}, **options)
    without = twin_bench.merge("wudi", base, experts, **options)
    for name in MATRICES:
        torch.testing.assert_close(with_idle[name], without[name])


def test_the_global_seed_is_neither_read_nor_moved() -> None:
    base, experts = random_experts(2)
    torch.manual_seed(0)
    first = twin_bench.merge("wudi", base, experts)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    again = twin_bench.merge("wudi", base, experts)
    assert all(torch.equal(first[name], again[name]) for name in base)
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"learning_rate": 0.0}, "wudi: learning_rate must be above 0, not 0.0"),
        ({"steps": -1}, "wudi: steps must be a whole number, 0 or more, not -1"),
        ({"steps": 2.5}, "wudi: steps must be a whole number, 0 or more, not 2.5"),
    ],
)
def test_refuses_options_out_of_range(options: dict[str, float], says: str) -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match=says):
        twin_bench.merge("wudi", base, experts, **options)


def test_steps_may_be_a_whole_float() -> None:
    base, experts = random_experts(2)
    found = twin_bench.merge("wudi", base, experts, steps=3.0)
    for name, expected in twin_bench.merge("wudi", base, experts, steps=3).items():
        assert torch.equal(found[name], expected)
