"""Temperature, threshold and what is reported, against other computations; and rows that fall back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from tests.support.dense import batch
from tests.support.families import built
from twin_bench import TwinModel
from twin_bench.data.rows import read_router_rows
from twin_bench.errors import UnsuitedError
from twin_bench.twin.routers.base import Examples, RouterConfig, StoredRouter
from twin_bench.twin.routers.calibration import (
    calibrate,
    calibration_error,
    likeliest_temperature,
    report,
    set_threshold,
    threshold_that_keeps,
)
from twin_bench.twin.routers.registry import find_kind
from twin_bench.twin.routers.rows import divided

TASKS = ("a", "b", "c")


def scored(rows: int = 4000, sharpness: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits that are `sharpness` times those by which the owners are drawn."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(rows, 3, generator=generator) * 2
    owners = torch.multinomial(torch.softmax(true, dim=1), 1, generator=generator).flatten()
    return sharpness * true, owners


class Plain(StoredRouter):
    """Logits are the features."""

    @classmethod
    def fit(cls, config: RouterConfig, examples: Examples) -> Plain:
        return cls(config)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def test_the_temperature_undoes_what_sharpened_the_logits() -> None:
    logits, owners = scored()
    found = likeliest_temperature(logits, owners)
    assert found == pytest.approx(3.0, rel=0.06)
    loss = [log_loss(owners, torch.softmax(logits.double() / t, dim=1)) for t in (found / 1.05, found, found * 1.05)]
    assert loss[1] < min(loss[0], loss[2])
    certain = torch.eye(3)[owners]
    assert 0.01 < likeliest_temperature(certain, owners) < 1  # all rows are right, and yet no weight is all of 1


@pytest.mark.parametrize("keep", [0.95, 0.5, 1.0, 0.001])
def test_a_threshold_keeps_its_fraction_of_rows_and_hardly_more(keep: float) -> None:
    confidence = torch.rand(977, generator=torch.Generator().manual_seed(1))
    kept = (confidence >= threshold_that_keeps(confidence, keep)).double().mean().item()
    assert keep <= kept < keep + 2 / 977


def test_the_report_is_scikit_learns() -> None:
    logits, owners = scored(500)
    router = Plain(RouterConfig(TASKS, 3))
    set_threshold(router, logits, keep=0.9)
    found = report(router, logits, owners)
    predicted = logits.argmax(dim=1)
    assert found["accuracy"] == pytest.approx(accuracy_score(owners, predicted))
    assert found["top_2"] == pytest.approx(top_k_accuracy_score(owners, logits, k=2))
    assert [list(row.values()) for row in found["confusion"].values()] == confusion_matrix(owners, predicted).tolist()
    assert found["task_accuracy"]["b"] == pytest.approx((predicted[owners == 1] == 1).double().mean().item())
    sure = torch.softmax(logits.double(), dim=1).amax(dim=1)
    assert found["kept"] == pytest.approx(0.9, abs=0.005)
    kept = sure >= sure.quantile(0.1)
    assert found["kept_accuracy"] == pytest.approx((predicted == owners)[kept].double().mean().item(), abs=0.005)
    assert found["calibration_error"] > 0.08
    calibrate(router, logits, owners)
    assert report(router, logits, owners)["calibration_error"] < 0.06


def test_the_calibration_error_of_two_bins() -> None:
    confidence = np.array([0.41, 0.42, 0.95, 0.97])
    right = np.array([True, False, True, True])
    assert calibration_error(confidence, right) == pytest.approx(0.5 * abs(0.5 - 0.415) + 0.5 * abs(1 - 0.96))


@pytest.mark.parametrize("kind", ["linear", "nearest_centroid", "mahalanobis"])
def test_rows_of_no_task_fall_back(kind: str) -> None:
    """A distance tells rows that are far from all tasks, a probability those that are between two."""
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(600) % 3
    features = 5 * torch.eye(3, 12)[owners] + torch.randn(600, 12, generator=generator)
    examples = Examples(features[:300], owners[:300], features[300:], owners[300:])
    router = find_kind(kind).fit(RouterConfig(TASKS, 12, kind=kind), examples, {})
    calibrate(router, features[300:], owners[300:])
    set_threshold(router, features[300:], keep=0.95)
    fresh = 5 * torch.eye(3, 12)[owners] + torch.randn(600, 12, generator=generator)
    kept = router.weights(fresh).sum(dim=1)
    assert set(kept.round(decimals=5).tolist()) == {0.0, 1.0}
    assert 0.9 < kept.mean() < 0.99
    between = 5 * torch.eye(3, 12)[[0, 1]].mean(dim=0)
    nobodys = between if kind == "linear" else 30 * torch.eye(12)[5]
    found = router.weights(nobodys + torch.randn(300, 12, generator=generator))
    assert found.sum(dim=1).mean() < (0.3 if kind == "linear" else 0.01)


def test_a_twin_answers_what_falls_back_with_its_shared_expert(families: Any, tmp_path: Path) -> None:
    family = families("bert")
    router = {**family.recipe["router"], "kind": "nearest_centroid", "fallback": "shared", "keep": 0.5, "top_k": 1}
    directory = built({**family.recipe, "router": router}, tmp_path / "twin")
    assert json.loads((directory / "twin.json").read_text())["router"]["fallback"] == "shared"
    twin: Any = TwinModel.from_pretrained(directory)
    shared: Any = TwinModel.from_pretrained(directory, routing="none")
    encoded = twin.encode([("the a cat dog", None), ("why who did not", None), ("zzz " * 20, None)] * 2)
    weights = twin.route_all(encoded)
    assert weights[2].tolist() == weights[5].tolist() == [0.0, 0.0, 0.0]  # of words that no task has
    answers, plain = (model.answer(encoded, ["cola"] * 6) for model in (twin, shared))
    for row, answer, alone in zip(weights, answers, plain, strict=True):
        apart = (answer.logits - alone.logits).abs().max()
        assert apart < 1e-6 if row.sum() == 0 else apart > 1e-3  # batches of other rows may have other last bits
    assert twin.route(**batch(4)).sum(dim=1).unique().numel() <= 2
    with pytest.raises(UnsuitedError, match="names none for a row that falls back"):
        TwinModel.from_pretrained(directory, protocol="routed")


def test_what_is_told_is_measured_on_rows_that_chose_nothing(families: Any, tmp_path: Path) -> None:
    family = families("bert")
    names = list(family.experts)
    changes = {"kind": "nearest_centroid", "fallback": "shared", "keep": 0.5, "held_out": 0.5, "temperature": "auto"}
    router = {**family.recipe["router"], **changes}
    directory = built({**family.recipe, "router": router}, tmp_path / "twin")
    told = json.loads((directory / "twin.json").read_text())["router"]
    rows = read_router_rows(family.root / "router.jsonl", names).train
    parted = divided(rows, names, limit=5500, held_out=0.5, seed=0)
    assert (told["selection_rows"], told["report_rows"]) == (int(parted.choosing.sum()), int(parted.reporting.sum()))
    assert told["reported_on"] == "other held-out training rows"
    twin: Any = TwinModel.from_pretrained(directory)

    def shares(mask: torch.Tensor) -> tuple[float, float]:
        """Return which part of some rows is kept, and of which the own expert's centroid is the nearest."""
        own = [row for row, one in zip(parted.rows, mask, strict=True) if one]
        encoded = twin.encode([(row.text, row.text_pair) for row in own])
        (features,) = twin.features_of(encoded, [-1], batch_size=8)
        logits = twin.router(features)
        right = logits.argmax(dim=1) == torch.tensor([names.index(row.task) for row in own])
        return (logits.amax(dim=1) >= told["threshold"]).double().mean().item(), right.double().mean().item()

    kept, accuracy = shares(parted.choosing)
    assert 0.5 <= kept <= 0.5 + 1.1 / told["selection_rows"]
    assert told["kept"] == pytest.approx(shares(parted.reporting)[0])
    assert told["accuracy"] == pytest.approx(shares(parted.reporting)[1])
    assert told["accuracy"] != pytest.approx(accuracy)
    assert sum(sum(row.values()) for row in told["confusion"].values()) == told["report_rows"]
