"""A twin that is moved, converted or used under another grad mode after its first use answers as a new one does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.support.dense import batch
from tests.support.families import built
from twin_bench.twin.model import TwinModel

MIXED, FIRST = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([1.0, 0.0, 0.0])


def fused(twin: TwinModel, weights: torch.Tensor = MIXED) -> torch.Tensor:
    """Return the backbone's last hidden states of a batch, with `weights` fused into every layer."""
    with twin.fusion.fuse(weights):
        return twin.model.base_model(**batch(2)).last_hidden_state


@pytest.fixture(scope="module", params=["bert", "llama", "gpt2"])
def directory(request: pytest.FixtureRequest, families: Any, causal_families: Any, tmp_path_factory: Any) -> Path:
    family = families("bert") if request.param == "bert" else causal_families(request.param)
    return built({**family.recipe, "router": None}, tmp_path_factory.mktemp("moved") / "twin")


@pytest.fixture(scope="module")
def paper_directory(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a twin of LoRA experts, whose layers under protocol paper are of another kind."""
    family, root = causal_families("llama"), tmp_path_factory.mktemp("paper")
    for seed, task in enumerate(family.experts):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(copy.deepcopy(family.base), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3)
        adapted.save_pretrained(root / task)
    experts = {task: str(root / task) for task in family.experts}
    return built({**family.recipe, "experts": experts, "router": None}, root / "twin")


@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_a_fused_weight_of_inference_mode_is_made_anew_outside_it(
    directory: Path, paper_directory: Path, protocol: Any
) -> None:
    directory = directory if protocol == "standard" else paper_directory
    fresh = [TwinModel.from_pretrained(directory, protocol=protocol) for _ in range(2)]
    expected = [fused(twin, weights) for twin, weights in zip(fresh, (MIXED, FIRST), strict=True)]
    assert not torch.equal(*expected)
    twin = TwinModel.from_pretrained(directory, protocol=protocol)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            for weights, answer in zip((MIXED, FIRST), expected, strict=True):
                torch.testing.assert_close(fused(twin, weights), answer)


def test_a_converted_twin_is_fused_anew(directory: Path) -> None:
    """Fused weights that are rounded are not those of rounded factors."""
    used, fresh = (TwinModel.from_pretrained(directory) for _ in range(2))
    fused(used)
    expected = fused(fresh.to(torch.bfloat16))
    assert torch.equal(fused(used.to(torch.bfloat16)), expected)
    assert used.tolerance == fresh.tolerance


def test_the_tolerance_follows_the_dtype(families: Any, tmp_path: Path) -> None:
    directory = built(families("bert").recipe, tmp_path / "twin")
    twin = TwinModel.from_pretrained(directory)
    assert twin.tolerance == torch.finfo(torch.float32).eps / 2
    assert twin.to(torch.bfloat16).tolerance == torch.finfo(torch.bfloat16).eps / 8
    asked = TwinModel.from_pretrained(directory, tolerance=0.01)
    assert asked.to(torch.bfloat16).tolerance == 0.01


def test_what_the_router_reads_moves_with_the_twin(families: Any, tmp_path: Path) -> None:
    """Under paper the router reads the pretrained biases, which are no parameters of the module."""
    recipe = families("bert").recipe
    directory = built({**recipe, "router": None}, tmp_path / "twin")
    twin = TwinModel.from_pretrained(directory, protocol="paper")
    assert twin.router_overrides
    twin.to(torch.float64)
    assert {tensor.dtype for tensor in twin.router_overrides.values()} == {torch.float64}
