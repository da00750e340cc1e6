"""Singular values and vectors from Gram matrices in float64: faster than an SVD, and in half the memory.

A Gram matrix holds the squares of the singular values. float64 resolves squares to a relative 1e-16, so nothing is lost
for float32 entries, which are resolved to 1e-7. Matrices with float64 entries are decomposed directly.

A matrix X (m, n) is given as `Rows`: views of its rows, converted to float64 one block at a time. Its Gram matrix is
(n, n), so a caller gives a wide matrix by its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.finite import all_finite

FULL_SVD_COLUMNS = 1024
"""The Gram matrix is decomposed up to this min(m, n). That takes up to 0.3 microseconds an entry of one core."""
SKETCHED_COLUMNS = 2150
"""A sketch of a quarter of the columns is tried up to this min(m, n)."""


def truncated_svd(matrix: Tensor, rank: int, *, seed: int = 0) -> Factors:
    """Return the best rank-`rank` approximation of an (m, n) matrix as factors.

    A sketch recognises matrices of low rank, such as a LoRA expert's. If it leaves out nothing but rounding error, its
    singular vectors are the matrix's own. A wider sketch recognises a LoRA expert's difference from a merge of several
    (3072 x 768, eight of rank 16: 0.1 s against 1.6 s). Other matrices up to FULL_SVD_COLUMNS get the eigenvectors
    of their Gram matrix. Wider ones get torch.svd_lowrank in the matrix's own precision, with 16 columns of
    oversampling and 4 power iterations. Its error was within 0.4% of the optimum on slowly decaying spectra (rank 8,
    2048 x 2048: 0.08 s against 2.0 s). Singular values below the matrix's rounding error are dropped, so a LoRA
    expert's delta gets no more columns than its rank.

    Returns the factors in the matrix's dtype, but in float32 or better.
    """
    matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    if matrix.shape[0] < matrix.shape[1]:  # the Gram matrix belongs to the smaller side
        B, A = truncated_svd(matrix.T, rank, seed=seed)
        return Factors(A.T.contiguous(), B.T.contiguous())
    noise = partial(_noise, shape=matrix.shape, dtype=matrix.dtype)
    rows = rows_of(matrix)
    found = of_low_rank(rows, 2 * rank + 16, seed=seed, noise=noise) if rank else None
    if found is None and min(matrix.shape) <= SKETCHED_COLUMNS and 2 * rank + 16 < min(matrix.shape) // 4:
        found = of_low_rank(rows, min(matrix.shape) // 4, seed=seed, noise=noise)
    if found is None and min(matrix.shape) <= FULL_SVD_COLUMNS:
        found = right_singular(rows)
    elif found is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, S, V = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
        found = S.double(), V.double()
    S, V = found
    rank = min(rank, int((noise(S) < S).sum())) if S.numel() and S[0] > 0 else 0
    root, V = S[:rank].sqrt(), V[:, :rank]
    return Factors(product(rows, V / root, matrix.dtype), (root * V).T.to(matrix).contiguous())


def product_svd(B: Tensor, A: Tensor) -> Factors:
    """Return the SVD of B @ A as factors, from B (m, r) and A (r, n) alone, in their dtype.

    Directions that hold rounding error only are left out, so a product of rank 0 has no columns.
    """
    left, right = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.T)
    rank = int((_noise(S, torch.Size((len(B), A.shape[1])), B.dtype) < S).sum()) if S.numel() else 0
    root = S[:rank].sqrt()
    return Factors(left.Q @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ right.Q.T)


def _noise(S: Tensor, shape: torch.Size, dtype: torch.dtype) -> float:
    """Return the largest singular value that is rounding error in this dtype, by the rule of numpy's matrix_rank."""
    return float(S[0]) * max(shape) * torch.finfo(dtype).eps


Rows = Sequence[Tensor]
"""Blocks (b, ...) of a matrix's rows. All dimensions after the first count as one."""
Decomposed = tuple[Tensor, Tensor]
"""S (k) in decreasing order and V (n, k): all n singular values, or the first k."""
BLOCK = 2**18
"""Entries of a block: 2 MB in float64."""
LARGE = 512
"""A Gram matrix with at least this many columns is decomposed in place."""


