"""WUDI-Merging (Cheng et al., 2025): the task vector that interferes least with every expert's."""

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

    `steps` of Adam from tau = sum_t tau_t; norms are Frobenius'. A matrix (m, n) is read as torch.nn.Linear's, n the
    inputs. An expert that left a matrix alone says nothing about it. Other tensors take the mean. One expert at
    scaling 1 comes back.

    Adam moves an entry by about `learning_rate` a step, whatever the loss: with the defaults, by 0.003 at the most.
    On larger task vectors (LoRA's often are) the result stays near task arithmetic at scaling 1; raise
    `learning_rate` or `steps` there, or lower `scaling`. The paper has no scaling; whoever could not reproduce its
    GLUE figures on other checkpoints (issues 6 and 7 of its repository) found that one must be chosen.

    The learning rate is the authors' for CLIP, and FusionBench's; theirs for RoBERTa is 2e-5. The authors merge the
    linear layers alone and keep the rest pretrained; FusionBench merges every matrix and takes the mean of the
    rest, as here. Both differentiate the loss as written. Its gradient is 2 (D G + B) for tau = sum_t tau_t + D, with
    G = sum_t tau_t^T tau_t / |tau_t|^2 and B = sum_t (sum_{s != t} tau_s) tau_t^T tau_t / |tau_t|^2 computed
    once, so that a step costs one product, or two thin ones where the experts are of low rank. The steps are the same.
    """
    if learning_rate <= 0 or steps < 0 or steps != int(steps):
        raise InputError(
            f"wudi: learning_rate must be above 0 and steps a whole number, not {learning_rate} and {steps}"
        )

    def merge(name: str, taus: Tensor, rounding: float) -> Tensor:
        changed = [tau for tau in taus if tau.any()]
        norms = [float(torch.linalg.vector_norm(tau, dtype=torch.float64)) for tau in changed]
        pull = _pull(taus.sum(dim=0), changed, norms)
        inner, outer = gram_factors(name, changed, norms, noise=rounding)
        correction = torch.zeros_like(pull)
        correction.grad = gradient = torch.empty_like(pull)
        adam = torch.optim.Adam([correction], lr=learning_rate, fused=True)
        for _ in range(int(steps)):
            torch.addmm(pull, correction if inner is None else correction @ inner, outer, out=gradient)
            gradient *= 2
            adam.step()
        for tau in taus:
            correction += tau
        return correction

    return merged_by_matrix(vectors, merge, scaling=scaling)


def _pull(together: Tensor, taus: Sequence[Tensor], norms: Sequence[float]) -> Tensor:
    """Return B (m, n) of the gradient; exactly 0 of one expert, lest Adam follow its rounding."""
    pull = torch.zeros_like(together, dtype=torch.float64)
    for tau, norm in zip(taus, norms, strict=True):
        unit = tau.to(torch.float64, copy=True).div_(norm)
        for out, whole, part in zip(rows_of(pull), rows_of(together), rows_of(tau), strict=True):
            out += (whole.double() - part.double()) @ unit.T @ unit
        del unit  # not to be held while the next one is made
    return pull.to(together.dtype)


def gram_factors(
    name: str, taus: Sequence[Tensor], norms: Sequence[float], *, noise: float
) -> tuple[Tensor | None, Tensor]:
    """Return X (n, r) and X^T, whose product is G (n, n) of the gradient; None and G where r is above min(m, n) / 2.

    Two thin products are cheaper than one with the whole. What experts have up to `noise` is rounding and left out.
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
