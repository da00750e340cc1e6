"""WUDI-Merging (Cheng et al., 2025): the task vector that interferes least with the task vectors of all experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.linear_algebra import gram, of_low_rank, product, rows_of, spectrum
from twin_bench.merging.registry import SCALINGS, merge_method
from twin_bench.merging.spectral import converged, merged_by_matrix
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="WUDI", paper="arXiv:2503.08099", track="data-free", tune=SCALINGS)
def wudi(
    vectors: TaskVectors, *, scaling: float = 1.0, learning_rate: float = 1e-5, steps: int = 300
) -> Mapping[str, Tensor]:
    """theta_0 + scaling * tau, tau minimising sum_t |(tau - tau_t) tau_t^T|^2 / |tau_t|^2, matrix by matrix.

    tau is found by `steps` of Adam from tau = sum_t tau_t. Norms are Frobenius norms. A matrix (m, n) is read as
    torch.nn.Linear's: n are the inputs. One that is stored (in, out), as GPT-2's Conv1D's, is turned first. An expert
    that did not change a matrix adds no term for it. Other tensors take the mean. A single expert comes back at scaling
    1.

    Adam moves an entry by about `learning_rate` a step, whatever the loss. With the defaults this is at most 0.003. On
    larger task vectors, as LoRA's often are, the result stays near task arithmetic at scaling 1. Raise `learning_rate`
    or `steps` there, or lower `scaling`. The paper has no scaling. Users who could not reproduce its GLUE figures on
    other checkpoints (issues 6 and 7 of its repository) found that one must be chosen.

    The default learning rate is the authors' vision setting (CLIP), and FusionBench's. The authors' for RoBERTa is
    2e-5. The authors merge the linear layers alone and keep the rest pretrained. FusionBench merges every matrix and
    takes the mean of the rest, as here. Both differentiate the loss as written. Here its gradient is computed as 2 (D G
    + B) for tau = sum_t tau_t + D. G = sum_t tau_t^T tau_t / |tau_t|^2 and B = sum_t (sum_{s != t} tau_s) tau_t^T tau_t
    / |tau_t|^2 are computed once. A step then costs one product, or two thin products if the experts are of low rank.
    The steps are the same.
    """
    if learning_rate <= 0:
        raise InputError(f"wudi: learning_rate must be above 0, not {learning_rate}")

    def merge(name: str, taus: Tensor, rounding: float) -> Tensor:
        taus = vectors.as_linear(name, taus)
        changed = [tau for tau in taus if tau.any()]
        norms = [float(torch.linalg.vector_norm(tau, dtype=torch.float64)) for tau in changed]
        pull = _pull(taus.sum(dim=0), changed, norms)
        inner, outer = gram_factors(name, changed, norms, noise=rounding)
        correction = torch.zeros_like(pull)
        correction.grad = gradient = torch.empty_like(pull)
        adam = torch.optim.Adam([correction], lr=learning_rate, fused=True)
        for _ in range(steps):
            torch.addmm(pull, correction if inner is None else correction @ inner, outer, out=gradient)
            gradient *= 2
            adam.step()
        for tau in taus:
            correction += tau
        return vectors.as_linear(name, correction)

    return merged_by_matrix(vectors, merge, scaling=scaling)


def _pull(together: Tensor, taus: Sequence[Tensor], norms: Sequence[float]) -> Tensor:
    """Return B (m, n) of the gradient. It is exactly 0 for one expert, so that Adam does not follow rounding error."""
    pull = torch.zeros_like(together, dtype=torch.float64)
    for tau, norm in zip(taus, norms, strict=True):
        unit = tau.to(torch.float64, copy=True).div_(norm)
        for out, whole, part in zip(rows_of(pull), rows_of(together), rows_of(tau), strict=True):
            out += (whole.double() - part.double()) @ unit.T @ unit
        del unit  # frees it before the next one is made
    return pull.to(together.dtype)


def gram_factors(
    name: str, taus: Sequence[Tensor], norms: Sequence[float], *, noise: float
) -> tuple[Tensor | None, Tensor]:
    """Return X (n, r) and X^T, whose product is G (n, n) of the gradient; None and G if r is above min(m, n) / 2.

    Two thin products cost less than one product with G. Components of the experts up to `noise` are rounding error and
    are left out.
    """
    rows = [block for tau in taus for block in rows_of(tau)]
    summed: Tensor | None = None
    with converged(name):
        found = of_low_rank(rows, min(taus[0].shape) // 2, seed=0, noise=lambda _: noise)
        if found is None:
            for tau, norm in zip(taus, norms, strict=True):
                summed = gram(rows_of(tau), scale=norm**-2, onto=summed)
            assert summed is not None
            return None, summed.to(taus[0])
        S, V = found
        V = V[:, noise < S]
        for tau, norm in zip(taus, norms, strict=True):
            summed = gram([product(rows_of(tau), V, torch.float64)], scale=norm**-2, onto=summed)
        assert summed is not None
        S, directions = spectrum(summed.clone)
    X = (V @ (directions * S)).to(taus[0])
    return X, X.T
