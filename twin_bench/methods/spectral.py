"""What methods share that merge matrix by matrix: the walk over parameters, and an SVD that ends where rounding begins.

A LoRA expert's task vector has few singular values and a thousand directions of pure rounding, which LAPACK returns
as singular vectors all the same. A method that orthogonalises vectors or flattens a spectrum would give those
directions weight, another one on every machine; here they are cut. On matrices of full rank nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.task_vectors import TaskVectors

MatrixMerge = Callable[[str, Tensor, float], Tensor]
"""(name, tau (T, m, n), their rounding) -> the merged task vector (m, n)."""
Factors = tuple[Tensor, Tensor, Tensor]


def merged_by_matrix(vectors: TaskVectors, merge: MatrixMerge, *, scaling: float) -> Mapping[str, Tensor]:
    """theta_0 + scaling * merge(tau) for matrices, theta_0 + scaling * mean_t tau_t for tensors of other dimensions.

    A parameter that no expert changed stays the base's.
    """

    def merge_parameter(name: str, base: Tensor, taus: Tensor) -> Tensor:
        if not taus.any():
            return base
        merged = merge(name, taus, rounding(base, taus)) if base.ndim == 2 else taus.mean(dim=0)
        return base + scaling * merged

    return vectors.merged(merge_parameter)


def rounding(base: Tensor, taus: Tensor) -> float:
    """Return a bound, with a factor of ten to spare, on the norm of what in tau = theta_t - theta_0 is rounding."""
    norms = (float(torch.linalg.vector_norm(tensor, dtype=taus.dtype)) for tensor in (base, taus))
    return 10 * torch.finfo(taus.dtype).eps * sum(norms)


def svd(matrix: Tensor, name: str, *, above: float) -> Factors:
    """Return U (m, r), S (r), V (n, r) in float64 of an (m, n) matrix = U diag(S) V^T, S falling.

    r counts the singular values larger than `above`; a matrix of zeros has none and is not decomposed. Where LAPACK's
    divide and conquer (gesdd) doesn't converge, its QR iteration (gesvd) is asked; an InputError names the tensor
    `name` if neither does.
    """
    if matrix.shape[0] < matrix.shape[1]:  # LAPACK takes several times as long for a wide matrix
        V, S, U = svd(matrix.T, name, above=above)
        return U, S, V
    matrix = matrix.double()
    if not matrix.any():
        return matrix[:, :0], matrix.new_zeros(0), matrix.new_zeros(matrix.shape[1], 0)
    basis = _column_space(matrix, within=above / 2)
    U, S, Vh = _economy_svd(matrix if basis is None else basis.T @ matrix, name)
    rank = int((above < S).sum())
    return U[:, :rank] if basis is None else basis @ U[:, :rank], S[:rank], Vh[:rank].T


def leading(factors: Factors, count: int) -> Factors:
    """Return the first `count` singular triplets, as copies: views would hold all of U and V."""
    U, S, V = factors
    return U[:, :count].clone(), S[:count], V[:, :count].clone()


def polar(columns: Tensor, name: str) -> Tensor:
    """Return the matrix with orthonormal columns nearest to (m, k) `columns` (Procrustes): U V^T of its SVD.

    Columns that coincide to float32's rounding share one direction: the result is then a partial isometry of the
    columns' rank, where an SVD's full U and V would add directions that no column has.
    """
    U, _, V = svd(columns, name, above=max(columns.shape) * torch.finfo(torch.float32).eps)
    return U @ V.T


def _column_space(matrix: Tensor, *, within: float) -> Tensor | None:
    """Return orthonormal Q (m, n // 4) with |matrix - Q Q^T matrix| <= within, None where a matrix has more columns.

    Its product with n // 4 random vectors spans what a LoRA expert's task vector does, once more through the matrix
    keeps rounding out of the span (Halko et al., arXiv:0909.4061), and Q^T matrix is decomposed in a fraction of the
    time.
    """
    columns = matrix.shape[1]
    random = torch.randn(columns, columns // 4, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(matrix @ random.to(matrix.device)).Q
    Q = torch.linalg.qr(matrix @ (matrix.T @ Q)).Q
    rest = matrix - Q @ (Q.T @ matrix)
    return Q if torch.linalg.vector_norm(rest) <= within else None


def _economy_svd(matrix: Tensor, name: str) -> Factors:
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    try:
        found = scipy.linalg.svd(matrix.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
    except np.linalg.LinAlgError:
        raise InputError(
            f"tensor {name}: the SVD of its task vectors does not converge; merge with a method without one "
            "(task_arithmetic, ties), or retrain the expert"
        ) from None
    U, S, Vh = (torch.from_numpy(factor).to(matrix.device) for factor in found)
    return U, S, Vh
