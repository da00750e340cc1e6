"""Twins of every kind of exclusive vectors against a dense model made for every sample, built and read back."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.dense import dense, mixes
from tests.support.exclusive import kept_of
from tests.support.families import Family, built
from tests.support.models import CAUSAL_VOCABULARY as VOCABULARY
from twin_bench import TwinModel
from twin_bench.contenders.storage import data_bytes
from twin_bench.twin.directory import load_parts, read_manifest
from twin_bench.twin.plan import Group

pytestmark = pytest.mark.versions

KINDS: dict[str, dict[str, Any]] = {
    "magnitude": {"kind": "magnitude", "density": 0.3},
    "few": {"kind": "magnitude", "density": 0.02},
    "bernoulli": {"kind": "bernoulli", "density": 0.4},
    "signs": {"kind": "sign_mask"},
    "switch": {"kind": "sign_mask", "density": 0.3},
}
CASES = [
    *(("llama", kind) for kind in KINDS),
    ("gpt2", "switch"),
    ("opt", "magnitude"),
    ("t5", "signs"),
    ("bart", "few"),
]
"""Among them are tied output layers, Conv1D, learned positions, tables shared by two halves and T5's biases."""


@pytest.fixture(scope="module")
def family(causal_families: Any, seq2seq_families: Any) -> Any:
    return lambda model: (seq2seq_families if model in ("t5", "bart") else causal_families)(model)


@pytest.fixture(scope="module")
def directory(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a model and a kind to the twin of its family, built without a router."""

    def build(model: str, kind: str) -> Path:
        recipe = {**family(model).recipe, "exclusive": KINDS[kind], "router": None}
        return built(recipe, tmp_path_factory.mktemp("kind") / "twin")

    return functools.cache(build)


def reference(family: Family, weights: Tensor, kind: str) -> Any:
    def keep(task: str, name: str, v: Tensor) -> Tensor:
        return torch.from_numpy(kept_of(KINDS[kind], task, name, v))

    return dense(family, weights, keep)


def rows_of(count: int) -> dict[str, Tensor]:
    """Return token ids of lengths 9, 8, 7, 6, padded on the right."""
    ids = torch.randint(4, VOCABULARY, (count, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.stack([(torch.arange(9) < 9 - row % 4).long() for row in range(count)])
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_logits_equal_the_dense_fusion_of_every_sample(family: Any, directory: Any, model: str, kind: str) -> None:
    twin: Any = TwinModel.from_pretrained(directory(model, kind))
    inputs, weights = rows_of(3), mixes(3, 3)["mixed"]
    labels = {"labels": torch.tensor([[5, 9, 7, 3]])} if model in ("t5", "bart") else {}
    repeated = {name: tensor.repeat(3, 1) for name, tensor in labels.items()}
    with torch.no_grad(), twin.fused(Group((0, 1, 2), None), weights):
        by_row = twin.model(**inputs, **repeated).logits
    for row in range(3):
        single = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        length = int(single["attention_mask"].sum())
        alone = {name: tensor[:, :length] for name, tensor in single.items()}
        with torch.no_grad(), twin.fused(Group((row,), weights[row]), weights):
            fused = twin.model(**alone, **labels).logits[0]
        with torch.no_grad():
            expected = reference(family(model), weights[row], kind)(**alone, **labels).logits[0]
        for found in (fused, by_row[row, : len(expected)]):
            assert (found.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_files(directory: Any, kind: str) -> None:
    twin = directory("llama", kind)
    manifest = read_manifest(twin)
    files = {name: twin / name for name in manifest["files"] if name.startswith("experts/")}
    assert manifest["bytes"]["exclusive"] == sum(data_bytes(f) for n, f in files.items() if n.endswith(".safetensors"))
    assert manifest["bytes"]["shared"] == data_bytes(twin / "model" / "model.safetensors")
    parts = load_parts(twin)
    assert manifest["parameters"]["exclusive"] == sum(own.numbers() for own in parts.exclusive.values())


def test_texts_and_half_precision(directory: Any) -> None:
    """Fused weights and rows of their own give the same text, and all parts follow a change of dtype."""
    twin: Any = TwinModel.from_pretrained(directory("llama", "switch"))
    inputs, weights = rows_of(3), mixes(3, 3)["mixed"]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    together = twin.generate(**inputs, fusion_weights=weights, max_new_tokens=5, do_sample=False)
    for row in range(3):
        own = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        text = twin.generate(**own, fusion_weights=weights[row : row + 1], max_new_tokens=5, do_sample=False)
        assert text[0].tolist() == together[row, : text.shape[1]].tolist()
    with torch.no_grad():
        expected = twin(**inputs, fusion_weights=weights).logits
        halved = twin.to(torch.bfloat16)(**inputs, fusion_weights=weights).logits
    assert halved.dtype == torch.bfloat16
    assert (halved.float() - expected).norm() < 0.03 * expected.norm()


def test_the_planner_knows_what_entries_cost(directory: Any) -> None:
    """A row of its own costs a whole product for each expert in use; few entries are added at little cost."""
    few, signs = (TwinModel.from_pretrained(directory("llama", kind)).costs for kind in ("few", "signs"))
    for costs in (few, signs):
        assert all(1 <= cost / costs.token < 1.3 for cost in costs.columns)
        assert costs.joint == pytest.approx(sum(costs.columns))
    assert max(few.fuse) < 0.1 * min(signs.fuse) < 10 * signs.token


def test_twins_of_one_shared_expert_share_their_routers_features(directory: Any, causal_twins: Any) -> None:
    twins = [TwinModel.from_pretrained(twin) for twin in (causal_twins("llama"), directory("llama", "signs"))]
    assert len({twin.backbone_digest for twin in twins}) == 1
