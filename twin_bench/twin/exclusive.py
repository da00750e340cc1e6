"""Exclusive vectors: v_t = SVD_r(theta_t - theta_s) of each matrix; 1-D tensors pass through unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from twin_bench.errors import InputError

FULL_SVD_OPERATIONS = 10**10
"""m * n * min(m, n) up to which the full SVD is taken: about a second on two cores."""


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
    the sketch's SVD is the matrix's own. Else the full (economy) SVD in float64 up to FULL_SVD_OPERATIONS, since
    float32 turns the kept subspace where the singular values at the cut lie close; beyond, torch.svd_lowrank in
    the matrix's own precision with 16 columns of oversampling and 4 power iterations, whose error was within 0.4%
    of the optimum on slowly decaying spectra (4096 x 4096, rank 8: 0.24 s against 11 s). Singular values below the
    matrix's rounding error are dropped, so a LoRA expert's delta keeps no more columns than it has.

    Returns the factors in the matrix's dtype, float32 at least.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if matrix.shape[0] < matrix.shape[1]:  # LAPACK takes several times as long for a wide matrix
        B, A = truncated_svd(matrix.T, rank, seed=seed)
        return Factors(A.T.contiguous(), B.T.contiguous())
    sketched = _svd_of_sketch(matrix.double(), min(2 * rank + 16, *matrix.shape), seed) if rank else None
    if sketched is not None:
        U, S, Vh = sketched
    elif matrix.numel() * min(matrix.shape) <= FULL_SVD_OPERATIONS:
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
        Vh = V.T
    rank = min(rank, int((_noise(S, matrix) < S).sum())) if S.numel() and S[0] > 0 else 0
    root = S[:rank].sqrt()
    B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return Factors(B.to(matrix.dtype).contiguous(), A.to(matrix.dtype).contiguous())


def _svd_of_sketch(matrix: Tensor, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return U, S, Vh of an (m, n) matrix whose rank is below `columns`, None of any other.

    Its range is that of its product with `columns` random vectors (Halko et al., arXiv 0909.4061).
    """
    if 2 * columns > min(matrix.shape):  # then the full SVD costs as little
        return None
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(matrix.shape[1], columns, dtype=matrix.dtype, generator=generator)
    Q = torch.linalg.qr(matrix @ random.to(matrix.device)).Q
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    rest = matrix - Q @ (Q.T @ matrix)
    if rest.norm() > _noise(S, matrix.float()):
        return None
    return Q @ U, S, Vh


def _noise(S: Tensor, matrix: Tensor) -> Tensor:
    """Return the singular value up to which a matrix of its dtype is rounding: as numpy's matrix_rank has it."""
    return S[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps


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
        InputError: density or rank out of range; a tensor of three or more dimensions that differs.
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
            kept = truncated_svd(difference, exclusive_rank(base.shape, density=density, rank=rank), seed=seed)
            if kept.A.shape[0]:
                factors[name] = kept
        else:
            raise InputError(f"tensor {name} has {difference.ndim} dimensions: a twin fuses matrices and vectors")
    return Exclusive(factors, vectors)
