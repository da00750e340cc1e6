"""Truncated SVDs that are kept on disk: they are what would be computed, and no other matrix's."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from twin_bench.merging.linear_algebra import truncated_svd
from twin_bench.twin import kept_svd as module
from twin_bench.twin.exclusive import exclusive_vector
from twin_bench.twin.kept_svd import kept_svd


def matrix(seed: int) -> torch.Tensor:
    return torch.randn(24, 16, generator=torch.Generator().manual_seed(seed))


def test_what_is_kept_is_what_would_be_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept_svd(tmp_path, matrix(0), 3, seed=1)
    monkeypatch.setattr(module, "truncated_svd", lambda *_, **__: pytest.fail("it is computed again"))
    again = kept_svd(tmp_path, matrix(0), 3, seed=1)
    for found in (first, again):
        assert torch.equal(found.B, truncated_svd(matrix(0), 3, seed=1).B)
        assert torch.equal(found.A, truncated_svd(matrix(0), 3, seed=1).A)


def test_another_matrix_rank_seed_or_number_of_threads_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_svd(tmp_path, matrix(0), 3, seed=1)
    changed = matrix(0)
    changed[5, 7] = torch.nextafter(changed[5, 7], torch.tensor(9.0))
    assert kept_svd(tmp_path, matrix(0), 4, seed=1).A.shape == (4, 16)
    kept_svd(tmp_path, changed, 3, seed=1)
    kept_svd(tmp_path, matrix(0), 3, seed=2)
    kept_svd(tmp_path, matrix(0).T, 3, seed=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    kept_svd(tmp_path, matrix(0), 3, seed=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 6


def test_a_damaged_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = kept_svd(tmp_path, matrix(0), 3, seed=1)
    file = next(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert torch.equal(kept_svd(tmp_path, matrix(0), 3, seed=1).B, whole.B)
    assert "checksum" in caplog.text


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.7}, {"budget_bytes": 800}, {"rank": 2, "bits": 8}])
def test_exclusive_vectors_are_the_same_with_it(options: dict[str, float], tmp_path: Path) -> None:
    expert, shared = {"layer.weight": matrix(0)}, {"layer.weight": matrix(1)}
    plain = exclusive_vector(expert, shared, **options)
    for _ in range(2):
        kept = exclusive_vector(expert, shared, decompose=partial(kept_svd, tmp_path), **options)
        for theirs, own in zip(kept.factors["layer.weight"], plain.factors["layer.weight"], strict=True):
            assert torch.equal(theirs, own)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
