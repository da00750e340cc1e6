"""A low-rank matrix as the product of two factors."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Factors(NamedTuple):
    """A matrix B @ A of rank r, with B of shape (m, r) and A of shape (r, n).

    The factors of a truncated SVD U S V^T are B = U sqrt(S) and A = sqrt(S) V^T.
    """

    B: Tensor
    A: Tensor


def padded(factors: Factors, rank: int) -> Factors:
    """Return the same product with `rank` columns in B and rows in A. What is added is 0. `rank` is no smaller."""
    more = rank - len(factors.A)
    return Factors(F.pad(factors.B, (0, more)), F.pad(factors.A, (0, 0, 0, more)))
