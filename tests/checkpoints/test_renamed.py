"""Checkpoints whose tensors transformers renames when it loads them, as the hub stores them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.models import CAUSAL_VOCABULARY, tiny_causal_tokenizer
from twin_bench import InputError, TwinModel
from twin_bench.checkpoints.peft_files import load_adapter
from twin_bench.checkpoints.sources import open_sources
from twin_bench.merging.export import merge_to_directory
from twin_bench.merging.recipe import MergeRecipe
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe

pytestmark = pytest.mark.versions

IDS = torch.randint(4, CAUSAL_VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def tiny_neox(seed: int, directory: Path) -> Any:
    """Save a GPT-NeoX as Pythia's are on the hub, with an embed_out. Return it as transformers loads it."""
    config = transformers.GPTNeoXConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=CAUSAL_VOCABULARY,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
    )
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    stored = {name.replace("lm_head", "embed_out"): tensor for name, tensor in tensors.items()}
    assert "embed_out.weight" in stored
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    tiny_causal_tokenizer().save_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


@torch.no_grad()
def test_gpt_neox_builds_merges_and_loads(tmp_path: Path) -> None:
    models = {name: tiny_neox(seed, tmp_path / name) for seed, name in enumerate(("base", "a", "b"))}
    paths = {name: str(tmp_path / name) for name in ("a", "b")}
    sources = open_sources(str(tmp_path / "base"), paths)
    for name, checkpoint in {"base": sources.base, **sources.experts}.items():
        own = dict(models[name].named_parameters())
        assert checkpoint.keys() == own.keys()
        assert all(torch.equal(checkpoint[key], parameter) for key, parameter in own.items())
    recipe = {"base_model": str(tmp_path / "base"), "experts": paths}
    build_twin(Recipe.model_validate({**recipe, "exclusive": {"density": 1.0}}), tmp_path / "twin")
    twin = TwinModel.from_pretrained(tmp_path / "twin", routing="none")
    for index, name in enumerate(paths):
        found = twin(IDS, fusion_weights=torch.eye(2)[index].repeat(2, 1)).logits
        torch.testing.assert_close(found, models[name](IDS).logits, rtol=1e-4, atol=1e-4)
    folder = tmp_path / "adapter"
    folder.mkdir()
    stored = load_file(tmp_path / "twin/experts/a/adapter_model.safetensors")
    older = {
        key.replace("lm_head", "embed_out"): tensor for key, tensor in stored.items()
    }  # as transformers 4 names it
    save_file(older, folder / "adapter_model.safetensors")
    earlier, now = (load_adapter(path, sources.skeleton) for path in (folder, tmp_path / "twin/experts/a"))
    assert earlier.keys() == now.keys()
    merge_to_directory(MergeRecipe.model_validate({**recipe, "merge": {"method": "average"}}), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, parameter in merged.named_parameters():
        both = [dict(models[task].named_parameters())[name] for task in paths]
        torch.testing.assert_close(parameter, (both[0] + both[1]) / 2, rtol=1e-5, atol=1e-6)


def test_an_adapter_on_the_renamed_layer_is_what_peft_merges(tmp_path: Path) -> None:
    model = tiny_neox(0, tmp_path / "base")
    output = next(name for name in ("lm_head", "embed_out") if hasattr(model, name))
    settings = {"target_modules": ["query_key_value", output], "task_type": "CAUSAL_LM", "r": 3}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key.replace("lm_head", "embed_out"): tensor for key, tensor in load_file(file).items()}, file)
    sources = open_sources(str(tmp_path / "base"), {"a": str(tmp_path / "adapter")})
    for name, parameter in adapted.merge_and_unload().named_parameters():
        torch.testing.assert_close(sources.experts["a"][name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    tiny_neox(0, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if key != "embed_out.weight"}, file)
    output = "lm_head" if int(transformers.__version__.split(".")[0]) > 4 else "embed_out"
    with pytest.raises(InputError, match=rf"base: tensor {output}\.weight is missing"):
        open_sources(str(tmp_path / "base"), {"a": str(tmp_path / "base")})
    assert json.loads((tmp_path / "base" / "config.json").read_text())["model_type"] == "gpt_neox"
