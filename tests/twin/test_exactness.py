"""Fusion against a dense reference: theta_s + sum_t w_t v_t, one sample at a time, written here from scratch."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.dense import batch, mixes
from tests.support.families import DENSITY, SCALING, Family
from tests.support.paths import force_path
from twin_bench import TwinModel
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe

pytestmark = pytest.mark.versions

KINDS = ["bert", "roberta", "distilbert", "gpt2"]


def dense_parts(family: Family) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return theta_s and each expert's dense v_t, from the models themselves and the paper's formulas."""
    theta_0 = dict(family.base.base_model.named_parameters())
    thetas = {task: dict(model.base_model.named_parameters()) for task, model in family.experts.items()}
    theta_s = {n: p + SCALING * sum(theta[n] - p for theta in thetas.values()) for n, p in theta_0.items()}
    exclusive: dict[str, dict[str, Tensor]] = {}
    for task, theta in thetas.items():
        exclusive[task] = {}
        for name, shared in theta_s.items():
            v = (theta[name] - shared).detach().double()
            if v.ndim == 2:
                rank = int(DENSITY * min(v.shape))
                U, S, Vh = torch.linalg.svd(v)
                v = U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]
            exclusive[task][name] = v
    return {n: p.detach().double() for n, p in theta_s.items()}, exclusive


@functools.cache
def cached_parts(kind: str, families: Any) -> Any:
    return dense_parts(families(kind))


def dense_logits(family: Family, parts: Any, weights: Tensor, task: str, inputs: dict[str, Tensor]) -> Tensor:
    """Return one sample's logits from a model whose every weight was merged for it, in float64."""
    theta_s, exclusive = parts
    model: Any = copy.deepcopy(family.experts[task]).double()
    with torch.no_grad():
        for name, parameter in model.base_model.named_parameters():
            fused = theta_s[name] + sum(w * exclusive[t][name] for t, w in zip(family.experts, weights, strict=True))
            parameter.copy_(fused)
        logits: Tensor = model(**inputs).logits[0]
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", list(mixes(1, 3)))
@pytest.mark.parametrize("path", ["planned", "fused", "low-rank"])
def test_logits_equal_the_dense_fusion_of_every_sample(
    families: Any, twins: Any, kind: str, mix: str, path: str
) -> None:
    family = families(kind)
    twin = TwinModel.from_pretrained(twins(kind))
    force_path(twin, path)
    rows = 6
    inputs, weights = batch(rows), mixes(rows, 3)[mix]
    tasks = [list(family.experts)[row % 3] for row in range(rows)]
    logits = twin(**inputs, fusion_weights=weights, task=tasks).logits
    expected, found = [], []
    for row, task in enumerate(tasks):
        sample = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        expected.append(dense_logits(family, cached_parts(kind, families), weights[row].double(), task, sample))
        found.append(logits[row, : len(expected[-1])].double())
        assert torch.isneginf(logits[row, len(expected[-1]) :]).all()
    assert (torch.cat(found) - torch.cat(expected)).norm() <= 1e-5 * torch.cat(expected).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_result_does_not_depend_on_its_batch(twins: Any, kind: str) -> None:
    twin = TwinModel.from_pretrained(twins(kind))
    inputs, weights = batch(8), mixes(8, 3)["mixed"]
    together = twin(**inputs, fusion_weights=weights, task="cola").logits
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    permuted = twin(**{n: t[order] for n, t in inputs.items()}, fusion_weights=weights[order], task="cola").logits
    torch.testing.assert_close(permuted, together[order], rtol=1e-5, atol=1e-6)
    for row in range(8):
        alone = twin(
            **{n: t[row : row + 1] for n, t in inputs.items()},
            fusion_weights=weights[row : row + 1],
            task="cola",
        )
        torch.testing.assert_close(alone.logits[0], together[row], rtol=1e-5, atol=1e-6)


def test_a_thousand_fusions_leave_no_trace(twins: Any) -> None:
    twin = TwinModel.from_pretrained(twins("bert"))
    inputs = batch(2)
    first = torch.tensor([0.2, 0.5, 0.3])

    def run(weights: Tensor) -> Tensor:
        with torch.no_grad(), twin.fusion.fuse(weights):
            hidden: Tensor = twin.model.base_model(**inputs).last_hidden_state
        return hidden

    before = run(first)
    for weights in torch.rand(1000, 3, generator=torch.Generator().manual_seed(1)):
        with torch.no_grad(), twin.fusion.fuse(weights):
            pass
    assert torch.equal(run(first), before)


def test_the_whole_experts_come_back_at_full_rank(families: Any, tmp_path: Path) -> None:
    """Weight 1 on one expert at density 1 is that expert, as transformers alone runs it."""
    family = families("roberta")
    recipe = {**family.recipe, "exclusive": {"density": 1.0}, "router": None}
    build_twin(Recipe.model_validate(recipe), tmp_path / "twin")
    twin = TwinModel.from_pretrained(tmp_path / "twin")
    inputs = batch(5)
    for index, (task, model) in enumerate(family.experts.items()):
        weights = torch.eye(3)[index].repeat(5, 1)
        with torch.no_grad():
            expected = model(**inputs).logits
        found = twin(**inputs, fusion_weights=weights, task=task).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
