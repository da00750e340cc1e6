"""Random drops of task-vector entries (DARE, Yu et al., 2024), the same on every machine for the same seed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from twin_bench.merging.registry import require_fraction
from twin_bench.merging.task_vectors import TaskVectors


def drop_and_rescale(vectors: TaskVectors, density: float, seed: int) -> TaskVectors:
    """Keep each entry with probability `density`, and divide kept entries by `density`.

    The draws of a tensor depend on the seed, its name and the expert's name alone. They do not depend on the order of
    experts or parameters, and a second read draws the same.
    """
    require_fraction("dare", "density", density)

    def drop(name: str, taus: Tensor) -> Tensor:
        kept = torch.stack([draws(seed, task, name, taus.shape[1:]) < density for task in vectors.experts])
        return torch.where(kept.to(taus.device), taus, 0.0).div_(density)

    return vectors.map(drop)


def draws(seed: int, task: str, name: str, shape: torch.Size) -> Tensor:
    """Return uniform draws from [0, 1), on the CPU, that depend on these arguments alone."""
    return torch.rand(shape, generator=generator_of(seed, task, name))


def generator_of(seed: int, *names: str) -> torch.Generator:
    """Return a generator on the CPU whose draws depend on the seed and the names alone."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
