"""Iso-CTS (Marczak et al., 2025): a flat spectrum over a common subspace and a subspace for each task."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.merging.linear_algebra import rows_of
from twin_bench.merging.registry import SCALINGS, merge_method, require_fraction
from twin_bench.merging.spectral import isotropic, merged_by_matrix, polar, svd
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="Iso-CTS", paper="arXiv:2502.04959", track="data-free", tune=SCALINGS)
def iso_cts(vectors: TaskVectors, *, scaling: float = 1.0, common_space_fraction: float = 0.8) -> Mapping[str, Tensor]:
    """theta_0 + scaling * mean(S) U V^T over the sum's leading directions and each task's own beyond them.

    Each matrix is merged with the SVD of sum_t tau_t = U_0 diag(S_0) V_0^T of rank r:

    1. Each task gets k = round((r - int(common_space_fraction r)) / T) directions. The common space gets r - T k.
    2. U_c, S_c, V_c are the first r - T k triplets of the sum. U_t, S_t, V_t are the first k of
       tau_t - U_c U_c^T tau_t.
    3. U = polar([U_1 .. U_T, U_c]), V likewise, and S = [S_1 .. S_T, S_c]. polar(X) is the matrix with orthonormal
       columns nearest to X.

    Other tensors take the mean. A matrix (m, n) is read as torch.nn.Linear's: m are the outputs. One that is stored
    (in, out), as GPT-2's Conv1D's, is turned first. `scaling` is the paper's alpha, which its authors choose on
    validation rows. If no task gets a direction, this is Iso-C.

    If r is min(m, n), as with full fine-tuning, this is the authors' code and FusionBench's. Their codes divide min(m,
    n) directions whatever the rank. With LoRA experts their common space then holds all that the experts have, and the
    task directions are rounding error. Here the r directions of the experts are divided. What LoRA experts have beyond
    the common space nearly coincides, so rounding the checkpoints to float32 moves the result by 0.002 of its distance
    from the base (eight experts of MiniLM). A k with T k > r is lowered to r // T; their codes fail there.
    """
    require_fraction("iso_cts", "common_space_fraction", common_space_fraction)

    def merge(name: str, taus: Tensor, rounding: float) -> Tensor:
        taus = vectors.as_linear(name, taus)
        total = svd(taus.sum(dim=0), name, above=rounding)
        rank, tasks = len(total[1]), len(taus)
        own = min(rank // tasks, round((rank - int(rank * common_space_fraction)) / tasks))
        common = rank - tasks * own
        parts = [[factor[..., :common].clone() for factor in total]]  # views would keep all of it in memory
        del total
        U = parts[0][0]
        for tau in taus if own else ():
            project_out(U, tau)
            parts.append([factor.to(U.dtype) for factor in svd(tau, name, above=rounding, most=own)])
        left, spectrum, right = (torch.cat(factors, dim=-1) for factors in zip(*parts, strict=True))
        del parts, U
        left = polar(left, name)
        right = polar(right, name)
        return vectors.as_linear(name, isotropic(left, spectrum, right))

    return merged_by_matrix(vectors, merge, scaling=scaling)


def project_out(U: Tensor, tau: Tensor) -> None:
    """Replace tau (m, n) by tau - U U^T tau in place. It is computed in float64, because the result may be small."""
    blocks = rows_of(tau)
    beside = U.split([len(block) for block in blocks])
    inside = torch.zeros(U.shape[1], tau.shape[1], dtype=torch.float64, device=tau.device)
    for block, u in zip(blocks, beside, strict=True):
        inside.addmm_(u.double().T, block.double())
    for block, u in zip(blocks, beside, strict=True):
        block.copy_(block.double().addmm_(u.double(), inside, alpha=-1))
