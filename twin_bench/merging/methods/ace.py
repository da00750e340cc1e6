"""ACE-Merging (Xu et al., 2026): RegMean without data, the inputs' covariance estimated from the task vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.linear_algebra import gram, rows_of
from twin_bench.merging.registry import SCALINGS, merge_method, require_fraction
from twin_bench.merging.spectral import isotropic, merged_by_matrix, svd
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="ACE-Merging", paper="arXiv:2603.02945", track="data-free", tune=SCALINGS)
def ace(
    vectors: TaskVectors,
    *,
    scaling: float = 1.0,
    ridge: float = 0.01,
    heterogeneity: float = 0.3,
    fraction: float = 0.3,
) -> Mapping[str, Tensor]:
    """theta_0 + scaling * (sum_t W_t P_t) (sum_t P_t + C)^-1, P_t = W_t^T W_t + ridge I, W_t the centred tau_t.

    Each matrix is merged so. W_t is tau_t (m, n) less the mean of its rows, and S_t = W_t^T W_t stands for the
    covariance of the task's inputs. All rows of C (n, n) are the mean row of sum_t S_t. A matrix is read as
    torch.nn.Linear's: n are the inputs. One that is stored (in, out), as GPT-2's Conv1D's, is turned first. Other
    tensors take the mean.

    The experts of a matrix are heterogeneous if gamma, the variance of log |tau_t|^2 over its squared mean, is above
    `heterogeneity`. Then S_t and the ridge of P_t are divided by trace(S_t), and C by the mean of |tau_t|^2. Added to
    the result R is mean(S_k) U_k V_k^T, of the k = int(fraction min(m, n)) leading singular triplets of
    R + sum_t W_t (S_t - mean_t P_t).

    This is the authors' code, version of the CVPR paper. The formula in the paper leaves open what the code decides:
    that the numerator's tau_t is centred as well, and when and how experts count as heterogeneous. A single expert
    does not come back. Two things differ where the code divides by zero or follows rounding error: an expert that did
    not change a matrix adds no term to it, and of a rank below k, as of a few LoRA experts, all triplets are taken.
    """
    require_fraction("ace", "fraction", fraction)
    if ridge <= 0:
        raise InputError(f"ace: ridge must be above 0, not {ridge}")

    def merge(name: str, taus: Tensor, rounding: float) -> Tensor:
        taus = vectors.as_linear(name, taus)
        sizes = torch.linalg.vector_norm(taus, dim=(1, 2), dtype=torch.float64).square()
        changed = [tau for tau, size in zip(taus, sizes, strict=True) if size]
        sizes = sizes[sizes > 0]
        apart = gamma(sizes) > heterogeneity
        merged, residual = regression(changed, ridge=ridge, normalised=apart, shrink=float(sizes.mean()))
        if apart:
            leading = svd((merged + residual).to(taus), name, above=rounding, most=int(fraction * min(merged.shape)))
            merged += isotropic(*leading).to(merged)
        return vectors.as_linear(name, merged)

    return merged_by_matrix(vectors, merge, scaling=scaling)


def gamma(sizes: Tensor) -> float:
    """Return the variance of the logarithms of (T,) squared norms over their squared mean: 0 for one expert."""
    logs = sizes.log()
    return float(logs.var() / (logs.mean().square() + 1e-12)) if len(logs) > 1 else 0.0


def regression(taus: Sequence[Tensor], *, ridge: float, normalised: bool, shrink: float) -> tuple[Tensor, Tensor]:
    """Return the merged (m, n) matrix, and sum_t W_t (S_t - mean_t P_t) if `normalised`, in float64.

    A task vector whose rows are all equal has no covariance and adds nothing. `shrink` divides C if `normalised`.
    """
    height, width = taus[0].shape
    covariance = torch.zeros(width, width, dtype=torch.float64, device=taus[0].device)
    response = covariance.new_zeros(height, width)
    total, ridged = (torch.zeros_like(response if normalised else response[:0]) for _ in range(2))
    ridges = 0.0
    for tau in taus:
        centred = tau.double()
        centred -= centred.mean(dim=0)
        if not centred.any():
            continue
        size = float(centred.square().sum()) if normalised else 1.0
        S = gram(rows_of(centred), scale=1 / size)
        covariance += S
        S.diagonal().add_(ridge / size)
        response.addmm_(centred, S)
        ridges += ridge / size
        if normalised:
            total += centred
            ridged.add_(centred, alpha=ridge / size)
        del centred, S  # frees them before the next ones are made
    if not ridges:
        return response, response
    prior = covariance.mean(dim=0) / (shrink if normalised else 1.0)
    covariance.diagonal().add_(ridges)
    residual = response - ridged - total @ covariance / len(taus) if normalised else response
    return torch.linalg.solve(covariance.add_(prior), response, left=False), residual
