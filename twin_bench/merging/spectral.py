"""Shared parts of methods that merge matrix by matrix: the walk over parameters, and an SVD cut at rounding error.

A LoRA expert's task vector has few singular values and a thousand directions of pure rounding error. LAPACK returns
singular vectors for these directions too. A method that orthogonalises vectors or flattens a spectrum would give them
weight, and they differ between machines. They are cut here. Matrices of full rank lose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.linear_algebra import Rows, of_low_rank, product, right_singular, rows_of
from twin_bench.merging.task_vectors import TaskVectors

MatrixMerge = Callable[[str, Tensor, float], Tensor]
"""(name, tau (T, m, n), a bound on their rounding error) -> the merged task vector (m, n)."""
Factors = tuple[Tensor, Tensor, Tensor]


def merged_by_matrix(vectors: TaskVectors, merge: MatrixMerge, *, scaling: float) -> Mapping[str, Tensor]:
    """theta_0 + scaling * merge(tau) for matrices, theta_0 + scaling * mean_t tau_t for tensors of other dimensions.

    A parameter that no expert changed stays the base's.
    """

    def merge_parameter(name: str, base: Tensor, taus: Tensor) -> Tensor:
        if not taus.any():
            return base
        merged = merge(name, taus, rounding(base, taus)) if base.ndim == 2 else taus.mean(dim=0)
        return base.add(merged.to(base), alpha=scaling)

    return vectors.merged(merge_parameter)


def rounding(base: Tensor, taus: Tensor) -> float:
    """Return a bound on the norm of the rounding error in tau = theta_t - theta_0, with a factor of ten to spare."""
    norms = (float(torch.linalg.vector_norm(tensor, dtype=taus.dtype)) for tensor in (base, taus))
    return 10 * torch.finfo(taus.dtype).eps * sum(norms)


def svd(matrix: Tensor, name: str, *, above: float, most: int | None = None) -> Factors:
    """Return U (m, r), S (r), V (n, r) of an (m, n) matrix = U diag(S) V^T, S in decreasing order.

    r is the number of singular values larger than `above`, but at most `most`. A matrix of zeros has r = 0 and is not
    decomposed. If the number of those values is at most a quarter of min(m, n), as for a LoRA expert, all three are in
    float64: its weak directions matter, and they are small. Otherwise they are in the matrix's dtype, at half the
    memory. An InputError names the tensor `name` if no LAPACK driver converges.
    """
    if matrix.shape[0] < matrix.shape[1]:
        V, S, U = svd(matrix.T, name, above=above, most=most)
        return U, S, V
    if not matrix.any():
        return matrix[:, :0], matrix.new_zeros(0), matrix.new_zeros(matrix.shape[1], 0)
    rows = rows_of(matrix)
    S, V = decompose(rows, name, sketch_size(matrix), above=above)
    dtype = torch.float64 if 4 * len(S) <= matrix.shape[1] else matrix.dtype
    S, V = S[:most], V[:, :most].clone()  # a view would keep all of V in memory
    return product(rows, V, dtype).div_(S.to(dtype)), S.to(dtype), V.to(dtype)


def sketch_size(matrix: Tensor) -> int:
    """Return how many directions of an (m, n) task vector a sketch looks for. A LoRA expert's rank is below that."""
    return min(matrix.shape) // 4 + 8


def decompose(rows: Rows, name: str, sketch: int, *, above: float) -> tuple[Tensor, Tensor]:
    """Return S (r) and V (n, r) of a tall matrix, in float64; see `svd`. A sketch of `sketch` columns comes first."""
    with converged(name):
        S, V = of_low_rank(rows, sketch, seed=0, noise=lambda _: above / 2) or right_singular(rows)
    rank = int((above < S).sum())
    return S[:rank], V[:, :rank]


def joint_basis(name: str, taus: Tensor, noise: float) -> Tensor:
    """Return U (m, r) of the SVD of matrices (T, m, n) side by side, without a copy of them.

    r is the number of singular values larger than `noise`.
    """
    tasks, height, width = taus.shape
    sketch = sketch_size(taus[0])
    if height <= tasks * width:
        return decompose([rows for tau in taus for rows in rows_of(tau.T)], name, sketch, above=noise)[1].to(taus)
    rows = rows_of(taus.transpose(0, 1))
    S, V = decompose(rows, name, sketch, above=noise)
    return product(rows, V, taus.dtype).div_(S.to(taus))


@contextmanager
def converged(name: str) -> Iterator[None]:
    """Raise an InputError that names the tensor `name` if it can't be decomposed."""
    try:
        yield
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise InputError(
            f"tensor {name}: the SVD of its task vectors does not converge; merge with a method without SVD "
            "(task_arithmetic, ties), or retrain the expert"
        ) from None


def polar(columns: Tensor, name: str) -> Tensor:
    """Return the matrix with orthonormal columns nearest to (m, k) `columns` (Procrustes): U V^T of its SVD.

    Columns that are equal up to float32's rounding share one direction. The result is then a partial isometry of the
    columns' rank. The full U and V of an SVD would add directions that no column has.
    """
    U, _, V = svd(columns, name, above=max(columns.shape) * torch.finfo(torch.float32).eps)
    return (U @ V.T).to(columns)  # the dtype of U and V depends on their rank


def isotropic(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Return mean(S) U V^T (m, n) of U (m, r), S (r), V (n, r). It is zero if r is 0, as when experts cancel."""
    return (S.sum() / max(len(S), 1)) * (U @ V.T)
