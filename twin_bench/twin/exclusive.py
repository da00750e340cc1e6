"""Exclusive vectors: v_t = SVD_r(theta_t - theta_s) of each matrix; 1-D tensors pass through unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.errors import InputError
from twin_bench.merging.linear_algebra import truncated_svd


@dataclass(frozen=True)
class Exclusive:
    """One expert's exclusive vector by parameter name: matrices as factors, 1-D tensors whole."""

    factors: Mapping[str, Factors]
    vectors: Mapping[str, Tensor]


def exclusive_rank(shape: torch.Size, *, density: float | None = None, rank: int | None = None) -> int:
    """Return the rank kept of an (m, n) matrix: int(density * min(m, n)), or `rank` capped by min(m, n).

    As in the paper a density can round down to 0 (0.1 of a 2 x 768 token-type embedding): nothing is kept.
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
        expert: theta_t, name to tensor.
        shared: theta_s under the same names; its floating-point tensors count.
        density: kept fraction of each matrix's rank, or
        rank: kept rank.
        seed: of the randomised SVD.

    Returns:
        float32 (or better) factors and vectors; what does not differ is left out.

    Raises:
        InputError: density or rank out of range; a tensor of three or more dimensions that differs, or one whose
            difference can't be decomposed (it is not finite, say).
    """
    factors: dict[str, Factors] = {}
    vectors: dict[str, Tensor] = {}
    for name, base in shared.items():
        if not base.is_floating_point():
            continue
        exact = torch.promote_types(base.dtype, torch.float32)
        difference = expert[name].to(exact) - base.to(exact)
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
                    f"tensor {name}: its difference can't be decomposed ({error}); mend the expert"
                ) from None
            if kept.A.shape[0]:
                factors[name] = kept
        else:
            raise InputError(f"tensor {name} has {difference.ndim} dimensions: a twin fuses matrices and vectors")
    return Exclusive(factors, vectors)
