"""OptMerge against its loss, differentiated by autograd and reduced by torch.optim.SGD as its authors do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import twin_bench
from tests.support.matrices import MATRICES, random_experts
from twin_bench import InputError


def truncated(tau: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return U S V^T and S V^T of the leading singular triplets."""
    U, S, Vh = torch.linalg.svd(tau, full_matrices=False)
    inputs = S[:kept, None] * Vh[:kept]
    return U[:, :kept] @ inputs, inputs


def reduced(taus: Tensor, learning_rate: float, momentum: float, steps: int) -> Tensor:
    pairs = [truncated(tau, min(tau.shape) // len(taus)) for tau in taus]
    merged = torch.nn.Parameter(taus.mean(dim=0))
    sgd = torch.optim.SGD([merged], lr=learning_rate, momentum=momentum)
    for _ in range(steps):
        sgd.zero_grad()
        terms = [
            ((merged - clean) @ inputs.T).square().sum() / tau.square().sum()
            for tau, (clean, inputs) in zip(taus, pairs, strict=True)
            if tau.any()
        ]
        torch.stack(terms).sum().backward()
        sgd.step()
    return merged.detach()


def stacked(base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([expert[name].double() - base[name].double() for expert in experts.values()])


@pytest.mark.parametrize(("learning_rate", "momentum", "steps"), [(1e-4, 0.9, 300), (3e-2, 0.5, 60), (0.2, 0.0, 9)])
@pytest.mark.parametrize("rank", [None, 1, 2])
def test_is_autograds_sgd(rank: int | None, learning_rate: float, momentum: float, steps: int) -> None:
    base, experts = random_experts(3, rank=rank, dtype=torch.float64)
    options = {"learning_rate": learning_rate, "momentum": momentum, "steps": steps}
    merged = twin_bench.merge("optmerge", base, experts, scaling=0.7, **options)
    for name in MATRICES:
        expected = base[name] + 0.7 * reduced(stacked(base, experts, name), learning_rate, momentum, steps)
        torch.testing.assert_close(merged[name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 2])
def test_lower_precisions_stay_close(rank: int | None, dtype: torch.dtype) -> None:
    base, experts = random_experts(4, rank=rank, dtype=dtype, seed=1)
    merged = twin_bench.merge("optmerge", base, experts, learning_rate=1e-2)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for name in MATRICES:
        expected = base[name].double() + reduced(stacked(base, experts, name), 1e-2, 0.9, 300)
        assert merged[name].dtype is dtype
        torch.testing.assert_close(merged[name].double(), expected, rtol=tolerance, atol=tolerance)


def test_without_steps_it_is_the_average() -> None:
    base, experts = random_experts(3)
    average = twin_bench.merge("average", base, experts)
    for name, found in twin_bench.merge("optmerge", base, experts, steps=0).items():
        torch.testing.assert_close(found, average[name])


def test_experts_that_read_inputs_of_their_own_all_come_back_once_converged() -> None:
    """Two experts of rank 2 over inputs that do not overlap: the mean halves each, the minimum has both whole."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(9, 8, dtype=torch.float64)}
    halves = [torch.randn(9, 2, generator=generator) @ torch.randn(2, 4, generator=generator) for _ in "ab"]
    one, other = (half.double() for half in halves)
    experts = {"a": {"w": torch.cat([one, 0 * one], dim=1)}, "b": {"w": torch.cat([0 * other, other], dim=1)}}
    merged = twin_bench.merge("optmerge", base, experts, learning_rate=0.1, steps=2000)["w"]
    torch.testing.assert_close(merged, torch.cat([one, other], dim=1), rtol=1e-6, atol=1e-6)


def test_an_expert_that_left_a_matrix_alone_sets_no_condition_on_it() -> None:
    base, experts = random_experts(2, dtype=torch.float64)
    merged = twin_bench.merge("optmerge", base, {**experts, "idle": base}, learning_rate=1e-2)
    for name in MATRICES:
        expected = base[name] + reduced(stacked(base, {**experts, "idle": base}, name), 1e-2, 0.9, 300)
        torch.testing.assert_close(merged[name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0, not 0.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), not 1.0"),
        ({"steps": 2.5}, "steps must be a whole number, 0 or more, not 2.5"),
    ],
)
def test_refuses_options_out_of_range(options: dict[str, float], says: str) -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match=f"optmerge: {says}"):
        twin_bench.merge("optmerge", base, experts, **options)
