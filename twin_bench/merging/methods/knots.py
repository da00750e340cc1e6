"""KnOTS (Stoica et al., 2025): TIES after a joint SVD has aligned the experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.merging.elections import disjoint_mean, trim, trim_thresholds
from twin_bench.merging.linear_algebra import product, rows_of
from twin_bench.merging.registry import SCALINGS, merge_method, require_fraction
from twin_bench.merging.spectral import decompose, rounding, sketch_size
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="KnOTS-TIES", paper="arXiv:2410.19735", track="data-free", tune=SCALINGS)
def knots(vectors: TaskVectors, *, scaling: float = 0.6, density: float = 0.2) -> Mapping[str, Tensor]:
    """theta_0 + scaling * U TIES(A_1 .. A_T): TIES on right factors over a joint basis, A_t = diag(S) V_t^T.

    [tau_1 .. tau_T] = U diag(S) [V_1^T .. V_T^T] is the SVD of the task vectors side by side, an (m, T n) matrix for
    each (m, n) parameter, cut at its rank; so A_t = U^T tau_t, (rank, n). Then as in `ties`: each expert keeps
    its `density` largest entries over the whole model, the sign of the sum is elected, the mean is over what agrees.
    Tensors of other dimensions are trimmed and merged as they are; what no expert changed takes no part.

    A matrix is read as torch.nn.Linear's, m the outputs. Experts of any rank will do, but LoRA's are what the
    method is for: at full rank U is a mere rotation of all outputs. One expert, or equal ones, come back at scaling 1
    and density 1.

    Defaults are the authors' for CLIP ViT-B/32 (0.5 for ViT-L/14; 0.5 and density 1 for Llama 3 8B); they choose
    scaling on validation rows. Their code cuts singular values at 1e-5, FusionBench's at 1e-4, here it is where
    rounding begins. An entry whose sum is exactly 0 takes the model's majority sign in their code and is dropped here,
    as in `ties`. They have LoRA matrices alone in mind and leave others pretrained unless told to merge them by TIES.
    """
    require_fraction("knots", "density", density)

    def aligned(name: str, taus: Tensor) -> Tensor:
        return align(name, vectors.base[name], taus)[1] if taus.any() else taus.new_zeros(len(taus), 0)

    thresholds = trim_thresholds(vectors.map(aligned), density)

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        if not taus.any():
            return base
        U, factors = align(name, base, taus)
        merged = disjoint_mean(trim(factors, thresholds))
        return base + scaling * (merged if U is None else U @ merged)

    return vectors.merged(merge)


def align(name: str, base: Tensor, taus: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return the joint basis U (m, r) of matrices tau (T, m, n), and A_t = U^T tau_t (T, r, n); None and tau of others.

    U is that of the SVD of [tau_1 .. tau_T]. A direction of which an expert has but rounding is 0 in its A_t, lest
    the signs of rounding vote. A_t takes the memory of tau.
    """
    if taus.ndim != 3:
        return None, taus
    noise = rounding(base, taus)
    U = _joint_basis(name, taus, noise)
    factors = taus[:, : U.shape[1]]
    for factor, tau in zip(factors, taus, strict=True):
        factor.copy_(U.T @ tau)
        factor[torch.linalg.vector_norm(factor, dim=1) <= noise] = 0
    return U, factors


def _joint_basis(name: str, taus: Tensor, noise: float) -> Tensor:
    """Return U (m, r) of the SVD of matrices (T, m, n) side by side, none of which is copied."""
    tasks, height, width = taus.shape
    sketch = sketch_size(taus[0])
    if height <= tasks * width:
        return decompose([rows for tau in taus for rows in rows_of(tau.T)], name, sketch, above=noise)[1].to(taus)
    rows = rows_of(taus.transpose(0, 1))
    S, V = decompose(rows, name, sketch, above=noise)
    return product(rows, V, taus.dtype).div_(S.to(taus))
