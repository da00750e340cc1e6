"""Exclusive vectors: v_t = SVD_r(theta_t - theta_s) of each matrix; 1-D tensors pass through unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.singular import of_low_rank, product, right_singular, rows_of

FULL_SVD_OPERATIONS = 10**10
"""m * n * min(m, n) up to which the Gram matrix is decomposed: about half a second on two cores."""


class Factors(NamedTuple):
    """A matrix as B @ A: B = U sqrt(S) of shape (m, r), A = sqrt(S) V^T of shape (r, n)."""

    B: Tensor
    A: Tensor


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


def truncated_svd(matrix: Tensor, rank: int, *, seed: int = 0) -> Factors:
    """Return the best rank-`rank` approximation of an (m, n) matrix as factors.

    A matrix of low rank, such as a LoRA expert's, is recognised: where a sketch of it leaves nothing but rounding,
    the sketch's singular vectors are the matrix's own. Else they are the eigenvectors of its Gram matrix up to
    FULL_SVD_OPERATIONS; beyond, those of torch.svd_lowrank in the matrix's own precision with 16 columns of
    oversampling and 4 power iterations, whose error was within 0.4% of the optimum on slowly decaying spectra
    (4096 x 4096, rank 8: 0.24 s against 11 s). Singular values below the matrix's rounding error are dropped, so a
    LoRA expert's delta keeps no more columns than it has.

    Returns the factors in the matrix's dtype, float32 at least.
    """
    matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    if matrix.shape[0] < matrix.shape[1]:  # the Gram matrix is that of the smaller side
        B, A = truncated_svd(matrix.T, rank, seed=seed)
        return Factors(A.T.contiguous(), B.T.contiguous())
    noise = partial(_noise, shape=matrix.shape, dtype=matrix.dtype)
    rows = rows_of(matrix)
    found = of_low_rank(rows, 2 * rank + 16, seed=seed, noise=noise) if rank else None
    if found is None and matrix.numel() * min(matrix.shape) <= FULL_SVD_OPERATIONS:
        found = right_singular(rows)
    elif found is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, S, V = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
        found = S.double(), V.double()
    S, V = found
    rank = min(rank, int((noise(S) < S).sum())) if S.numel() and S[0] > 0 else 0
    root, V = S[:rank].sqrt(), V[:, :rank]
    return Factors(product(rows, V / root, matrix.dtype), (root * V).T.to(matrix).contiguous())


def _noise(S: Tensor, shape: torch.Size, dtype: torch.dtype) -> float:
    """Return the singular value up to which a matrix of a dtype is rounding: as numpy's matrix_rank has it."""
    return float(S[0]) * max(shape) * torch.finfo(dtype).eps


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
