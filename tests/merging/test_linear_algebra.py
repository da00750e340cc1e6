"""Singular vectors by Gram matrices, against numpy's SVD: full and low rank, float32 and float64, in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from twin_bench.merging import linear_algebra as singular
from twin_bench.merging.linear_algebra import (
    gram,
    of_low_rank,
    product,
    right_singular,
    rows_of,
    spectrum,
    truncated_svd,
)

SPECTRA = {
    "slow": torch.linspace(1, 2, 40, dtype=torch.float64).flip(0),
    "fast": 0.75 ** torch.arange(40, dtype=torch.float64),  # down to 1e-5
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of forty columns: the last block is a short one."""
    monkeypatch.setattr(singular, "BLOCK", 300)


def matrix_of(spectrum: Tensor, rows: int = 60) -> tuple[Tensor, Tensor]:
    """Return a float64 matrix (rows, 40) of these singular values, falling, and its right singular vectors."""
    generator = torch.Generator().manual_seed(0)
    U, V = (
        torch.linalg.qr(torch.randn(size, len(spectrum), dtype=torch.float64, generator=generator)).Q
        for size in (rows, 40)
    )
    return (U * spectrum) @ V.T, V


def assert_same_directions(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Singular vectors are defined up to their sign."""
    signs = (found * expected).sum(dim=0).sign()
    torch.testing.assert_close(found * signs, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_is_numpys_svd_to_the_precision_of_the_entries(name: str, dtype: torch.dtype) -> None:
    matrix = matrix_of(SPECTRA[name])[0].to(dtype)
    S, V = right_singular(rows_of(matrix))
    _, expected, Vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    exact = dtype is torch.float64
    torch.testing.assert_close(S, torch.from_numpy(expected), rtol=1e-12 if exact else 1e-6, atol=1e-14)
    torch.testing.assert_close(V.T @ V, torch.eye(40, dtype=torch.float64))
    assert_same_directions(V, torch.from_numpy(Vh.T), 1e-10 if exact else 1e-6)


def test_float64_entries_keep_what_squares_would_lose() -> None:
    spectrum = 10.0 ** -torch.arange(12, dtype=torch.float64)
    matrix, V = matrix_of(spectrum)
    found, directions = right_singular(rows_of(matrix))
    torch.testing.assert_close(found[:12], spectrum, rtol=1e-4, atol=0)
    assert_same_directions(directions[:, :12], V, 1e-4)


@pytest.mark.parametrize("rank", [1, 6, 10])
def test_a_low_rank_is_found_by_a_sketch(rank: int) -> None:
    spectrum = torch.linspace(1, 2, rank, dtype=torch.float64).flip(0)
    matrix, V = matrix_of(spectrum)
    found = of_low_rank(rows_of(matrix.float()), 10, seed=0, noise=lambda S: 1e-5 * float(S[0]))
    assert found is not None
    torch.testing.assert_close(found[0][:rank], spectrum, rtol=1e-6, atol=0)
    assert_same_directions(found[1][:, :rank], V, 1e-5)


@pytest.mark.parametrize(("rest", "recognised"), [(1e-4, False), (1e-8, True)])
def test_a_direction_is_left_out_only_where_it_is_noise(rest: float, recognised: bool) -> None:
    spectrum = torch.tensor([1.0] * 10 + [rest] * 20, dtype=torch.float64)
    rows = rows_of(matrix_of(spectrum)[0].float())
    assert (of_low_rank(rows, 10, seed=0, noise=lambda _: 1e-5) is not None) == recognised


def test_no_sketch_of_float64_entries_nor_of_most_columns() -> None:
    matrix, _ = matrix_of(torch.ones(3, dtype=torch.float64))
    assert of_low_rank(rows_of(matrix), 10, seed=0, noise=lambda _: 1.0) is None
    assert of_low_rank(rows_of(matrix.float()), 21, seed=0, noise=lambda _: 1.0) is None


def test_matrices_side_by_side_count_as_one() -> None:
    taus = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
    beside = torch.cat(list(taus), dim=1).double()
    rows = rows_of(taus.transpose(0, 1))
    assert len(rows) == 5
    torch.testing.assert_close(gram(rows), beside.T @ beside)
    right = torch.randn(24, 4, dtype=torch.float64)
    torch.testing.assert_close(product(rows, right, torch.float64), beside @ right)


def refuse(*_: object, **__: object) -> Any:
    raise np.linalg.LinAlgError("did not converge")


def test_the_second_driver_gets_a_gram_matrix_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first works in place: what it leaves behind when it fails is no Gram matrix."""
    monkeypatch.setattr(singular, "LARGE", 40)

    def spoil(gram: np.ndarray, **_: object) -> None:
        gram[:] = 7
        refuse()

    rows = rows_of(matrix_of(SPECTRA["slow"])[0].float())
    expected, _ = right_singular(rows)
    monkeypatch.setattr(scipy.linalg, "eigh", spoil)
    found, _ = right_singular(rows)
    torch.testing.assert_close(found, expected)
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    with pytest.raises(torch.linalg.LinAlgError, match="no LAPACK driver converges"):
        right_singular(rows)


def test_what_is_not_finite_does_not_converge() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        spectrum(lambda: torch.full((3, 3), torch.nan, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
def test_a_loras_difference_from_a_merge_of_several_takes_no_full_decomposition(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven experts of rank 4: a sketch for two columns is too narrow, a quarter of the columns is enough."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    taus = [torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator) for _ in range(7)]
    matrix = taus[0] - 0.3 * sum(taus, torch.zeros(shape))
    monkeypatch.setattr(singular, "right_singular", lambda _: pytest.fail("decomposed whole"))
    B, A = truncated_svd(matrix, 2)
    U, S, Vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    torch.testing.assert_close((B @ A).double(), torch.from_numpy(U[:, :2] * S[:2] @ Vh[:2]), rtol=0, atol=1e-4)
    assert B.shape == (rows, 2)
    with pytest.raises(pytest.fail.Exception, match="decomposed whole"):
        truncated_svd(matrix + 0.1 * torch.randn(shape, generator=generator), 2)
