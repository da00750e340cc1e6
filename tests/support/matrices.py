"""Random experts for golden tests: matrices of every kind, of full or low rank, and what the formulas read of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Parameters = dict[str, Tensor]
SHAPES = {"tall": (29, 12), "wide": (11, 31), "square": (17, 17), "vector": (23,), "kernel": (3, 4, 5)}
MATRICES = ("tall", "wide", "square")


def random_experts(
    count: int, *, rank: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 0.5
) -> tuple[Parameters, dict[str, Parameters]]:
    """Return a base and `count` experts whose task vectors are random, matrices of `rank` where it is given."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def task_vector(shape: tuple[int, ...]) -> Tensor:
        low = len(shape) == 2 and rank is not None
        return random(shape[0], rank or 0) @ random(rank or 0, shape[1]) if low else random(*shape)

    base = {name: random(*shape).to(dtype) for name, shape in SHAPES.items()}
    experts = {
        f"task{index}": {
            name: (base[name].double() + size * task_vector(shape)).to(dtype) for name, shape in SHAPES.items()
        }
        for index in range(count)
    }
    return base, experts


def deltas(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], name: str) -> list[np.ndarray]:
    """Return the task vectors of one parameter as float64 arrays."""
    return [(expert[name].double() - base[name].double()).numpy() for expert in experts.values()]


def assert_moved(found: Tensor, base: Tensor, delta: np.ndarray, *, loosened: float = 1) -> None:
    """Check that `found` is base + delta, to the rounding of its dtype, `loosened` times."""
    assert found.dtype is base.dtype
    tolerance = loosened * {torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-10}[found.dtype]
    expected = base.double() + torch.from_numpy(delta)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def ties_by_loops(flat: list[np.ndarray], density: float) -> np.ndarray:
    """Return TIES of one flat vector an expert, in numpy: trim, elect each entry's sign, mean of those that agree."""
    keep = int(density * flat[0].size)
    trimmed = [np.where(abs(row) >= np.sort(abs(row))[-keep], row, 0) for row in flat]
    merged = []
    for entries in zip(*trimmed, strict=True):
        agreeing = [entry for entry in entries if entry * sum(entries) > 0]
        merged.append(sum(agreeing) / max(1, len(agreeing)))
    return np.array(merged)
