"""TSV-Merge (Gargiulo et al., 2025): every task's leading singular vectors, made orthogonal to one another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.merging.registry import SCALINGS, merge_method
from twin_bench.merging.spectral import merged_by_matrix, polar, svd
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="TSV-M", paper="arXiv:2412.00081", track="data-free", tune=SCALINGS)
def tsv_m(vectors: TaskVectors, *, scaling: float = 1.0) -> Mapping[str, Tensor]:
    """theta_0 + scaling * U diag(S_1..S_T) V^T: each task's first 1/T singular triplets, U and V orthogonalised.

    Of each matrix tau_t (m, n) the k = min(m, n) // T largest singular values and their vectors are kept;
    U = polar([U_1 .. U_T]), V = polar([V_1 .. V_T]), polar(X) being the matrix with orthonormal columns nearest
    to X. Other tensors take the mean. A matrix with fewer than T singular values has no share for anybody and
    stays the base's, as in the authors' code. One expert at scaling 1 comes back, and so do equal experts whose rank
    is at most k.

    The paper and the authors' code agree with this and with FusionBench on task vectors of rank k and more. On
    those of lower rank (LoRA) theirs also orthogonalise against the arbitrary vectors that an SVD returns for singular
    values of zero; here such vectors take no part. The authors leave CLIP's text_projection out; there is none here.
    """

    def merge(name: str, taus: Tensor, rounding: float) -> Tensor:
        kept = min(taus.shape[1:]) // len(taus)
        tasks = [svd(tau, name, above=rounding, most=kept) for tau in taus]
        U, S, V = (torch.cat(factors, dim=-1) for factors in zip(*tasks, strict=True))
        del tasks
        if 4 * len(S) > min(taus.shape[1:]):  # in float64 each by itself, too many together
            U, S, V = U.to(taus), S.to(taus), V.to(taus)
        U = polar(U, name)
        V = polar(V, name)
        return U.mul_(S) @ V.T

    return merged_by_matrix(vectors, merge, scaling=scaling)
