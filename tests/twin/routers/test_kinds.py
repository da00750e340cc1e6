"""Each kind of router against scikit-learn, or against its formula written another way."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from twin_bench import InputError
from twin_bench.merging.plugins import load_plugins
from twin_bench.twin.routers.base import Examples, Router, RouterConfig
from twin_bench.twin.routers.registry import REGISTRY, find_kind, router_kinds
from twin_bench.twin.routers.store import load_router, save_router

TASKS = ("a", "b", "c")
WIDTH = 10
KINDS = ["knn", "linear", "mahalanobis", "mlp", "nearest_centroid", "projection", "random", "subspace", "uniform"]


def rows_of(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return features of correlated directions, far from the origin, and their owners by turns."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(count) % 3
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(count, WIDTH, generator=generator) @ mixing
    return 5 + noise + 4 * torch.eye(3, WIDTH)[owners], owners


def directions() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(3, WIDTH, 4, generator=generator, dtype=torch.float64)
    return [torch.linalg.qr(own).Q.T for own in drawn]


EXAMPLES = Examples(*rows_of(120, 0), *rows_of(60, 1), epochs=4, seed=5, directions=directions)
SCORED = rows_of(50, 2)[0]


def fitted(name: str, examples: Examples = EXAMPLES, **options: Any) -> Router:
    return find_kind(name).fit(RouterConfig(TASKS, WIDTH, kind=name), examples, options)


def few(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first `rows` rows of each task. Tasks come by turns."""
    return EXAMPLES.features[: 3 * rows].numpy(), EXAMPLES.owners[: 3 * rows].numpy()


def test_all_kinds_are_registered() -> None:
    assert list(router_kinds()) == KINDS
    assert all(kind.doc and kind.title for kind in router_kinds().values())


def test_linear_is_scikit_learns_on_standardised_features() -> None:
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.7, max_iter=1000))
    reference.fit(EXAMPLES.features.numpy(), EXAMPLES.owners.numpy())
    weights = fitted("linear", strength=0.7).weights(SCORED)
    np.testing.assert_allclose(weights.numpy(), reference.predict_proba(SCORED.numpy()), atol=2e-3)


def test_linear_of_two_experts_and_of_one() -> None:
    kept = EXAMPLES.owners < 2
    two = dataclasses.replace(EXAMPLES, features=EXAMPLES.features[kept], owners=EXAMPLES.owners[kept])
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    reference.fit(two.features.numpy(), two.owners.numpy())
    weights = find_kind("linear").fit(RouterConfig(TASKS[:2], WIDTH, kind="linear"), two, {}).weights(SCORED)
    np.testing.assert_allclose(weights.numpy(), reference.predict_proba(SCORED.numpy()), atol=2e-3)
    one = dataclasses.replace(EXAMPLES, owners=torch.zeros_like(EXAMPLES.owners))
    alone = find_kind("linear").fit(RouterConfig(("a",), WIDTH, kind="linear"), one, {}).weights(SCORED)
    assert alone.tolist() == [[1.0]] * len(SCORED)


def test_nearest_centroid_is_scikit_learns_and_a_posterior() -> None:
    features, owners = few(16)
    router = fitted("nearest_centroid", rows=16)
    reference = NearestCentroid().fit(features, owners)
    assert router(SCORED).argmax(dim=1).tolist() == reference.predict(SCORED.numpy()).tolist()
    variance = np.mean([(features[owners == task] - reference.centroids_[task]) ** 2 for task in range(3)])
    logits = -((SCORED.numpy()[:, None] - reference.centroids_) ** 2).sum(-1) / (2 * variance)
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(router.weights(SCORED).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("neighbours", [1, 7])
def test_knn_is_scikit_learns(neighbours: int) -> None:
    reference = KNeighborsClassifier(neighbours).fit(*few(20))
    weights = fitted("knn", rows=20, neighbours=neighbours).weights(SCORED)
    np.testing.assert_allclose(weights.numpy(), reference.predict_proba(SCORED.numpy()), atol=0.03)
    assert weights.argmax(dim=1).tolist() == reference.predict(SCORED.numpy()).tolist()


@pytest.mark.parametrize(("rows", "shrinkage"), [(30, 0.2), (3, 0.5), (30, None)])
def test_mahalanobis_is_linear_discriminant_analysis(rows: int, shrinkage: float | None) -> None:
    """With three rows a task the covariance has fewer than full rank."""
    features, owners = few(rows)
    router = fitted("mahalanobis", rows=rows, **({} if shrinkage is None else {"shrinkage": shrinkage}))
    if shrinkage is None:
        means = np.stack([features[owners == task].mean(0) for task in range(3)])
        inverse = np.linalg.inv(covariance_by_ledoit_and_wolf(features - means[owners]))
        offsets = SCORED.numpy()[:, None] - means
        distances = np.einsum("ntd,de,nte->nt", offsets, inverse, offsets)
        np.testing.assert_allclose(router(SCORED).numpy(), -distances / 2, rtol=1e-3, atol=1e-2)
        return
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features, owners)
    np.testing.assert_allclose(router.weights(SCORED).numpy(), reference.predict_proba(SCORED.numpy()), atol=2e-4)


def covariance_by_ledoit_and_wolf(centred: np.ndarray) -> np.ndarray:
    """Return their estimate by the formulas of the paper of 2004, lemma 3.2 to 3.4, one row at a time."""
    centred = centred.astype(float)
    count, width = centred.shape
    sample = centred.T @ centred / count
    mean = np.trace(sample) / width
    spread = ((sample - mean * np.eye(width)) ** 2).sum() / width
    error = sum(((np.outer(row, row) - sample) ** 2).sum() for row in centred) / width / count**2
    part = min(error, spread) / spread
    shrunk: np.ndarray = (1 - part) * sample + part * mean * np.eye(width)
    return shrunk


