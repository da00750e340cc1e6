"""A budget that holds nothing is refused before a merge is made; the least one that is named is enough."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.support.families import built
from twin_bench import InputError
from twin_bench.twin.directory import load_parts


@pytest.mark.parametrize("bits", [None, 4])
def test_the_least_budget_is_known_before_the_merge(families: Any, tmp_path: Path, bits: int | None) -> None:
    recipe = {**families("bert").recipe, "router": None}

    def within(budget: Any, **further: Any) -> Path:
        exclusive = {"budget": budget, **({"bits": bits} if bits else {}), **further}
        return built({**recipe, "exclusive": exclusive}, tmp_path / "twin")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twin_bench.twin.shared.merge_lazily", None)
        for small in (1e-4, {"bytes": 100}):
            with pytest.raises(InputError, match=r"too small for expert 'cola': its vectors take \d+, and rank 1 of"):
                within(small)
        with pytest.raises(InputError, match="too small for expert") as refused:
            within({"bytes": 1})
        least = int(re.findall(r"give at least (\d+)", str(refused.value))[0])
        with pytest.raises(InputError, match="too small for expert 'cola': its vectors take 0, and rank 1 of"):
            within({"bytes": 10}, from_layer=1)
        with pytest.raises(InputError, match=f"a budget of {least - 1} bytes is too small"):
            within({"bytes": least - 1})
    parts = load_parts(within({"bytes": least})).exclusive
    assert max(own.nbytes() for own in parts.values()) == least


@pytest.fixture
def lora_recipe(causal_families: Any, tmp_path: Path) -> dict[str, Any]:
    """Return a recipe of two LoRA experts on q_proj (24 x 24) and down_proj (24 x 40)."""
    family, config = causal_families("llama"), {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    for seed, name in enumerate(("mmlu", "bbq")):
        adapted = peft.get_peft_model(copy.deepcopy(family.base), peft.LoraConfig(task_type="CAUSAL_LM", **config))
        torch.manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(tmp_path / name)
    experts = {name: str(tmp_path / name) for name in ("mmlu", "bbq")}
    return {**family.recipe, "experts": experts, "router": None}


def test_an_adapters_budget_is_for_what_it_changes(lora_recipe: dict[str, Any], tmp_path: Path) -> None:
    """No vector differs, and the smallest matrices, which no adapter changes, are not what a budget must hold."""
    with pytest.raises(InputError, match="its vectors take 0, and rank 1 of the smallest matrix") as refused:
        built({**lora_recipe, "exclusive": {"budget": {"bytes": 1}}}, tmp_path / "twin")
    least = int(re.findall(r"give at least (\d+)", str(refused.value))[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twin_bench.twin.shared.merge_lazily", None)
        with pytest.raises(InputError, match=f"give at least {least}"):
            built({**lora_recipe, "exclusive": {"budget": {"bytes": least - 1}}}, tmp_path / "twin")
    parts = load_parts(built({**lora_recipe, "exclusive": {"budget": {"bytes": least}}}, tmp_path / "twin"))
    assert {own.nbytes() for own in parts.exclusive.values()} == {least}


def test_one_expert_may_be_the_shared_expert(causal_families: Any, tmp_path: Path) -> None:
    """Nothing of it is left to be kept then, and any budget is enough."""
    family = causal_families("llama")
    alone = {"mmlu": family.recipe["base_model"]}
    recipe = {**family.recipe, "experts": alone, "router": None, "exclusive": {"budget": {"bytes": 1}}}
    assert not load_parts(built(recipe, tmp_path / "twin")).exclusive["mmlu"].nbytes()


def test_what_all_experts_share_is_not_counted(families: Any, tmp_path: Path) -> None:
    """Two experts with equal vectors: those of the average are the same."""
    family = families("bert")
    recipe = {**family.recipe, "router": None, "exclusive": {"budget": {"bytes": 1}}}
    (name, expert), *_ = family.recipe["experts"].items()
    recipe["experts"] = {name: expert, "twin": expert}
    with pytest.raises(InputError, match="its vectors take 0, and rank 1 of"):
        built(recipe, tmp_path / "twin")


def test_a_budget_that_holds_nothing_is_refused_before_anything_is_decomposed(
    families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families("bert")
    (name, expert), *_ = family.recipe["experts"].items()
    recipe = {**family.recipe, "experts": {name: expert}, "router": None, "exclusive": {"budget": {"bytes": 1}}}
    decomposed = "twin_bench.twin.exclusive.vector.truncated_svd"
    monkeypatch.setattr(decomposed, lambda *_, **__: pytest.fail("a matrix is decomposed"))
    with pytest.raises(InputError, match=r"a budget of 1 bytes is too small for expert 'cola'"):
        built(recipe, tmp_path / "twin")


def test_one_expert_that_ties_takes_over_needs_no_bytes(families: Any, tmp_path: Path) -> None:
    """TIES that trims nothing and scales by 1 returns a single expert, bit for bit."""
    family = families("bert")
    (name, expert), *_ = family.recipe["experts"].items()
    recipe = {**family.recipe, "experts": {name: expert}, "router": None, "exclusive": {"budget": {"bytes": 1}}}
    whole = {"method": "ties", "density": 1.0, "scaling": 1.0}
    assert not load_parts(built({**recipe, "shared": whole}, tmp_path / "twin")).exclusive[name].nbytes()
    with pytest.raises(InputError, match="a budget of 1 bytes is too small for expert 'cola'"):
        built({**recipe, "shared": {"method": "ties"}}, tmp_path / "other")


def test_full_checkpoints_that_change_vectors_alone_need_no_direction(families: Any, tmp_path: Path) -> None:
    """As biases alone are trained (BitFit). No matrix differs, so that none needs room."""
    family, experts = families("bert"), {}
    for name in ("cola", "stsb"):
        model = copy.deepcopy(family.experts[name])
        for parameter, values in model.base_model.named_parameters():
            if values.ndim > 1:
                values.data.copy_(family.base.base_model.get_parameter(parameter))
        model.save_pretrained(tmp_path / name)
        experts[name] = str(tmp_path / name)
    vectors = 4 * sum(p.numel() for p in family.base.base_model.parameters() if p.ndim == 1)
    recipe = {**family.recipe, "experts": experts, "router": None}
    with pytest.raises(InputError, match=f"its vectors take {vectors}; give at least {vectors}"):
        built({**recipe, "exclusive": {"budget": {"bytes": vectors - 1}}}, tmp_path / "twin")
    parts = load_parts(built({**recipe, "exclusive": {"budget": {"bytes": vectors}}}, tmp_path / "twin"))
    assert {own.nbytes() for own in parts.exclusive.values()} == {vectors}
