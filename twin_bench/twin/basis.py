"""The joint basis: what experts' low-rank factors share, in fewer columns than they have side by side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORTHWHILE = 0.7
"""A joint basis is kept where a token's products with it take at most this part of those with all columns."""


class JointBasis(NamedTuple):
    """Factors in the directions that they share, J of the input's and K of the output's.

    Expert k's share of a layer is x -> x @ down @ cores[k] @ up, with down (n, J), cores (experts, J, K), up (K, m).
    The factors themselves are down @ inner and outer @ up, with inner (J, R) and outer (R, K).
    """

    down: Tensor
    inner: Tensor
    cores: Tensor
    outer: Tensor
    up: Tensor


def find_joint_basis(down: Tensor, up: Tensor, owner: Tensor, experts: int, *, noise: float) -> JointBasis | None:
    """Return a joint basis of factors side by side, None where it would cost as much as they do.

    Experts of LoRA rank r over one shared expert differ from it within the T r directions of all of them, and
    each keeps a truncation of its own: T truncations have more columns than directions. Nothing is lost but
    rounding: None also where some expert's product would differ by more than `noise`.

    Args:
        down: (n, R), what the input meets first; in float32 at least.
        up: (R, m).
        owner: (R,) expert of each column.
        experts: T.
        noise: the Frobenius norm of a difference that is rounding: that of the weights which the experts change.
    """
    n, R, m = *down.shape, up.shape[1]
    if R == 0:
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
    for k in range(experts):
        own = owner == k
        lost = down[:, own].double() @ up[own].double() - in_range @ cores[k] @ out_range.T
        if lost.norm() > noise:
            return None
    return JointBasis(*(part.to(down).contiguous() for part in (in_range, inner, cores, outer, out_range.T)))


def _range(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis (n, J) of the columns of an (n, R) matrix, in float64."""
    exact = matrix.double()
    columns = exact / exact.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)  # small columns count as well
    U, S, _ = torch.linalg.svd(columns, full_matrices=False)
    precision = torch.finfo(matrix.dtype).eps
    return U[:, S[0] * max(matrix.shape) * precision < S] if S.numel() else U
