"""Singular values and vectors by Gram matrices in float64: faster than an SVD, and in half the memory.

A Gram matrix squares singular values, and float64 keeps squares to a relative 1e-16: of float32 entries, which tell
1e-7 apart, nothing is lost. Matrices whose entries are float64 themselves are decomposed as they are.

A matrix X (m, n) is taken as `Rows`: views of its rows, made float64 one block at a time. Its Gram matrix is
(n, n): whoever decomposes a wide one gives its columns.
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

FULL_SVD_OPERATIONS = 10**10
"""m * n * min(m, n) up to which the Gram matrix is decomposed: about half a second on two cores."""


def truncated_svd(matrix: Tensor, rank: int, *, seed: int = 0) -> Factors:
    """Return the best rank-`rank` approximation of an (m, n) matrix as factors.

    A matrix of low rank, such as a LoRA expert's, is recognised: where a sketch of it leaves nothing but rounding,
    the sketch's singular vectors are the matrix's own. Else they are the eigenvectors of its Gram matrix up to
    FULL_SVD_OPERATIONS; beyond, those of torch.svd_lowrank in the matrix's own precision with 16 columns of
    oversampling and 4 power iterations, whose error was within 0.4% of the optimum on slowly decaying spectra
    (4096 x 4096, rank 8: 0.24 s against 11 s). Singular values below the matrix's rounding error are dropped, so a
    LoRA expert's delta keeps no more columns than it has.

    Returns the factors in the matrix's dtype, float32 at least.
    """
    matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    if matrix.shape[0] < matrix.shape[1]:  # the Gram matrix is that of the smaller side
        B, A = truncated_svd(matrix.T, rank, seed=seed)
        return Factors(A.T.contiguous(), B.T.contiguous())
    noise = partial(_noise, shape=matrix.shape, dtype=matrix.dtype)
    rows = rows_of(matrix)
    found = of_low_rank(rows, 2 * rank + 16, seed=seed, noise=noise) if rank else None
    if found is None and matrix.numel() * min(matrix.shape) <= FULL_SVD_OPERATIONS:
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


def _noise(S: Tensor, shape: torch.Size, dtype: torch.dtype) -> float:
    """Return the singular value up to which a matrix of a dtype is rounding: as numpy's matrix_rank has it."""
    return float(S[0]) * max(shape) * torch.finfo(dtype).eps


Rows = Sequence[Tensor]
"""Blocks (b, ...) of a matrix's rows, their further dimensions counting as one."""
Decomposed = tuple[Tensor, Tensor]
"""S (k), falling, and V (n, k): all n, or the first ones."""
BLOCK = 2**18
"""Entries of a block: 2 MB in float64."""
LARGE = 512
"""Columns from which a Gram matrix is decomposed in place."""


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
    """Return scale * X^T X (n, n), computed in float64; added to `onto`, in place, where it is given."""
    columns = rows[0][:1].numel()
    found = torch.zeros(columns, columns, dtype=torch.float64, device=rows[0].device) if onto is None else onto
    for block in rows:
        exact = _exact(block)
        found.addmm_(exact.T, exact, alpha=scale)
    return found


def right_singular(rows: Rows) -> Decomposed:
    """Return all of a matrix's singular values and right singular vectors, in float64.

    Values below 1e-8 of the largest are rounding, but of float64 entries. Raises torch.linalg.LinAlgError where
    neither of two LAPACK drivers converges, as where an entry is not finite.
    """
    if rows[0].dtype == torch.float64:
        return _first_to_converge((_torch_svd, _scipy_svd), lambda: torch.cat([_exact(block) for block in rows]))
    return spectrum(partial(gram, rows))


def spectrum(make_gram: Callable[[], Tensor]) -> Decomposed:
    """Return S and V of X, given what computes X^T X (n, n) in float64; see right_singular.

    It is called once more if the first driver, which may work in place, does not converge.
    """
    return _first_to_converge((_eigenvectors, _eigenvectors_otherwise), make_gram)


def of_low_rank(rows: Rows, columns: int, *, seed: int, noise: Callable[[Tensor], float]) -> Decomposed | None:
    """Return what right_singular does, of the first `columns` singular values, if these leave no more than noise.

    The row space is that of `columns` random combinations of the rows (Halko et al., arXiv:0909.4061), which holds all
    of a LoRA expert's task vector. `noise` gives, of the singular values found, the Frobenius norm up to which what is
    left out is rounding: as a difference of squared norms, float64 resolves it to 1e-8 of the matrix's.

    Returns None of a matrix of higher rank, of one with fewer than 2 * `columns` columns, since the whole Gram matrix
    costs as little, and of float64 entries, which tell more than 1e-8 apart.
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
            del made  # not to be held while the next one is made
    raise torch.linalg.LinAlgError("no LAPACK driver converges")  # type: ignore[attr-defined]


def _eigenvectors(gram: Tensor) -> Decomposed:
    return _relatively_robust(gram) if _in_place(gram) else _divide_and_conquer(gram)


def _eigenvectors_otherwise(gram: Tensor) -> Decomposed:
    return _divide_and_conquer(gram) if _in_place(gram) else _relatively_robust(gram)


def _in_place(gram: Tensor) -> bool:
    """Whether memory matters more than that scipy's threads, which wait in a loop, take torch's time afterwards."""
    return len(gram) >= LARGE and gram.device.type == "cpu"


def _relatively_robust(gram: Tensor) -> Decomposed:
    """By LAPACK's syevr, which works in place of the Gram matrix."""
    falling = gram.neg_().cpu().numpy().T  # eigenvalues come rising; .T is LAPACK's own layout
    squares, V = scipy.linalg.eigh(falling, driver="evr", overwrite_a=True, check_finite=False)
    return torch.from_numpy(-squares).clamp(min=0).sqrt().to(gram), torch.from_numpy(V).to(gram)


def _divide_and_conquer(gram: Tensor) -> Decomposed:
    """By LAPACK's syevd, which takes twice the Gram matrix's memory to work in."""
    squares, V = torch.linalg.eigh(gram.neg_())
    return squares.neg().clamp(min=0).sqrt(), V


def _torch_svd(matrix: Tensor) -> Decomposed:
    _, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return S, Vh.T


def _scipy_svd(matrix: Tensor) -> Decomposed:
    """By LAPACK's QR iteration (gesvd), where divide and conquer (gesdd) does not converge."""
    _, S, Vh = scipy.linalg.svd(matrix.cpu().numpy(), full_matrices=False, lapack_driver="gesvd", check_finite=False)
    return torch.from_numpy(S).to(matrix), torch.from_numpy(Vh).to(matrix).T
