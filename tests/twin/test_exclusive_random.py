"""Random exclusive vectors have the sizes of those that they replace, and nothing else of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.families import built
from twin_bench.checkpoints.factors import Factors
from twin_bench.files import digest_file
from twin_bench.twin.directory import load_parts, read_manifest
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.exclusive_random import random_like
from twin_bench.twin.recipe import ExclusiveSettings


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def own() -> Exclusive:
    """Return factors that are tall, wide and square, of columns that are not orthogonal, and two vectors."""
    shapes = {"tall": (40, 3, 12), "wide": (12, 5, 40), "square": (9, 9, 9)}
    factors = {n: Factors(drawn((m, r), r), 3 * drawn((r, k), r + 1)) for n, (m, r, k) in shapes.items()}
    return Exclusive(factors, {"bias": drawn((12,), 7), "norm": 0.01 * drawn((40,), 8)})


def test_sizes_stay(own: Exclusive) -> None:
    found = random_like(own, "cola", seed=3)
    assert list(found.factors) == list(own.factors)
    assert list(found.vectors) == list(own.vectors)
    for name, (B, A) in own.factors.items():
        U, V = found.factors[name].B.double(), found.factors[name].A.double().T
        assert (found.factors[name].B.shape, found.factors[name].A.shape) == (B.shape, A.shape)
        assert found.factors[name].B.dtype is torch.float32
        S = torch.linalg.svdvals(B.double() @ A.double())[: B.shape[1]]
        torch.testing.assert_close(torch.linalg.svdvals(U @ V.T)[: len(S)], S, rtol=1e-5, atol=1e-5)
        assert (U @ V.T).norm() == pytest.approx(float((B.double() @ A.double()).norm()), rel=1e-5)
        for factor in (U, V):  # orthonormal but for sqrt(S)
            torch.testing.assert_close(factor.T @ factor, S.diag(), rtol=1e-5, atol=1e-5)
        # A random product has nothing of the old one: their cosine is that of random matrices.
        cosine = torch.sum((U @ V.T) * (B @ A).double()) / S.square().sum()
        assert abs(float(cosine)) < 0.4
    for name, vector in own.vectors.items():
        assert float(found.vectors[name].norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
        assert not torch.allclose(found.vectors[name], vector)


def test_draws_depend_on_seed_and_names_alone(own: Exclusive) -> None:
    first = random_like(own, "cola", seed=3)
    reordered = Exclusive(dict(reversed(own.factors.items())), dict(reversed(own.vectors.items())))
    again = random_like(reordered, "cola", seed=3)
    for name in own.factors:
        assert torch.equal(first.factors[name].B, again.factors[name].B)
        assert torch.equal(first.factors[name].A, again.factors[name].A)
    assert all(torch.equal(first.vectors[name], again.vectors[name]) for name in own.vectors)
    for other in (random_like(own, "mnli", seed=3), random_like(own, "cola", seed=4)):
        assert not any(torch.allclose(first.factors[n].B, other.factors[n].B) for n in own.factors)
        assert not any(torch.allclose(first.vectors[n], other.vectors[n]) for n in own.vectors)


def files_of(directory: Path) -> dict[str, str]:
    return {str(file.relative_to(directory)): digest_file(file) for file in directory.rglob("*") if file.is_file()}


def test_a_build_changes_the_exclusive_vectors_alone(families: Any, twins: Any, tmp_path: Path) -> None:
    family, plain = families("bert"), twins("bert")
    settings = family.recipe["exclusive"]
    unset = built({**family.recipe, "exclusive": {**settings, "random": False}}, tmp_path / "unset")
    assert files_of(unset) == files_of(plain)
    control = built({**family.recipe, "exclusive": {**settings, "random": True}}, tmp_path / "control")
    changed = {name for name, digest in files_of(plain).items() if files_of(control)[name] != digest}
    own = {f"experts/{task}/{file}.safetensors" for task in family.experts for file in ("adapter_model", "vectors")}
    assert changed == own | {"twin.json"}
    assert read_manifest(control)["exclusive"] == {**settings, "random": True}
    kept, random = load_parts(plain).exclusive, load_parts(control).exclusive
    for task, vector in kept.items():
        for name, (B, A) in vector.factors.items():
            product = random[task].factors[name].B @ random[task].factors[name].A
            assert float(product.norm()) == pytest.approx(float((B @ A).norm()), rel=1e-5)
    first, second = (random[task].factors[name].B for task in ("cola", "mnli"))
    assert not torch.allclose(first, second)


def test_settings_without_it_have_the_digests_that_they_had() -> None:
    assert ExclusiveSettings(density=0.1).model_dump(mode="json") == {"density": 0.1, "rank": None}
    assert ExclusiveSettings(rank=2, random=True).model_dump() == {"density": None, "rank": 2, "random": True}
