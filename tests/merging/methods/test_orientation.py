"""Weights that are stored (in, out), as GPT-2's Conv1D layers store them, merge as torch.nn.Linear's do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import twin_bench
from tests.support.merges import STATIC
from tests.support.models import tiny_causal, tiny_causal_tokenizer
from twin_bench.checkpoints.sources import Sources, open_sources
from twin_bench.merging.export import merge_to_directory
from twin_bench.merging.recipe import MergeRecipe
from twin_bench.twin.paper import merge_lora_factors

OPTIONS: dict[str, dict[str, Any]] = {"wudi": {"learning_rate": 1e-2, "steps": 40}}
AS_STORED = {"della", "dare_ties", "dare_task_arithmetic"}
"""DELLA's rows are those of the tensor as it is stored, as in its authors' code. So is the order of random draws."""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpt2")
    base = tiny_causal("gpt2")
    for name, model in {"base": base, **{f"e{seed}": tiny_causal("gpt2", seed, like=base) for seed in (1, 2)}}.items():
        model.save_pretrained(root / name)
        tiny_causal_tokenizer().save_pretrained(root / name)
    return root


def experts_of(root: Path) -> dict[str, str]:
    return {"a": str(root / "e1"), "b": str(root / "e2")}


def turned(parameters: Any, names: frozenset[str]) -> dict[str, Tensor]:
    return {name: tensor.T.contiguous() if name in names else tensor for name, tensor in parameters.items()}


def conv1d_weights(root: Path) -> frozenset[str]:
    modules = AutoModelForCausalLM.from_pretrained(root / "base").named_modules()
    return frozenset(f"{path}.weight" for path, module in modules if isinstance(module, Conv1D))


@pytest.mark.parametrize("name", [name for name in STATIC if name not in AS_STORED])
def test_a_gpt2_with_linear_layers_gives_the_turned_result(gpt2: Path, name: str) -> None:
    sources, turn = open_sources(str(gpt2 / "base"), experts_of(gpt2)), conv1d_weights(gpt2)
    assert {"transformer.h.0.attn.c_proj.weight", "transformer.h.1.mlp.c_fc.weight"} < turn  # one is square
    linear = {task: turned(expert, turn) for task, expert in sources.experts.items()}
    options = OPTIONS.get(name, {})
    expected = twin_bench.merge(name, turned(sources.base, turn), linear, **options)
    found = twin_bench.merge(name, sources.base, sources.experts, transposed=turn, **options)
    for parameter, tensor in expected.items():
        moved = (tensor - turned(sources.base, turn)[parameter]).abs().max()
        torch.testing.assert_close(
            turned(found, turn)[parameter], tensor, rtol=0, atol=1e-6 + 2e-5 * float(moved), msg=parameter
        )


@pytest.mark.parametrize("name", ["wudi", "knots", "iso_cts"])
def test_orientation_decides_and_reaches_every_way_to_merge(gpt2: Path, tmp_path: Path, name: str) -> None:
    sources, options = open_sources(str(gpt2 / "base"), experts_of(gpt2)), OPTIONS.get(name, {})
    turn = conv1d_weights(gpt2)
    wrong = twin_bench.merge(name, sources.base, sources.experts, **options)
    expected = twin_bench.merge(name, sources.base, sources.experts, transposed=turn, **options)
    square = "transformer.h.0.attn.c_proj.weight"
    assert (wrong[square] - expected[square]).abs().max() > 0.01
    recipe = {"base_model": str(gpt2 / "base"), "experts": experts_of(gpt2), "merge": {"method": name, **options}}
    merge_to_directory(MergeRecipe.model_validate(recipe), tmp_path / "merged")
    written = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    assert torch.equal(written[square], expected[square])
    lines = twin_bench.merge("lines", sources.base, sources.experts, transposed=turn, merge=name, alpha=1.0, beta=0.0)
    alone = twin_bench.merge(name, sources.base, sources.experts, transposed=turn)
    torch.testing.assert_close(lines[square], alone[square])


def test_conv1d_adapters_under_protocol_paper_are_those_that_peft_merges(gpt2: Path, tmp_path: Path) -> None:
    """One expert under task arithmetic with scaling 1 is that expert; a square matrix was added the wrong way round."""
    base = AutoModelForCausalLM.from_pretrained(gpt2 / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_proj"], r=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    sources: Sources = open_sources(str(gpt2 / "base"), {"a": str(tmp_path / "adapter")})
    found = merge_lora_factors("task_arithmetic", sources.base, sources.experts, scaling=1.0)
    for name, parameter in adapted.merge_and_unload().named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-6)
