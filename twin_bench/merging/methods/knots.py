"""KnOTS (Stoica et al., 2025): TIES after a joint SVD has aligned the experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.merging.elections import disjoint_mean, trim, trim_thresholds
from twin_bench.merging.registry import SCALINGS, merge_method, require_fraction
from twin_bench.merging.spectral import joint_basis, rounding
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="KnOTS-TIES", paper="arXiv:2410.19735", track="data-free", tune=SCALINGS)
def knots(vectors: TaskVectors, *, scaling: float = 0.6, density: float = 0.2) -> Mapping[str, Tensor]:
    """theta_0 + scaling * U TIES(A_1 .. A_T): TIES on right factors over a joint basis, A_t = diag(S) V_t^T.

    [tau_1 .. tau_T] = U diag(S) [V_1^T .. V_T^T] is the SVD of the task vectors side by side. They are one (m, T n)
    matrix for each (m, n) parameter, and the SVD is cut at its rank. Therefore A_t = U^T tau_t, of shape (rank, n). The
    rest is `ties`: each expert keeps its `density` largest entries over the whole model, the sign of the sum is
    elected, and the mean is over the entries that agree. Tensors of other dimensions are trimmed and merged as they
    are. A tensor that no expert changed takes no part.

    A matrix is read as torch.nn.Linear's: m are the outputs. One that is stored (in, out), as GPT-2's Conv1D's, is
    turned first. Experts may have any rank, but the method is meant for LoRA: at full rank U only rotates all outputs.
    A single expert comes back at scaling 1 and density 1, and so do equal experts.

    The defaults are the authors' for CLIP ViT-B/32 (0.5 for ViT-L/14; 0.5 and density 1 for Llama 3 8B). The authors
    choose scaling on validation rows. Their code cuts singular values at 1e-5, FusionBench's at 1e-4; here the cut is
    at rounding error. If the sum of an entry is exactly 0, their code gives it the model's majority sign; here it is
    dropped, as in `ties`. Their experts are LoRA matrices. Of a full checkpoint their code appends a bias to its
    layer's matrix as a column, and reads a norm's weight as a diagonal matrix. Here biases and norms are vectors of
    their own, outside the joint SVD. Tensors that are neither weight nor bias stay pretrained in their code unless
    merge_other_params is set.
    """
    require_fraction("knots", "density", density)

    def aligned(name: str, taus: Tensor) -> Tensor:
        if not taus.any():
            return taus.new_zeros(len(taus), 0)
        return align(name, vectors.base[name], vectors.as_linear(name, taus))[1]

    thresholds = trim_thresholds(vectors.map(aligned), density)

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        if not taus.any():
            return base
        U, factors = align(name, base, vectors.as_linear(name, taus))
        merged = disjoint_mean(trim(factors, thresholds))
        return base + scaling * (merged if U is None else vectors.as_linear(name, U @ merged))

    return vectors.merged(merge)


def align(name: str, base: Tensor, taus: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return the joint basis U (m, r) of matrices tau (T, m, n) and A_t = U^T tau_t (T, r, n).

    U is taken from the SVD of [tau_1 .. tau_T]. If an expert has only rounding error in a direction, its A_t is 0
    there, so that signs of rounding error do not vote. A_t uses the memory of tau. For tensors of other dimensions the
    result is None and tau.
    """
    if taus.ndim != 3:
        return None, taus
    noise = rounding(base, taus)
    U = joint_basis(name, taus, noise)
    factors = taus[:, : U.shape[1]]
    for factor, tau in zip(factors, taus, strict=True):
        factor.copy_(U.T @ tau)
        factor[torch.linalg.vector_norm(factor, dim=1) <= noise] = 0
    return U, factors
