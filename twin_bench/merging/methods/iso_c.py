"""Iso-C (Marczak et al., 2025): task arithmetic with a flat spectrum."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from twin_bench.merging.registry import SCALINGS, merge_method
from twin_bench.merging.spectral import isotropic, merged_by_matrix, svd
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="Iso-C", paper="arXiv:2502.04959", track="data-free", tune=SCALINGS)
def iso_c(vectors: TaskVectors, *, scaling: float = 1.0) -> Mapping[str, Tensor]:
    """theta_0 + scaling * mean(S) U V^T, where U diag(S) V^T is the SVD of sum_t tau_t, matrix by matrix.

    Other tensors take the mean. `scaling` is the paper's alpha. The authors choose it on validation rows; 1 is the
    value in their code before that choice.

    The SVD is cut at the rank of the sum. If that is min(m, n), as with full fine-tuning, this is the authors' code and
    FusionBench's. For sums of lower rank (LoRA) their mean is over min(m, n) values, most of them zero. They give it to
    min(m, n) directions, most of which are arbitrary vectors that an SVD returns for a singular value of zero. Their
    result is then rounding error: two float32 copies of the same experts give different merges. Here the mean is over
    the directions that the experts have. That is Iso-C in Core Space (arXiv:2509.17786), the lossless joint basis of
    the LoRA experts.
    """

    def merge(name: str, taus: Tensor, rounding: float) -> Tensor:
        return isotropic(*svd(taus.sum(dim=0), name, above=rounding))

    return merged_by_matrix(vectors, merge, scaling=scaling)