def test_subspace_is_the_residual_of_least_squares() -> None:
    features, owners = few(4)
    router = fitted("subspace", rows=4)
    scaled = torch.nn.functional.normalize(SCORED, dim=1).double().numpy()
    for task in range(3):
        span = features[owners == task].astype(float).T
        fit = span @ np.linalg.lstsq(span, scaled.T, rcond=None)[0]
        expected = -np.linalg.norm(scaled.T - fit, axis=0)
        np.testing.assert_allclose(router(SCORED)[:, task].numpy(), expected, atol=1e-5)
    with pytest.raises(InputError, match="span all 10 features"):
        fitted("subspace", rows=32)
    assert fitted("subspace", rows=32, rank=3)(SCORED).shape == (50, 3)


def test_subspace_of_repeated_rows_has_the_directions_of_those_rows_alone() -> None:
    own = [EXAMPLES.features[EXAMPLES.owners == expert][:3] for expert in range(3)]
    owners = torch.arange(3).repeat_interleave(6)
    repeated = dataclasses.replace(EXAMPLES, features=torch.cat([rows.repeat(2, 1) for rows in own]), owners=owners)
    torch.testing.assert_close(
        fitted("subspace", repeated, rows=6)(SCORED), fitted("subspace", rows=3)(SCORED), atol=1e-4, rtol=0
    )


def test_projection_is_the_residual_on_each_experts_directions() -> None:
    router = fitted("projection", rank=2)
    for task, own in enumerate(directions()):
        V = own[:2].T.numpy()
        z = SCORED.double().numpy()
        expected = -np.linalg.norm(z - z @ V @ V.T, axis=1)
        np.testing.assert_allclose(router(SCORED)[:, task].numpy(), expected, rtol=1e-5)


def test_bounds() -> None:
    assert fitted("uniform").weights(SCORED).unique().tolist() == [pytest.approx(1 / 3)]
    many = rows_of(3000, 4)[0]
    router = fitted("random")
    chosen = router.weights(many).argmax(dim=1)
    assert all(800 < (chosen == task).sum() < 1200 for task in range(3))
    for owner in range(3):  # also among the rows of one task
        assert all((chosen[owner::3] == task).sum() > 200 for task in range(3))
    rounded = many + 1e-6 * torch.randn(many.shape, generator=torch.Generator().manual_seed(1))
    assert (router.weights(rounded).argmax(dim=1) == chosen).float().mean() > 0.999
    other = fitted("random", dataclasses.replace(EXAMPLES, seed=6))
    assert 0.2 < (other.weights(many).argmax(dim=1) == chosen).float().mean() < 0.5


@pytest.mark.parametrize("name", KINDS)
def test_a_fit_is_pure_and_a_router_round_trips(name: str, tmp_path: Path) -> None:
    options = {"rows": 5} if name == "subspace" else {}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    router = fitted(name, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    weights = router.weights(SCORED)
    assert torch.equal(fitted(name, **options).weights(SCORED), weights)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(SCORED)))
    assert weights.dtype == torch.float32
    assert torch.equal(router.half().weights(SCORED), weights)  # a twin is cast, and its router stays as it is
    save_router(tmp_path, router)
    again = load_router(tmp_path)
    assert again is not None
    assert again.config == router.config
    assert torch.equal(again.weights(SCORED), weights)
    for row in range(3):
        torch.testing.assert_close(router.weights(SCORED[row : row + 1])[0], weights[row])


def test_wrong_kinds_and_options() -> None:
    with pytest.raises(InputError, match=r"unknown router kind 'knnn'; did you mean 'knn'\?"):
        find_kind("knnn")
    with pytest.raises(InputError, match=r"^neighbors: unknown key; did you mean 'neighbours'\?"):
        find_kind("knn").checked({"neighbors": 3})
    with pytest.raises(InputError, match=r"^rows: .*greater than or equal to 1"):
        find_kind("mahalanobis").checked({"rows": 0})
    with pytest.raises(InputError, match="kind uniform has none; remove rows"):
        find_kind("uniform").checked({"rows": 3})
    with pytest.raises(InputError, match="neighbours 7: only 6 rows are stored"):
        fitted("knn", rows=2, neighbours=7)
    for counts, width, options in (([30, 24], 24, {"rows": 24, "rank": 0}), ([30, 40], 5, {"rows": 32, "rank": 5})):
        with pytest.raises(InputError, match=f"they span all {width} features"):
            find_kind("subspace").router.check(counts, width, options)
        find_kind("subspace").router.check(counts, width + 1, options)


DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "routers.md"


def test_a_plugin_registers_a_kind(tmp_path: Path) -> None:
    """The plugin is the document's."""
    block = DOCUMENT.read_text().partition("    import torch\n")[2].partition("\n`examples`")[0]
    code = textwrap.dedent("    import torch\n" + block)
    (tmp_path / "mine.py").write_text(code)
    load_plugins([tmp_path / "mine.py"])
    try:
        router = fitted("keyword", sharpness=3.0)
        torch.testing.assert_close(router.weights(SCORED), torch.softmax(3 * SCORED[:, :3], dim=1))
        save_router(tmp_path, router)
        again = load_router(tmp_path)
        assert again is not None
        assert torch.equal(again.weights(SCORED), router.weights(SCORED))
        (tmp_path / "other.py").write_text(code)
        with pytest.raises(InputError, match="two router kinds are named keyword"):
            load_plugins([tmp_path / "other.py"])
    finally:
        REGISTRY.pop("keyword", None)
