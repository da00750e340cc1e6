"""AdaRank against scipy's SVD, and against autograd through the authors' straight-through masks, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.func import functional_call

from tests.support.setting import Setting
from twin_bench import InputError
from twin_bench.adaptive.adarank import START, LearnedRanks
from twin_bench.adaptive.entropy import entropy_gradient
from twin_bench.adaptive.unlabelled import unlabelled_batches
from twin_bench.merging.task_vectors import TaskVectors

INERT = "key.bias"
"""Attention does not depend on it, so that its gradient is rounding, which Adam blows up to steps of any sign."""
TEMPERATURE = 2.0


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def dense(base: Tensor, taus: list[Tensor], coefficients: Any, masks: Any) -> Tensor:
    """theta_0 + sum_t lambda_t U_t diag(m_t s_t) V_t^T, written out with scipy's SVD."""
    for tau, coefficient, mask in zip(taus, coefficients, masks, strict=True):
        U, S, Vh = (torch.tensor(factor) for factor in scipy.linalg.svd(tau.double().numpy(), full_matrices=False))
        base = base + coefficient * U @ torch.diag(mask * S) @ Vh
    return base


class Naive:
    """The authors' module: logits for every component, soft masks whose values are replaced by hard ones."""

    def __init__(self, setting: Setting, scaling: float) -> None:
        self.setting = setting
        self.matrices = {n: p for n, p in setting.base.items() if p.ndim == 2 and "embeddings" not in n}
        self.merged = [n for n, p in setting.base.items() if n in self.matrices or p.ndim == 1]
        make: Any = {"dtype": torch.float64, "requires_grad": True}
        self.coefficients = {name: torch.full((3,), scaling, **make) for name in self.merged}
        self.logits = {name: torch.full((3, min(p.shape)), START, **make) for name, p in self.matrices.items()}

    def parameters(self) -> dict[str, Tensor]:
        found = dict(self.setting.base)
        for name in self.merged:
            taus = [expert[name] - self.setting.base[name] for expert in self.setting.tuned.values()]
            if name in self.matrices:
                soft = (self.logits[name] / TEMPERATURE).sigmoid()
                masks = soft + ((soft > 0.5).double() - soft).detach()
                found[name] = dense(found[name], taus, self.coefficients[name], masks)
            else:
                found[name] = found[name] + torch.stack(taus).T @ self.coefficients[name]
        return found

    def loss(self, batch: Any) -> Tensor:
        parameters, losses = self.parameters(), []
        for task, inputs in batch.items():
            p = functional_call(self.setting.experts[task], parameters, (), dict(inputs)).logits.softmax(dim=1)
            losses.append(-(p * p.log()).sum(dim=1).mean())
        return sum(losses, torch.zeros(()))


def learned(setting: Setting, scaling: float = 0.3) -> LearnedRanks:
    embeddings = [name for name, tensor in setting.base.items() if "embeddings" in name and tensor.ndim == 2]
    vectors = TaskVectors(setting.base, setting.tuned)
    return LearnedRanks(vectors, unmerged=embeddings, scaling=scaling, temperature=TEMPERATURE)


def test_given_masks_make_the_dense_formula(setting: Setting) -> None:
    found = learned(setting)
    generator = torch.Generator().manual_seed(0)
    found.coefficients.copy_(torch.rand(found.coefficients.shape, generator=generator))
    for name, own in found.components.items():
        found.logits[name].copy_(torch.randn(len(own.S), generator=generator, dtype=own.S.dtype))
    merged = found.parameters()
    assert not any("word_embeddings" in name for name in merged)
    for row, (name, own) in enumerate(found.components.items()):
        taus = [expert[name] - setting.base[name] for expert in setting.tuned.values()]
        masks = [(found.logits[name][own.owner == t] > 0).double() for t in range(3)]
        expected = dense(setting.base[name], taus, found.coefficients[row].double(), masks)
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-7)
        assert 0 < sum(float(mask.sum()) for mask in masks) < 3 * min(expected.shape)


def test_steps_are_those_of_the_authors_loop(setting: Setting) -> None:
    """At this rate some logits fall below 0 within the steps, so that components are dropped."""
    options = {"batch_size": 4, "seed": 3}
    naive, found = Naive(setting, 0.3), learned(setting)
    adam = torch.optim.Adam([*naive.coefficients.values(), *naive.logits.values()], lr=0.03)
    for batch in itertools.islice(unlabelled_batches(setting.twin, setting.rows, **options), 6):
        adam.zero_grad()
        naive.loss(batch).backward()
        adam.step()
    batches = unlabelled_batches(setting.twin, setting.rows, **options)
    found.learn(entropy_gradient(setting.twin, batches), steps=6, learning_rate=0.03)
    names = [*found.components, *found.vectors]
    assert set(names) == set(naive.merged)
    for name, coefficients in zip(names, found.coefficients, strict=True):
        if not name.endswith(INERT):
            torch.testing.assert_close(coefficients.double(), naive.coefficients[name].detach(), rtol=0, atol=1e-4)
    dropped = 0
    for name, logits in found.logits.items():
        torch.testing.assert_close(logits, naive.logits[name].detach().flatten(), rtol=0, atol=1e-4)
        dropped += int((logits <= 0).sum())
    assert 0 < dropped < sum(len(logits) for logits in found.logits.values())


def test_the_entropy_falls_and_the_seed_decides(setting: Setting) -> None:
    batch = next(unlabelled_batches(setting.twin, setting.rows, batch_size=7, seed=0))

    def entropy_of(parameters: dict[str, Tensor]) -> float:
        naive = Naive(setting, 0.3)
        naive.parameters = lambda: {**setting.base, **parameters}  # type: ignore[method-assign]
        return float(naive.loss(batch))

    found = learned(setting)
    before = entropy_of(found.parameters())
    found.learn(entropy_gradient(setting.twin, itertools.repeat(batch)), steps=15, learning_rate=0.03)
    assert entropy_of(found.parameters()) < before

    def drawn(seed: int) -> dict[str, Tensor]:
        own = learned(setting)
        batches = unlabelled_batches(setting.twin, setting.rows, batch_size=2, seed=seed)
        own.learn(entropy_gradient(setting.twin, batches), steps=2, learning_rate=0.03)
        return own.parameters()

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert any(not torch.equal(other[name], tensor) for name, tensor in first.items())


def test_errors(setting: Setting) -> None:
    with pytest.raises(InputError, match="adarank: learning_rate must be above 0"):
        learned(setting).learn(dict, steps=1, learning_rate=0)
