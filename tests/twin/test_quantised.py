"""Quantised shared experts, against the dense sum of the dequantised weight and the factors. They need bitsandbytes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.dense import batch, mixes
from tests.support.families import built
from twin_bench import InputError, TwinModel
from twin_bench.twin.directory import load_parts
from twin_bench.twin.layers.quantised import TwinQuantised
from twin_bench.twin.recipe import Recipe

ROWS = 4


@pytest.fixture(autouse=True)
def needs_bitsandbytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "without" in request.node.name:
        return
    modules = pytest.importorskip("bitsandbytes.nn.modules", exc_type=ImportError)
    # Its product for AVX-512 takes widths that are multiples of 32 alone, and rounds to bfloat16.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False, raising=False)


def dequantised(layer: Any) -> Tensor:
    """Return the weight (out, in) that a layer of bitsandbytes computes with: its output for each unit vector."""
    eye = torch.eye(layer.in_features)
    with torch.no_grad():
        found: Tensor = layer(eye).T
    return found


def dense_logits(twin: Any, exclusive: Any, weights: Tensor, ids: Tensor) -> Tensor:
    """Return one row's logits of a copy whose layers are dense: W + sum_t w_t B_t A_t."""
    model = copy.deepcopy(twin.model)
    model.__dict__.pop("hf_quantizer", None)
    for name, module in list(model.named_modules()):
        if isinstance(module, TwinQuantised):
            total = dequantised(module.layer)
            for weight, own in zip(weights, exclusive.values(), strict=True):
                if f"{name}.weight" in own.factors:
                    delta = own.factors[f"{name}.weight"].B @ own.factors[f"{name}.weight"].A
                    total = total + weight * (delta.T if module.transposed else delta)
            bias = module.bias
            if bias is not None:
                stored = [own.vectors.get(f"{name}.bias", torch.zeros_like(bias)) for own in exclusive.values()]
                bias = bias + sum(w * v for w, v in zip(weights, stored, strict=True))
            plain = nn.Linear(total.shape[1], total.shape[0], bias=bias is not None)
            plain.weight = nn.Parameter(total)
            if bias is not None:
                plain.bias = nn.Parameter(bias)
            model.set_submodule(name, plain)
    model.requires_grad_(False)
    clone = next(module.fusion for module in model.modules() if hasattr(module, "fusion"))
    with torch.no_grad(), clone.per_row(weights[None]):  # embeddings, norms and the output layer
        found: Tensor = model(ids, use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_logits_are_those_of_the_dequantised_weight_and_the_factors(
    causal_twins: Any, kind: str, quantization: str
) -> None:
    directory = causal_twins(kind)
    twin = TwinModel.from_pretrained(directory, quantization=quantization)
    layers = [layer for layer in twin.model.modules() if isinstance(layer, TwinQuantised)]
    assert len(layers) == {"llama": 14, "gpt2": 8}[kind]
    assert not twin.fusion.keeps_copies
    exclusive = load_parts(directory).exclusive
    ids = batch(ROWS)["input_ids"][:, :6]
    for mix in ("diffuse", "one_hot", "equal", "none"):
        weights = mixes(ROWS, 3)[mix]
        found = twin(ids, fusion_weights=weights).logits  # type: ignore[operator]
        for row in range(ROWS):
            expected = dense_logits(twin, exclusive, weights[row], ids[row : row + 1])
            # 8 bits quantise the activations as well, each row by its own largest one.
            limit = 1e-4 if quantization == "4bit" else 0.05
            assert (found[row] - expected).norm() <= limit * expected.norm()


def test_a_recipe_stores_the_shared_expert_quantised(causal_families: Any, tmp_path: Path) -> None:
    recipe = causal_families("llama").recipe
    directory = built({**recipe, "quantization": "4bit"}, tmp_path / "twin")
    config = json.loads((directory / "model" / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"]
    assert json.loads((directory / "twin.json").read_text())["quantization"] == "4bit"
    stored, loaded = TwinModel.from_pretrained(directory), None
    plain = built(recipe, tmp_path / "plain")
    loaded = TwinModel.from_pretrained(plain, quantization="4bit")
    weights, ids = mixes(ROWS, 3)["diffuse"], batch(ROWS)["input_ids"][:, :6]
    torch.testing.assert_close(
        stored(ids, fusion_weights=weights).logits,  # type: ignore[operator]
        loaded(ids, fusion_weights=weights).logits,  # type: ignore[operator]
    )
    assert stored.route(ids).shape == (ROWS, 3)
    with pytest.raises(InputError, match="model: is quantised already; leave quantization out"):
        TwinModel.from_pretrained(directory, quantization="8bit")
    with pytest.raises(InputError, match="quantised weights can't be offloaded to cpu or disk"):
        TwinModel.from_pretrained(directory, device_map={"": "disk"})


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("5bit", "quantization '5bit': known: 4bit, 8bit, or keys"),
        ({"load_in_4bit": True, "bnb_4bit_quant": "nf4"}, "unknown key 'bnb_4bit_quant'; did you mean"),
        ({"bnb_4bit_quant_type": "nf4"}, "of which load_in_4bit or load_in_8bit is true"),
    ],
)
def test_settings_that_are_none_are_named(causal_twins: Any, asked: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        TwinModel.from_pretrained(causal_twins("llama"), quantization=asked)


def test_classifiers_are_refused(families: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantization: it is for causal language models, not sequence_classif"):
        built({**families("bert").recipe, "quantization": "8bit"}, tmp_path / "twin")


def test_it_is_said_where_one_has_to_do_without(causal_twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = "twin_bench.checkpoints.quantization.importlib.util.find_spec"
    monkeypatch.setattr(found, lambda name: None)
    with pytest.raises(InputError, match=r"need bitsandbytes: pip install 'twin-bench\[quantized\]'"):
        TwinModel.from_pretrained(causal_twins("llama"), quantization="4bit")


def test_the_recipe_of_before_is_the_same() -> None:
    assert Recipe(base_model="b", experts={"a": "e"}).quantization is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activations_are_those_of_whole_weights(causal_twins: Any, kind: str) -> None:
    """A weight in few bits has another shape. There is no fused copy, which no plan chooses then."""
    whole, few = (TwinModel.from_pretrained(causal_twins(kind), quantization=bits) for bits in (None, "4bit"))
    assert (few.sizes.block, few.sizes.cached) == (whole.sizes.block, whole.sizes.cached)
    assert few.sizes.held < whole.sizes.held
    few.limit_memory(few.sizes.held + 10**6)
    weights = mixes(ROWS, 3)["equal"]
    assert all(batch.weights is None for batch in few.planned(weights, [9] * ROWS, 2))
