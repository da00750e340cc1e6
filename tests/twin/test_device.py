"""Which device is chosen, and that every way in asks the one function that chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.families import Family
from tests.support.rows import write_rows
from tests.support.suites import run
from twin_bench import cli
from twin_bench.errors import InputError
from twin_bench.twin import device as devices
from twin_bench.twin.builder import build_twin
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.device import fastest_device, usable_device
from twin_bench.twin.model import TwinModel
from twin_bench.twin.recipe import Recipe
from twin_bench.twin.rehearsal import rehearse_generation, rehearse_score
from twin_bench.twin.requests import Generate, Score, generate, score
from twin_bench_lm_eval.base import usable


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_fastest_device_is_chosen(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert fastest_device() == expected
    assert usable(None) == usable("auto") == expected  # lm_eval without --device
    assert usable("cuda:1") == ("cuda:1" if cuda else "cpu")
    assert usable("cpu") == "cpu"


def test_auto_is_the_fastest_and_none_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "fastest_device", lambda: "meta")
    assert usable_device("auto") == torch.device("meta")
    assert usable_device(None) == torch.device("cpu")
    with pytest.raises(InputError, match="device 'tpu'"):
        usable_device("tpu")


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make `fast` a device of this machine, the fastest. Return the devices that twins were moved to."""
    found: list[str] = []
    to = TwinModel.to

    def watched(self: TwinModel, device: Any, *rest: Any) -> Any:
        found.append(str(device))
        return to(self, "cpu" if str(device) == "cpu:0" else device, *rest)

    monkeypatch.setattr(TwinModel, "to", watched)
    monkeypatch.setattr(devices, "fastest_device", lambda: "cpu:0")  # the CPU by a name that nobody else gives
    return found


def test_commands_run_on_the_fastest_device(moved: list[str], families: Any, tmp_path: Path) -> None:
    family: Family = families("bert")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(family.recipe))
    assert cli.main(["build", str(recipe), str(tmp_path / "twin")]) == 0
    assert set(moved) == {"cpu:0"}
    moved.clear()
    data = str(write_rows(tmp_path / "data"))
    command = ["bench", "--twin", str(tmp_path / "twin"), "--data", data, "--rows", "6", "--rounds", "1"]
    assert cli.main([*command, "--merged-rows", "1", "--out", str(tmp_path / "bench.json")]) == 0
    assert moved[0] == "cpu:0"
    moved.clear()
    assert cli.main([*command, "--merged-rows", "1", "--device", "cpu", "--out", str(tmp_path / "bench.json")]) == 0
    assert moved[0] == "cpu"


def test_a_leaderboard_builds_and_scores_on_the_fastest_device(moved: list[str], families: Any, tmp_path: Path) -> None:
    family: Family = families("bert")
    data = write_rows(tmp_path / "data")
    suite = {
        "name": "tiny",
        "base_model": family.recipe["base_model"],
        "experts": family.recipe["experts"],
        "data": str(data),
        "tasks": list(family.labels),
        "methods": ["average", {"twin": {"router": {"epochs": 1}}}],
    }
    assert run(suite, tmp_path / "board", "--limit", "4") == 0
    assert set(moved) == {"cpu:0"}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_gpu_builds_and_answers_as_the_cpu_does(
    families: Any, causal_families: Any, tmp_path: Path, kind: str
) -> None:
    family: Family = (causal_families if kind == "llama" else families)(kind)
    twins = []
    for device in ("cpu", "auto"):
        build_twin(Recipe.model_validate(family.recipe), tmp_path / device, device=device)
        twins.append(TwinModel.from_pretrained(tmp_path / device, device=device))
    texts = [("the cat sat", None), ("a small dog is quick", None), ("who why", None)]
    cpu, gpu = (twin.route_all(twin.encode(texts)) for twin in twins)
    assert gpu.is_cuda
    torch.testing.assert_close(gpu.sum(dim=1).cpu(), torch.ones(3))  # a GPU drops out other features in training
    answers = []
    for twin in twins:
        if isinstance(twin, TwinCausalLM):
            asked = [Score(row["input_ids"], [5, 6]) for row in twin.encode(texts)]
            answers.append([one.log_probs for one in score(twin, asked, fusion_weights=cpu)])
            rehearse_score(twin, asked, 2)
            rehearse_generation(twin, 12, 2)
            generate(twin, [Generate(one.context, 4) for one in asked])
        else:
            assert isinstance(twin, TwinClassifier)
            found = twin.classify(texts, ["cola", "stsb", "mnli"], fusion_weights=cpu)
            answers.append([one.logits for one in found])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
