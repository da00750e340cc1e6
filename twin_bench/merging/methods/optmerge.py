"""OptMerge (Wei et al., 2026): WUDI's loss on truncated task vectors, minimised gently from their mean."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.linear_algebra import gram, product, rows_of, spectrum
from twin_bench.merging.registry import SCALINGS, merge_method
from twin_bench.merging.spectral import converged, merged_by_matrix, svd
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="OptMerge", paper="arXiv:2505.19892", track="data-free", tune=SCALINGS)
def optmerge(
    vectors: TaskVectors,
    *,
    scaling: float = 1.0,
    learning_rate: float = 1e-4,
    momentum: float = 0.9,
    steps: int = 300,
) -> Mapping[str, Tensor]:
    """theta_0 + scaling * tau, tau reducing sum_t |(tau - U_t S_t V_t^T) V_t S_t|^2 / |tau_t|^2, matrix by matrix.

    U_t S_t V_t^T is the SVD of tau_t, cut at k = min(m, n) // T. tau is found by `steps` of SGD with `momentum` from
    mean_t tau_t. Norms are Frobenius norms. A matrix (m, n) is read as torch.nn.Linear's: n are the inputs. One that is
    stored (in, out), as GPT-2's Conv1D's, is turned first. An expert that did not change a matrix adds no term for it,
    but counts in T. Other tensors take the mean. A single expert comes back at scaling 1 if its rank is at most k.

    These are the paper's steps, the authors' code and its defaults for LoRA experts. The authors choose scaling from
    0.1 to 1.5. For full checkpoints they center the task vectors before the cut, start from the sum and use Adam, as
    `wudi` does; that variant is not here. Where a LoRA expert's rank is below k, nothing is cut.

    The loss is quadratic, so the steps are not taken one by one. With G = sum_t V_t S_t^2 V_t^T / |tau_t|^2 = Q diag(g)
    Q^T, each step multiplies the distance to the minimum by a number along each column of Q. The result is that of the
    steps, up to rounding: tau_0 + (tau_0 G - sum_t U_t S_t^3 V_t^T / |tau_t|^2) Q diag(a(g)) Q^T, with a(g) from the
    same recursion of SGD on numbers.
    """
    if learning_rate <= 0:
        raise InputError(f"optmerge: learning_rate must be above 0, not {learning_rate}")
    if not 0 <= momentum < 1:
        raise InputError(f"optmerge: momentum must be in [0, 1), not {momentum}")

    def merge(name: str, taus: Tensor, rounding: float) -> Tensor:
        taus = vectors.as_linear(name, taus)
        kept = min(taus.shape[1:]) // len(taus)
        parts, pulls = [], torch.zeros_like(taus[0], dtype=torch.float64)
        for tau in taus:
            U, S, V = (factor.double() for factor in svd(tau, name, above=rounding, most=kept))
            if len(S):
                size = torch.linalg.vector_norm(tau, dtype=torch.float64)
                parts.append(V * S / size)
                pulls.addmm_(U * S**3 / size**2, V.T)
        start = taus.mean(dim=0)
        if not parts:
            return vectors.as_linear(name, start)
        X = torch.cat(parts, dim=1)  # G = X X^T
        del parts
        with converged(name):
            roots, directions = spectrum(partial(gram, rows_of(X)))
        found = roots.square() > torch.finfo(torch.float64).eps * float(roots[0].square())
        roots = roots[found]
        Q = X @ (directions[:, found] / roots)
        del X, directions
        gap = product(rows_of(start), Q, torch.float64) * roots.square() - pulls @ Q
        gap *= descent(roots.square(), learning_rate=learning_rate, momentum=momentum, steps=steps)
        return vectors.as_linear(name, start + (gap @ Q.T).to(start))

    return merged_by_matrix(vectors, merge, scaling=scaling)


def descent(curvatures: Tensor, *, learning_rate: float, momentum: float, steps: int) -> Tensor:
    """Return a (r) such that SGD on g x^2, from x_0, ends at x_0 (1 + a g), for each g of `curvatures` (r)."""
    moved = velocity = torch.zeros_like(curvatures)
    for _ in range(steps):
        velocity = momentum * velocity + 2 * (1 + curvatures * moved)
        moved = moved - learning_rate * velocity
    return moved
