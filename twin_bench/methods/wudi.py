"""WUDI-Merging (Cheng et al., 2025): the task vector that interferes least with every expert's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.methods import SCALINGS, merge_method
from twin_bench.methods.spectral import merged_by_matrix
from twin_bench.task_vectors import TaskVectors


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
        together = taus.sum(dim=0, dtype=torch.float64)
        pull, gram = torch.zeros_like(together), together.new_zeros(2 * together.shape[-1:])
        norms = []
        for tau in taus:
            if tau.any():
                exact = tau.double()
                norms.append(torch.linalg.vector_norm(exact))
                unit = exact / norms[-1]
                pull += torch.linalg.multi_dot([together - exact, unit.T, unit])
                gram.addmm_(unit.T, unit)
        times_gram = _gram_product(gram, cut=rounding / float(min(norms)), dtype=taus.dtype)
        correction, pull = torch.zeros_like(taus[0]), pull.to(taus.dtype)
        adam = torch.optim.Adam([correction], lr=learning_rate, fused=True)
        for _ in range(int(steps)):
            correction.grad = 2 * (times_gram(correction) + pull)
            adam.step()
        return taus.sum(dim=0) + correction

    return merged_by_matrix(vectors, merge, scaling=scaling)


def _gram_product(gram: Tensor, *, cut: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return D -> D G for D (m, n) and G = X^T X (n, n) of an X whose singular values up to `cut` are rounding.

    Where their rank is below n / 2, two products with a factor of that rank are cheaper than one with the whole.
    """
    squares, directions = torch.linalg.eigh(gram)
    kept = squares > max(cut**2, len(gram) * torch.finfo(gram.dtype).eps * float(squares[-1]))
    thin = (directions[:, kept] * squares[kept].sqrt()).to(dtype)
    if 2 * thin.shape[1] < len(gram):
        return lambda D: D @ thin @ thin.T
    dense = gram.to(dtype)
    return lambda D: D @ dense
