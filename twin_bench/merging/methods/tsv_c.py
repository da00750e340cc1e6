"""TSV-Compress (Gargiulo et al., 2025): each task keeps its own leading singular vectors, and is told at inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from twin_bench.merging.registry import merge_method
from twin_bench.merging.spectral import rounding, svd
from twin_bench.merging.task_vectors import TaskVectors


def stored_bytes(shapes: Sequence[torch.Size], experts: int, itemsize: int) -> int:
    """Return how many bytes are stored: theta_0, and for each expert two factors a matrix and all other tensors whole.

    A matrix (m, n) counts k (m + n) numbers whatever the rank of the experts, k = min(m, n) // T.
    """
    parameters = sum(shape.numel() for shape in shapes)
    factors = sum(
        min(shape.numel(), min(shape) // experts * sum(shape)) if len(shape) == 2 else shape.numel() for shape in shapes
    )
    return itemsize * (parameters + experts * factors)


@merge_method(
    title="TSV-C",
    paper="arXiv:2412.00081",
    track="task-id given",
    needs=("the task of each input",),
    stored=stored_bytes,
)
def tsv_c(vectors: TaskVectors, *, task: str) -> Mapping[str, Tensor]:
    """theta_0 + U_k diag(S_k) V_k^T, the parameters of task t: the k = min(m, n) // T leading triplets of tau_t's SVD.

    Tensors that are no matrix are the expert's own. A matrix with fewer than T singular values has k = 0 and stays the
    base's, as in `tsv_m`, which merges the same triplets. A LoRA expert of rank k or less comes back whole.

    Raises InputError unless `task` is one of the experts.
    """
    row = vectors.experts.index(task)

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        tau = taus[row]
        if base.ndim != 2 or not tau.any():
            return base + tau
        U, S, V = svd(tau, name, above=rounding(base, taus), most=min(tau.shape) // len(taus))
        return base + (U * S @ V.T).to(base)

    return vectors.merged(merge)