def rows_of(matrix: Tensor) -> Rows:
    """Return (m, ...) `matrix` as blocks of rows."""
    return matrix.split(max(1, BLOCK // max(1, matrix[:1].numel())))


def product(rows: Rows, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return X @ right (m, k) in `dtype`, computed in float64."""
    found = right.new_empty(sum(map(len, rows)), right.shape[1], dtype=dtype)
    for out, block in zip(found.split([len(block) for block in rows]), rows, strict=True):
        out.copy_(_exact(block) @ right)
    return found


def gram(rows: Rows, *, scale: float = 1.0, onto: Tensor | None = None) -> Tensor:
    """Return scale * X^T X (n, n), computed in float64. If `onto` is given, it is added to that in place."""
    columns = rows[0][:1].numel()
    found = torch.zeros(columns, columns, dtype=torch.float64, device=rows[0].device) if onto is None else onto
    for block in rows:
        exact = _exact(block)
        found.addmm_(exact.T, exact, alpha=scale)
    return found


def right_singular(rows: Rows) -> Decomposed:
    """Return all singular values and right singular vectors of a matrix, in float64.

    Values below 1e-8 of the largest are rounding error, except for float64 entries. Raises torch.linalg.LinAlgError if
    neither of two LAPACK drivers converges, for example because an entry is not finite.
    """
    if rows[0].dtype == torch.float64:
        return _first_to_converge((_torch_svd, _scipy_svd), lambda: torch.cat([_exact(block) for block in rows]))
    return spectrum(partial(gram, rows))


def spectrum(make_gram: Callable[[], Tensor]) -> Decomposed:
    """Return S and V of X from a function that computes X^T X (n, n) in float64; see right_singular.

    The function is called again if the first driver does not converge, because a driver may overwrite its input.
    """
    return _first_to_converge((_eigenvectors, _eigenvectors_otherwise), make_gram)


def of_low_rank(rows: Rows, columns: int, *, seed: int, noise: Callable[[Tensor], float]) -> Decomposed | None:
    """Return the first `columns` singular values and right singular vectors, if they leave out nothing but noise.

    The row space is found from `columns` random combinations of the rows (Halko et al., arXiv:0909.4061). It contains
    the whole task vector of a LoRA expert. `noise` maps the singular values found to a Frobenius norm: what is left out
    is rounding error up to this norm. The norm of what is left out is a difference of squared norms, which float64
    resolves to 1e-8 of the matrix's norm.

    Returns None for a matrix of higher rank, for fewer than 2 * `columns` columns, and for float64 entries. With so few
    columns the whole Gram matrix costs as little. float64 entries are resolved to more than 1e-8.
    """
    if 2 * columns > rows[0][:1].numel() or rows[0].dtype == torch.float64:
        return None
    generator = torch.Generator().manual_seed(seed)
    combined, size = torch.zeros((), dtype=torch.float64, device=rows[0].device), 0.0
    for block in rows:
        exact = _exact(block)
        random = torch.randn(columns, len(exact), dtype=torch.float64, generator=generator).to(exact.device)
        combined = combined + random @ exact
        size += float(exact.square().sum())
    Q = torch.linalg.qr(combined.T).Q
    found = torch.zeros(columns, columns, dtype=torch.float64, device=Q.device)
    for block in rows:
        sketch = _exact(block) @ Q
        found.addmm_(sketch.T, sketch)
    left_out = max(0.0, size - float(found.trace())) ** 0.5
    S, V = spectrum(found.clone)
    return (S, Q @ V) if left_out <= noise(S) else None


def _exact(block: Tensor) -> Tensor:
    return block.flatten(1).double()


def _first_to_converge(drivers: Sequence[Callable[[Tensor], Decomposed]], make: Callable[[], Tensor]) -> Decomposed:
    for driver in drivers:
        made = make()
        if not all_finite(made):
            raise torch.linalg.LinAlgError("an entry is not finite")  # type: ignore[attr-defined]
        try:
            return driver(made)
        except (torch.linalg.LinAlgError, np.linalg.LinAlgError):  # type: ignore[attr-defined]
            del made  # frees it before the next one is made
    raise torch.linalg.LinAlgError("no LAPACK driver converges")  # type: ignore[attr-defined]


def _eigenvectors(gram: Tensor) -> Decomposed:
    return _relatively_robust(gram) if _in_place(gram) else _divide_and_conquer(gram)


def _eigenvectors_otherwise(gram: Tensor) -> Decomposed:
    return _divide_and_conquer(gram) if _in_place(gram) else _relatively_robust(gram)


def _in_place(gram: Tensor) -> bool:
    """Return whether memory matters more than speed: scipy's threads wait in a loop and slow down torch afterwards."""
    return len(gram) >= LARGE and gram.device.type == "cpu"


def _relatively_robust(gram: Tensor) -> Decomposed:
    """Decompose with LAPACK's syevr, which overwrites the Gram matrix."""
    falling = gram.neg_().cpu().numpy().T  # negated, since eigenvalues ascend; .T is LAPACK's layout
    squares, V = scipy.linalg.eigh(falling, driver="evr", overwrite_a=True, check_finite=False)
    return torch.from_numpy(-squares).clamp(min=0).sqrt().to(gram), torch.from_numpy(V).to(gram)


def _divide_and_conquer(gram: Tensor) -> Decomposed:
    """Decompose with LAPACK's syevd, which needs twice the Gram matrix's memory as workspace."""
    squares, V = torch.linalg.eigh(gram.neg_())
    return squares.neg().clamp(min=0).sqrt(), V


def _torch_svd(matrix: Tensor) -> Decomposed:
    _, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return S, Vh.T


def _scipy_svd(matrix: Tensor) -> Decomposed:
    """Decompose with LAPACK's QR iteration (gesvd), if divide and conquer (gesdd) does not converge."""
    _, S, Vh = scipy.linalg.svd(matrix.cpu().numpy(), full_matrices=False, lapack_driver="gesvd", check_finite=False)
    return torch.from_numpy(S).to(matrix), torch.from_numpy(Vh).to(matrix).T
