"""The largest entries of each matrix's difference."""

from __future__ import annotations

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.twin.exclusive.forms import Exclusive, ExpertDifferences
from twin_bench.twin.exclusive.registry import exclusive_kind
from twin_bench.twin.exclusive.sparse import Sparse


@exclusive_kind(title="Largest entries", paper="arXiv:2406.15479")
def magnitude(differences: ExpertDifferences, *, density: float) -> Exclusive:
    """Of each matrix, the int(density * m n) entries of the largest absolute value, stored with their positions.

    Of equal entries the first ones are kept.
    """
    require_density("magnitude", density)
    kept = {name: Sparse.of(matrix, largest(matrix, density)) for name, matrix in differences.matrices()}
    return Exclusive({}, differences.vectors, {name: one for name, one in kept.items() if one.count})


def largest(matrix: Tensor, density: float) -> Tensor:
    """Return a bool mask (m, n) of the int(density * m n) largest absolute values, entries equal to 0 left out."""
    sizes = matrix.abs().flatten()
    count = min(int(density * sizes.numel()), int(sizes.count_nonzero()))
    if not count:
        return torch.zeros_like(matrix, dtype=torch.bool)
    threshold = sizes.kthvalue(sizes.numel() - count + 1).values
    kept = sizes > threshold
    equal = (sizes == threshold).nonzero().squeeze(1)
    kept[equal[: count - int(kept.sum())]] = True
    return kept.view_as(matrix)


def require_density(kind: str, density: float) -> None:
    """Raise an InputError unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise InputError(f"exclusive: density of kind {kind} must be in (0, 1], not {density}")
