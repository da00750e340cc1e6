"""TSV-Merge (Gargiulo et al., 2025): the leading singular vectors of every task, made orthogonal to one another."""

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

    Each matrix tau_t (m, n) keeps its k = min(m, n) // T largest singular values and their vectors. U = polar([U_1 ..
    U_T]) and V = polar([V_1 .. V_T]), where polar(X) is the matrix with orthonormal columns nearest to X. Other tensors
    take the mean. A matrix with fewer than T singular values has k = 0 and stays the base's, as in the authors' code.
    At scaling 1 a single expert comes back, and so do equal experts whose rank is at most k.

    The paper, the authors' code and FusionBench agree with this on task vectors of rank k and more. On lower ranks
    (LoRA) the authors and FusionBench also orthogonalise against the arbitrary vectors that an SVD returns for singular
    values of zero, so their result depends on rounding error. Here such vectors take no part. That is TSV-M in Core
    Space (arXiv:2509.17786), the lossless joint basis of the LoRA experts. The authors leave out CLIP's
    text_projection; the models here have none.
    """

    def merge(name: str, taus: Tensor, rounding: float) -> Tensor:
        kept = min(taus.shape[1:]) // len(taus)
        tasks = [svd(tau, name, above=rounding, most=kept) for tau in taus]
        U, S, V = (torch.cat(factors, dim=-1) for factors in zip(*tasks, strict=True))
        del tasks
        if 4 * len(S) > min(taus.shape[1:]):  # one task's factors may be float64, all tasks' take too much memory
            U, S, V = U.to(taus), S.to(taus), V.to(taus)
        U = polar(U, name)
        V = polar(V, name)
        return U.mul_(S) @ V.T

    return merged_by_matrix(vectors, merge, scaling=scaling)
