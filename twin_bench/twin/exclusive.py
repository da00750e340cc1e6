"""Exclusive vectors: v_t = SVD_r(theta_t - theta_s) for each matrix. Differences of 1-D tensors are kept unchanged.

The method is that of Twin-Merging (arXiv:2406.15479).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.finite import require_no_overflow, require_weights
from twin_bench.errors import InputError
from twin_bench.merging.linear_algebra import truncated_svd


@dataclass(frozen=True)
class Exclusive:
    """One expert's exclusive vector, by parameter name: `factors` of matrices, and `vectors`, the 1-D tensors."""

    factors: Mapping[str, Factors]
    vectors: Mapping[str, Tensor]


def exclusive_rank(shape: torch.Size, *, density: float | None = None, rank: int | None = None) -> int:
    """Return the rank to which an (m, n) matrix is truncated: int(density * min(m, n)), or min(rank, m, n).

    As in the paper, a density can give rank 0 (0.1 for a 2 x 768 token-type embedding). Then nothing of the matrix's
    difference is kept. InputError unless exactly one of `density` and `rank` is given and is in range.
    """
    if (density is None) == (rank is None):
        raise InputError("exclusive: give either density or rank")
    if density is not None:
        if not 0 < density <= 1:
            raise InputError(f"exclusive: density must be in (0, 1], not {density}")
        return int(density * min(shape))
    assert rank is not None
    if rank < 1:
        raise InputError(f"exclusive: rank must be at least 1, not {rank}")
    return min(rank, *shape)


def exclusive_vector(
    expert: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    *,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> Exclusive:
    """Return v_t of one expert over the shared expert, parameter by parameter.

    Args:
        expert: The expert's parameters theta_t, by name.
        shared: The shared expert's parameters theta_s, under the same names. Only floating-point tensors are compared.
        density: The fraction of each matrix's rank that is kept. Give either a density or a rank.
        rank: The rank that is kept.
        seed: The seed of the randomised SVD.

    Returns:
        Factors and vectors in float32, or in float64 for float64 parameters. Equal parameters are left out.

    Raises:
        InputError: Density or rank is out of range, a tensor holds NaN or inf, a tensor of three or more dimensions
            differs, or the SVD of a difference fails.
    """
    factors: dict[str, Factors] = {}
    vectors: dict[str, Tensor] = {}
    for name, base in shared.items():
        if not base.is_floating_point():
            continue
        exact = torch.promote_types(base.dtype, torch.float32)
        theirs = require_weights(expert[name], name, "expert")
        difference = theirs.to(exact) - require_weights(base, name, "shared expert").to(exact)
        require_no_overflow(difference, name, "exclusive vectors")
        if not difference.any():
            continue
        if difference.ndim == 1:
            vectors[name] = difference
        elif difference.ndim == 2:
            limit = exclusive_rank(base.shape, density=density, rank=rank)
            try:
                kept = truncated_svd(difference, limit, seed=seed)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise InputError(
                    f"tensor {name}: the SVD of its difference fails ({error}); correct the expert"
                ) from None
            if kept.A.shape[0]:
                factors[name] = kept
        else:
            raise InputError(f"tensor {name} has {difference.ndim} dimensions: a twin fuses matrices and vectors")
    return Exclusive(factors, vectors)
