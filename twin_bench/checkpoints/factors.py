"""A low-rank matrix as the product of two factors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Factors(NamedTuple):
    """A matrix B @ A of rank r, with B of shape (m, r) and A of shape (r, n).

    The factors of a truncated SVD U S V^T are B = U sqrt(S) and A = sqrt(S) V^T.
    """

    B: Tensor
    A: Tensor
