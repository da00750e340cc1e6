"""Subspace Boosting (Skorobogat et al., 2025): lift the small singular values of a merge, so that its rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from twin_bench.merging.registry import MergeMethod, find_method, merge_method, require_fraction
from twin_bench.merging.spectral import rounding, svd
from twin_bench.merging.task_vectors import Merged, TaskVectors


@merge_method(title="Subspace Boosting", paper="arXiv:2506.16506", track="data-free")
def subspace_boosting(
    vectors: TaskVectors, *, merge: str = "task_arithmetic", threshold: float = 0.01, **options: Any
) -> Mapping[str, Tensor]:
    """theta_0 + U max(S, S_k) V^T, where U diag(S) V^T is the SVD of another merge's task vector, matrix by matrix.

    `merge` names that merge, which must be data-free, and `options` are its options. S_k is the first singular value at
    which the sum of S_1 .. S_k reaches `threshold` of the sum of all. All smaller ones are lifted to it. Tensors of
    other dimensions are the merge's. Lifting makes a task vector longer, so the `scaling` of the merge wants to be
    smaller than it is alone.

    The default threshold is that of the authors' code. The largest singular value alone often exceeds 0.01 of the sum,
    and then all others are lifted to it. The authors lift the matrices of attention and MLP blocks, and each of query,
    key and value by itself; here all matrices are lifted. The SVD is cut at the rank of the merge. For LoRA experts
    that is below min(m, n), and the authors' code also lifts the arbitrary vectors that an SVD returns for singular
    values of zero.
    """
    require_fraction("subspace_boosting", "threshold", threshold)
    inner = cast(MergeMethod, find_method(merge))  # MergeMethod.given rejects other kinds
    merged = cast(Merged, inner.function(vectors, **options))

    def lift(name: str, base: Tensor, theta: Tensor) -> Tensor:
        if base.ndim != 2:
            return theta
        tau = theta - base
        U, S, V = svd(tau, name, above=rounding(base, tau))
        if not len(S):
            return theta
        sums = S.cumsum(dim=0)
        cut = int((sums < threshold * sums[-1]).sum())
        return base + (U * S.clamp(min=float(S[cut])) @ V.T).to(base)

    return merged.map(lift)
