"""The bytes that methods keep, against counts of the models' own parameters and against files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.support.contenders import all_served, served
from twin_bench.adaptive.smile import SmileLinear
from twin_bench.checkpoints.sources import open_sources
from twin_bench.contenders import base_bytes
from twin_bench.contenders.storage import data_bytes, model_bytes

FLOAT = 4
SHORT = {"steps": 1, "learning_rate": 0.05}


def backbone(model: Any) -> int:
    """Return how many parameters a classifier has without its head."""
    return sum(parameter.numel() for parameter in model.base_model.parameters())


def heads(family: Any) -> int:
    return sum(p.numel() for model in family.experts.values() for p in model.classifier.parameters())


@pytest.mark.parametrize(
    ("method", "models"),
    [("pretrained", 1), ("average", 1), ({"adamerging": SHORT}, 1), ("experts", 3), ("dawin", 4)],
    ids=str,
)
def test_whole_models_and_every_experts_head(
    method: Any, models: int, families: Any, tiny: dict[str, Any], tmp_path: Path
) -> None:
    family, label = families("bert"), method if isinstance(method, str) else next(iter(method))
    for made in all_served({**tiny, "methods": [method]}, label, tmp_path):
        assert made.parameters == models * backbone(family.base)
        assert made.stored_bytes == FLOAT * (models * backbone(family.base) + heads(family))
        assert made.build_seconds is not None
        assert made.build_peak_bytes is not None
    sources = open_sources(tiny["base_model"], tiny["experts"])
    assert base_bytes(sources) == FLOAT * backbone(family.base)


def test_masks_count_in_bits(families: Any, tiny: dict[str, Any], tmp_path: Path) -> None:
    family, made = families("bert"), all_served({**tiny, "methods": ["emr"]}, "emr", tmp_path)
    one, masks = backbone(family.base), 3 * (math.ceil(backbone(family.base) / 32) + 1)
    assert [contender.parameters for contender in made] == [2 * one + masks] * 3
    assert [contender.stored_bytes for contender in made] == [FLOAT * (2 * one + masks + heads(family))] * 3


def test_gates_and_factors_count(families: Any, tiny: dict[str, Any], tmp_path: Path) -> None:
    family, methods = families("bert"), [{"wemoe": SHORT}, {"smile": {"rank": 3, "gate_rank": 2}}]
    plain = backbone(family.base) + heads(family)
    mlp = sum(p.numel() for name, p in family.base.named_parameters() if ".intermediate." in name or "t.dense" in name)
    mlp -= sum(p.numel() for name, p in family.base.named_parameters() if "attention.output.dense" in name)
    wemoe = served({**tiny, "methods": methods}, "wemoe", tmp_path)
    gates = sum(parameter.numel() for parameter in wemoe.twin.model.gates.parameters())
    assert gates > 0
    assert wemoe.stored_bytes == FLOAT * (plain + 3 * mlp + gates)
    for dtype in (None, "bfloat16"):  # the dtype in which a suite runs changes nothing of what is stored
        smile = served({**tiny, "methods": methods, "dtype": dtype}, "smile", tmp_path)
        layers = [layer for layer in smile.twin.modules() if isinstance(layer, SmileLinear)]
        kept = [t for layer in layers for t in (layer.A, layer.B, layer.V, layer.bias_vectors) if t is not None]
        assert smile.stored_bytes == FLOAT * (plain + sum(tensor.numel() for tensor in kept))


@pytest.mark.parametrize("protocol", ["standard", "routed", "paper"])
def test_a_twins_bytes_are_those_of_its_files(protocol: Any, tiny: dict[str, Any], tmp_path: Path) -> None:
    (made,) = all_served({**tiny, "methods": [{"twin": {"router": {"epochs": 2}}}]}, "twin", tmp_path, None, protocol)
    (directory,) = (folder for folder in tmp_path.iterdir() if (folder / "twin.json").is_file())
    files = list((directory / "model").glob("*.safetensors")) + list((directory / "experts").rglob("*.safetensors"))
    router = directory / "router" / ("paper" if protocol == "paper" else ".")
    files += list(router.glob("*.safetensors"))
    assert len(files) == 1 + 3 * 3 + (2 if protocol == "paper" else 1)
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert made.stored_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    on_disk = sum(file.stat().st_size for file in files)
    assert 0 < on_disk - made.stored_bytes < 5_000 * len(files)  # the headers
    assert made.build_peak_bytes is not None
    (again,) = all_served({**tiny, "methods": [{"twin": {"router": {"epochs": 2}}}]}, "twin", tmp_path, None, protocol)
    assert again.build == made.build


def test_a_twin_that_is_told_the_task_keeps_no_router(tiny: dict[str, Any], tmp_path: Path) -> None:
    settings = {"method": "twin", "router": {"epochs": 2}}
    suite = {**tiny, "methods": [{"twin": settings}, {"told": {**settings, "weights": "task"}}]}
    routed, told = (served(suite, label, tmp_path) for label in ("twin", "told"))
    (router,) = tmp_path.glob("*/router/router.safetensors")
    assert routed.stored_bytes - told.stored_bytes == data_bytes(router)


def test_an_adapter_counts_as_a_whole_model_of_the_base_models_dtype(families: Any, tmp_path: Path) -> None:
    family = families("bert")
    base = type(family.base).from_pretrained(family.root / "base").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    tokenizer = family.root / "base"
    for file in tokenizer.glob("*token*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    peft.get_peft_model(base.float(), config).save_pretrained(tmp_path / "cola")
    sources = open_sources(str(tmp_path / "base"), {"cola": str(tmp_path / "cola"), "stsb": str(family.root / "stsb")})
    one = backbone(family.base)
    assert base_bytes(sources) == 2 * one
    assert model_bytes(sources, sources.experts["cola"]) == 2 * one
    assert model_bytes(sources, sources.experts["stsb"]) == FLOAT * one
