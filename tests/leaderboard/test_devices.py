"""Methods that compute on the device of a run: no operation mixes devices, and the answers are the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.contenders import served
from tests.support.models import WORDS
from tests.support.pretend_device import DEVICE, pretended
from twin_bench.twin import speed
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.routers import training as router_training

LEARNING = {"steps": 2, "learning_rate": 0.05, "batch_size": 4}
METHODS: dict[str, dict[str, Any]] = {
    "adamerging": LEARNING,
    "adarank": LEARNING,
    "fisher": {},
    "regmean": {},
    "regmean_plus_plus": {},
    "smile": {"rank": 4, "gate_rank": 2},
    "wemoe": LEARNING,
}


def answers(twin: Any) -> torch.Tensor:
    assert isinstance(twin, TwinClassifier)
    texts = [(" ".join(WORDS[row : 2 * row + 2]), None) for row in range(6)]
    return torch.stack([answer.logits.cpu() for answer in twin.classify(texts, ["mnli"] * 6)])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_a_device_answers_as_on_the_cpu(tiny: dict[str, Any], method: str, tmp_path: Path) -> None:
    suite = {**tiny, "methods": [{method: METHODS[method]}], "calibration_rows": 2}
    expected = answers(served(suite, method, tmp_path / "cpu", rows=12).twin)
    with pretended() as ran:
        made = served(suite, method, tmp_path / "there", rows=12, device=DEVICE)
        assert ran["mm"] + ran["addmm"] > 10
        found = answers(made.twin.to(DEVICE))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_twin_is_built_and_answers_on_a_device(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries with masks and signs, and a router that is trained through the fused model."""
    for module, name, value in (
        (speed, "SIDE", 128),
        (speed, "COPIED", 1 << 12),
        (router_training, "ROWS", 8),
        (router_training, "CHOOSING_ROWS", 4),
    ):
        monkeypatch.setattr(module, name, value)
    exclusive = {"kind": "sign_mask", "density": 0.3}
    router = {"kind": "linear", "objective": "task_loss", "fallback": "shared", "max_rows": 20, "paper": False}
    suite = {**tiny, "methods": [{"twin": {"exclusive": exclusive, "router": router}}]}
    expected = answers(served(suite, "twin", tmp_path / "cpu", rows=12).twin)
    with pretended() as ran:
        made = served(suite, "twin", tmp_path / "there", rows=12, device=DEVICE)
        assert ran["masked_scatter"] + ran["masked_scatter_"] > 10
        found = answers(made.twin.to(DEVICE))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
