"""DARE (Yu et al., 2024): drop task-vector entries at random, rescale the rest, then merge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.merging.methods.task_arithmetic import task_arithmetic
from twin_bench.merging.methods.ties import ties
from twin_bench.merging.registry import SCALINGS, merge_method, require_fraction
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(
    title="DARE + task arithmetic",
    paper="arXiv:2311.03099",
    track="data-free",
    needs=("seed",),
    tune=SCALINGS,
)
def dare_task_arithmetic(
    vectors: TaskVectors, *, scaling: float = 0.3, density: float = 0.3, seed: int = 0
) -> Mapping[str, Tensor]:
    """Task arithmetic on tau_t * Bernoulli(density) / density; the paper's drop rate is 1 - density."""
    return task_arithmetic(drop_and_rescale(vectors, density, seed), scaling=scaling)


@merge_method(
    title="DARE + TIES",
    paper="arXiv:2311.03099",
    track="data-free",
    needs=("seed",),
    tune=SCALINGS,
)
def dare_ties(
    vectors: TaskVectors, *, scaling: float = 1.0, density: float = 0.3, trim: float = 1.0, seed: int = 0
) -> Mapping[str, Tensor]:
    """TIES' sign election and disjoint mean on tau_t * Bernoulli(density) / density.

    The random drop takes the place of TIES' trimming, as in peft and mergekit; the authors' code trims as
    well, which `trim` (the fraction TIES keeps after the drop) gives back.
    """
    return ties(drop_and_rescale(vectors, density, seed), scaling=scaling, density=trim)


def drop_and_rescale(vectors: TaskVectors, density: float, seed: int) -> TaskVectors:
    """Keep each entry with probability `density` and divide what is kept by it.

    The draw of a tensor depends on the seed, its name and the expert's name alone: neither the order of
    experts nor of parameters changes it, and reading it twice gives the same.
    """
    require_fraction("dare", "density", density)

    def drop(name: str, taus: Tensor) -> Tensor:
        kept = torch.stack([draws(seed, task, name, taus.shape[1:]) < density for task in vectors.experts])
        return torch.where(kept, taus, 0.0).div_(density)

    return vectors.map(drop)


def draws(seed: int, task: str, name: str, shape: torch.Size) -> Tensor:
    """Return uniform draws from [0, 1) that depend on nothing but these arguments."""
    digest = hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(shape, generator=generator)
