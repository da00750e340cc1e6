"""Language models' twins against a dense model made for every sample, and against transformers and peft alone."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.support.dense import dense, mixes
from tests.support.models import CAUSAL_VOCABULARY as VOCABULARY
from twin_bench import InputError, TwinModel
from twin_bench.checkpoints.factors import Factors
from twin_bench.twin.builder import build_twin
from twin_bench.twin.causal import TwinCausalLM, tokens
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.layers import install
from twin_bench.twin.recipe import Recipe

pytestmark = pytest.mark.versions

KINDS = ["llama", "qwen2", "gemma", "gpt2", "opt"]


def prompts(rows: int, seed: int = 0, pad: str = "left") -> dict[str, Tensor]:
    """Return token ids of lengths 9, 8, 7, 6, 9, ..., padded on one side."""
    ids = torch.randint(4, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        gap = row % 4
        mask[row, : gap if pad == "left" else 0] = 0
        mask[row, 9 - gap if pad == "right" else 9 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def unpadded(batch: dict[str, Tensor], row: int) -> Tensor:
    return batch["input_ids"][row][batch["attention_mask"][row].bool()][None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", ["one_hot", "diffuse", "any real number", "mixed", "equal"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_logits_equal_the_dense_fusion_of_every_sample(
    causal_families: Any, causal_twins: Any, kind: str, mix: str, pad: str
) -> None:
    twin = TwinModel.from_pretrained(causal_twins(kind))
    batch, weights = prompts(4, pad=pad), mixes(4, 3)[mix]
    found = twin(**batch, fusion_weights=weights).logits
    for row in range(4):
        with torch.no_grad():
            expected = dense(causal_families(kind), weights[row])(unpadded(batch, row)).logits[0]
        own = found[row][batch["attention_mask"][row].bool()].double()
        assert (own - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", ["one_hot", "mixed", "equal"])
def test_greedy_text_is_the_dense_models_own(causal_families: Any, causal_twins: Any, kind: str, mix: str) -> None:
    """A batch with its own weights a row and a KV cache, against one dense model a row without one."""
    twin = TwinModel.from_pretrained(causal_twins(kind))
    batch, weights = prompts(4), mixes(4, 3)[mix]
    texts = twin.generate(**batch, fusion_weights=weights, max_new_tokens=8, do_sample=False)
    for row in range(4):
        model, ids = dense(causal_families(kind), weights[row]), unpadded(batch, row)
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
            if ids[0, -1] == model.config.eos_token_id:
                break
        new = ids[0, int(batch["attention_mask"][row].sum()) :]
        assert texts[row, 9 : 9 + len(new)].tolist() == new.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_weights_from_a_shared_prefix_are_those_of_each_prompt_alone(causal_twins: Any, kind: str, layer: int) -> None:
    twin = TwinModel.from_pretrained(causal_twins(kind))
    assert twin.router is not None
    twin.router.config = dataclasses.replace(twin.router.config, layer=layer)
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(4, 26, (25,), generator=generator).tolist()
    rows = [start + torch.randint(4, 26, (3 + row,), generator=generator).tolist() for row in range(5)] + [[5, 6, 7]]
    found = twin.route_all([tokens(row) for row in rows], batch_size=3)
    for row, weights in zip(rows, found, strict=True):
        torch.testing.assert_close(weights, twin.route(torch.tensor([row]))[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_no_weight(causal_twins: Any, kind: str) -> None:
    twin = TwinModel.from_pretrained(causal_twins(kind))
    left, right = (prompts(4, pad=side) for side in ("left", "right"))
    for batch in (left, right):
        alone = torch.cat([twin.route(unpadded(batch, row)) for row in range(4)])
        torch.testing.assert_close(twin.route(**batch), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_experts_come_back_at_weight_one(causal_families: Any, tmp_path: Path, kind: str) -> None:
    """Experts as adapters of several ranks, targets and scales: density 1 and weight 1 is what peft merges."""
    family = causal_families(kind)
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[kind]
    settings = [
        {"r": 2, "lora_alpha": 5, "target_modules": targets[:1]},
        {"r": 4, "lora_alpha": 3, "target_modules": targets, "use_rslora": True},
    ]
    merged = {}
    for index, options in enumerate(settings):
        torch.manual_seed(index)
        config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2", **options)
        adapted = peft.get_peft_model(copy.deepcopy(family.base), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3)
        adapted.save_pretrained(tmp_path / f"expert{index}")
        merged[f"expert{index}"] = adapted.merge_and_unload().eval()
    recipe = {
        "base_model": family.recipe["base_model"],
        "experts": {name: str(tmp_path / name) for name in merged},
        "exclusive": {"density": 1.0},
    }
    build_twin(Recipe.model_validate(recipe), tmp_path / "twin")
    twin = TwinModel.from_pretrained(tmp_path / "twin")
    ids = prompts(3)["input_ids"]
    for index, model in enumerate(merged.values()):
        with torch.no_grad():
            expected = model(ids).logits
        found = twin(ids, fusion_weights=torch.eye(2)[index].repeat(3, 1)).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_peft_loads_each_expert_as_it_is(causal_families: Any, causal_twins: Any) -> None:
    """Qwen2's output layer is not tied, so an adapter says all of an expert but its 1-D parameters."""
    directory = causal_twins("qwen2")
    twin = TwinModel.from_pretrained(directory)
    for layer in twin.fusion.layers:
        layer.vectors = layer.bias_vectors = None
    ids = prompts(3)["input_ids"]
    for index, name in enumerate(twin.expert_names):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model")
        adapted = peft.PeftModel.from_pretrained(model, str(directory / "experts" / name)).eval()
        with torch.no_grad():
            expected = adapted(ids).logits
        found = twin(ids, fusion_weights=torch.eye(3)[index].repeat(3, 1)).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_close_as_its_rounding(causal_families: Any, causal_twins: Any, dtype: str) -> None:
    twin = TwinModel.from_pretrained(causal_twins("llama"), dtype=dtype)
    assert twin.model.dtype == getattr(torch, dtype)
    batch, weights = prompts(4), mixes(4, 3)["mixed"]
    exact = TwinModel.from_pretrained(causal_twins("llama"))(**batch, fusion_weights=weights).logits
    found = twin(**batch, fusion_weights=weights).logits.float()
    kept = batch["attention_mask"].bool()
    error = (found[kept] - exact[kept]).norm() / exact[kept].norm()
    assert 0 < error < 20 * torch.finfo(getattr(torch, dtype)).eps


