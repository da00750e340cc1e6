"""The joint basis of the experts' low-rank factors: the directions that they share, fewer than their columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WORTHWHILE = 0.7
"""A joint basis is used if it needs at most this fraction of the multiplications that the factors need for a token."""


class JointBasis(NamedTuple):
    """The factors of all experts, in J shared directions of the input and K shared directions of the output.

    Expert k adds x @ down @ cores[k] @ up to a layer's output, with down (n, J), cores (experts, J, K) and up (K, m).
    The factors themselves are down @ inner (n, R) and outer @ up (R, m), with inner (J, R) and outer (R, K).
    """

    down: Tensor
    inner: Tensor
    cores: Tensor
    outer: Tensor
    up: Tensor


def find_joint_basis(
    down: Tensor, up: Tensor, owner: Tensor, experts: int, *, noise: Callable[[], float]
) -> JointBasis | None:
    """Return the joint basis of all experts' factors, or None if there is no cheap and accurate one.

    T experts that are LoRA adapters of rank r differ from the shared expert in at most T * r directions. Each
    exclusive vector is truncated on its own, so the T truncations together can have more columns than directions.
    The basis represents the factors up to rounding. The result is None if the basis needs more than `WORTHWHILE` of
    the factors' multiplications, or if any expert's matrix would change by more than `noise`.

    Args:
        down: (n, R) factors that multiply the input, side by side. Those of half precision have no joint basis: they
            are rounded each on its own.
        up: (R, m) factors that multiply the result.
        owner: (R,) index of each column's expert.
        experts: The number of experts, T.
        noise: It returns the largest accepted error of an expert's matrix, as a Frobenius norm, and is asked only where
            a basis is cheap. The error should be of the size of the rounding errors of the weights that the experts
            change.
    """
    n, R, m = *down.shape, up.shape[1]
    if R == 0 or down.dtype.itemsize < 4:
        return None
    in_range = _range(down)
    if in_range.shape[1] > WORTHWHILE * R:
        return None
    out_range = _range(up.T)
    J, K = in_range.shape[1], out_range.shape[1]
    if J * n + K * m + J * K > WORTHWHILE * R * (n + m):
        return None
    inner, outer = in_range.T @ down.double(), up.double() @ out_range
    cores = torch.stack([inner[:, owner == k] @ outer[owner == k] for k in range(experts)])
    allowed = noise()
    # What the basis loses of down @ up is outside @ up + in_range @ inner @ beside, two orthogonal parts.
    outside, beside = down.double() - in_range @ inner, up.double() - outer @ out_range.T
    for k in range(experts):
        own = owner == k
        lost = product_norm(outside[:, own], up[own].double()), product_norm(inner[:, own], beside[own])
        if math.hypot(*lost) > allowed:
            return None
    return JointBasis(*(part.to(down).contiguous() for part in (in_range, inner, cores, outer, out_range.T)))


def product_norm(left: Tensor, right: Tensor) -> float:
    """Return the Frobenius norm of left @ right, for left (n, r) and right (r, m), computed in float64.

    The product is not formed: ||L R||^2 = sum((L^T L) * (R R^T)), which takes (n + m) r^2 multiplications in place of
    n m r.
    """
    left, right = left.double(), right.double()
    return math.sqrt(max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0))


def _range(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis (n, J) of the columns of an (n, R) matrix, in float64.

    That of a float32 matrix is computed from its Gram matrix, whose eigenvalues are the squared singular values:
    float64 tells those apart that float32 can hold.
    """
    exact, precision = matrix.double(), max(matrix.shape) * torch.finfo(matrix.dtype).eps
    columns = exact / exact.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)  # Small columns count, too.
    if matrix.dtype == torch.float64 or not columns.numel():
        U, S, _ = torch.linalg.svd(columns, full_matrices=False)
        return U[:, S[0] * precision < S] if S.numel() else U
    tall = columns.shape[0] > columns.shape[1]
    squares, vectors = torch.linalg.eigh(columns.T @ columns if tall else columns @ columns.T)
    kept = squares > squares[-1] * precision**2
    return columns @ (vectors[:, kept] / squares[kept].sqrt()) if tall else vectors[:, kept]