def test_inputs_that_cannot_be_answered(causal_twins: Any) -> None:
    twin = TwinModel.from_pretrained(causal_twins("llama"))
    ids = prompts(2)["input_ids"]
    for wrong, says in (
        ({"input_ids": torch.full((1, 65), 5)}, "an input of 65 tokens; the model's window is 64"),
        ({"input_ids": ids[:, :0]}, "an empty context"),
        ({"input_ids": ids, "attention_mask": torch.zeros_like(ids)}, "an empty context"),
        ({"input_ids": ids + VOCABULARY}, "the model's vocabulary has"),
        ({"input_ids": ids - 100}, "token -"),
    ):
        with pytest.raises(InputError, match=says):
            twin(**wrong)
        with pytest.raises(InputError, match=says):
            twin.generate(**wrong)
    with pytest.raises(InputError, match="padded on the left"):
        twin.generate(**prompts(2, pad="right"))
    assert isinstance(twin, TwinCausalLM)


def test_a_classifier_twin_is_no_language_models(families: Any, tmp_path: Path) -> None:
    recipe = {**families("bert").recipe, "router": None}
    build_twin(Recipe.model_validate(recipe), tmp_path / "twin")
    assert not hasattr(TwinModel.from_pretrained(tmp_path / "twin"), "generate")
    with pytest.raises(InputError, match="a sequence_classification twin, which TwinCausalLM does not serve"):
        TwinCausalLM.from_pretrained(tmp_path / "twin")


def test_experts_of_another_vocabulary_or_base(causal_families: Any, tmp_path: Path) -> None:
    family = causal_families("llama")
    config = transformers.LlamaConfig(**{**family.base.config.to_dict(), "vocab_size": VOCABULARY + 2})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "larger")
    other = causal_families("qwen2").recipe["experts"]["mmlu"]
    for expert, says in (
        (str(tmp_path / "larger"), f"vocab_size is {VOCABULARY + 2}, the base model's is {VOCABULARY}.*resize"),
        (other, "model_type is qwen2, the base model's is llama"),
    ):
        recipe = {**family.recipe, "experts": {"mmlu": expert}, "router": None}
        with pytest.raises(InputError, match=says):
            build_twin(Recipe.model_validate(recipe), tmp_path / "twin")
    adapted = peft.get_peft_model(
        copy.deepcopy(causal_families("gpt2").base), peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path / "adapter")
    recipe = {**family.recipe, "experts": {"mmlu": str(tmp_path / "adapter")}, "router": None}
    with pytest.raises(InputError, match="adapts a module that the base model does not have"):
        build_twin(Recipe.model_validate(recipe), tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


def test_what_sees_tokens_without_their_rows_is_refused() -> None:
    factors = Factors(torch.ones(3, 1), torch.ones(1, 3))
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3)]), "shared_experts": nn.Linear(3, 3)})
    install(model, {"one": Exclusive({"shared_experts.weight": factors}, {})})
    with pytest.raises(InputError, match=r"experts\.0\.weight belongs to one expert of a mixture"):
        install(model, {"one": Exclusive({"experts.0.weight": factors}, {})})


def test_embeddings_of_a_kind_of_their_own_are_refused() -> None:
    class Sinusoidal(nn.Embedding):
        pass

    model = nn.ModuleDict({"embed_positions": Sinusoidal(3, 3)})
    factors = Factors(torch.ones(3, 1), torch.ones(1, 3))
    with pytest.raises(InputError, match=r"embed_positions\.weight belongs to a Sinusoidal: "):
        install(model, {"one": Exclusive({"embed_positions.weight": factors}, {})})
