"""AdaMerging against autograd through every expert's copy of the model, and torch.optim.Adam, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.support.setting import Setting
from twin_bench import InputError
from twin_bench.adaptive.adamerging import learn_coefficients, merge_with_coefficients
from twin_bench.adaptive.entropy import entropy_gradient
from twin_bench.adaptive.unlabelled import entropy, unlabelled_batches
from twin_bench.errors import UnsuitedError
from twin_bench.merging.task_vectors import TaskVectors

INERT = "key.bias"
"""Attention does not depend on it, so that its gradient is rounding, which Adam blows up to steps of any sign."""


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_slopes_are_autograds_through_the_merge(kind: str) -> None:
    setting = Setting(kind)
    generator = torch.Generator().manual_seed(1)
    coefficients = {name: torch.rand(3, generator=generator).double().requires_grad_() for name in setting.base}
    batch = next(unlabelled_batches(setting.twin, setting.rows, batch_size=4, seed=0))
    assert list(batch) == ["cola", "mnli"]
    sum(setting.naive_loss(task, inputs, coefficients) for task, inputs in batch.items()).backward()
    vectors = TaskVectors(setting.base, setting.tuned)
    merged = merge_with_coefficients(vectors, {name: c.detach() for name, c in coefficients.items()})
    gradients = entropy_gradient(setting.twin, iter([batch]))(merged)
    for name, expected in coefficients.items():
        found = (gradients[name] * vectors[name]).flatten(1).sum(dim=1)
        torch.testing.assert_close(found, expected.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("start", [0.3, 0.999])
def test_steps_are_those_of_the_authors_loop(setting: Setting, start: float) -> None:
    """Started at 0.999 some coefficients reach the clamp, past which they have no gradient."""
    options = {"batch_size": 4, "seed": 3}
    lambdas = {name: torch.full((3,), start, dtype=torch.float64, requires_grad=True) for name in setting.base}
    adam = torch.optim.Adam(lambdas.values(), lr=1e-2)
    for batch in itertools.islice(unlabelled_batches(setting.twin, setting.rows, **options), 6):
        adam.zero_grad()
        sum(setting.naive_loss(task, inputs, lambdas) for task, inputs in batch.items()).backward()
        adam.step()
    vectors = TaskVectors(setting.base, setting.tuned)
    gradient = entropy_gradient(setting.twin, unlabelled_batches(setting.twin, setting.rows, **options))
    found = learn_coefficients(vectors, gradient, scaling=start, steps=6, learning_rate=1e-2)
    assert found.keys() == lambdas.keys()
    compared = [name for name in lambdas if not name.endswith(INERT)]
    for name in compared:
        torch.testing.assert_close(found[name].double(), lambdas[name].detach().clamp(0, 1), rtol=0, atol=1e-5)
    moved = torch.cat([found[name] - start for name in compared])
    assert moved.abs().max() > 1e-3


def test_the_entropy_falls(setting: Setting) -> None:
    vectors = TaskVectors(setting.base, setting.tuned)
    batch = next(unlabelled_batches(setting.twin, setting.rows, batch_size=7, seed=0))
    gradient = entropy_gradient(setting.twin, itertools.repeat(batch))
    found = learn_coefficients(vectors, gradient, scaling=0.3, steps=15, learning_rate=1e-2)
    start = {name: torch.full((3,), 0.3) for name in found}
    losses = [sum(float(setting.naive_loss(task, inputs, c)) for task, inputs in batch.items()) for c in (start, found)]
    assert losses[1] < losses[0]


def test_a_quadratic_loss_is_minimised_at_its_expert() -> None:
    """Without a model: |theta - theta_a|^2 has its minimum at coefficients (1, 0)."""
    generator = torch.Generator().manual_seed(0)
    base = {"matrix": torch.randn(5, 3, generator=generator), "vector": torch.randn(4, generator=generator)}
    tuned = {t: {n: p + torch.randn(p.shape, generator=generator) for n, p in base.items()} for t in ("a", "b")}
    found = learn_coefficients(
        TaskVectors(base, tuned),
        lambda theta: {name: 2 * (parameter - tuned["a"][name]) for name, parameter in theta.items()},
        scaling=0.3,
        steps=400,
        learning_rate=1e-2,
    )
    for coefficients in found.values():
        torch.testing.assert_close(coefficients, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_expert_changed_stays_bit_for_bit(dtype: torch.dtype) -> None:
    base = {"changed": torch.randn(4, 3).to(dtype), "same": torch.randn(6).to(dtype), "ids": torch.arange(3)}
    tuned = {"a": {**base, "changed": base["changed"] + 1}, "b": {**base, "changed": base["changed"] - 0.5}}
    vectors, asked = TaskVectors(base, tuned), []

    def gradient(theta: Any) -> Any:
        asked.append(set(theta))
        return {name: torch.ones_like(parameter) for name, parameter in theta.items()}

    found = learn_coefficients(vectors, gradient, scaling=0.3, steps=3, learning_rate=1e-3)
    merged = merge_with_coefficients(vectors, found)
    assert asked == [{"changed"}] * 3
    assert all(torch.equal(merged[name], base[name]) for name in ("same", "ids"))
    assert merged["changed"].dtype is dtype
    start = learn_coefficients(vectors, gradient, scaling=0.3, steps=0, learning_rate=1e-3)
    expected = base["changed"].double() + 0.3 * sum(
        e["changed"].double() - base["changed"].double() for e in tuned.values()
    )
    exact = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(merge_with_coefficients(vectors, start)["changed"].double(), expected, **exact)


def test_batches_hold_every_row_before_any_comes_again_and_follow_the_seed(setting: Setting) -> None:
    def drawn(seed: int) -> list[list[int]]:
        batches = itertools.islice(unlabelled_batches(setting.twin, setting.rows, batch_size=3, seed=seed), 6)
        return [row for batch in batches for row in batch["cola"]["input_ids"].tolist()]

    def bare(rows: list[list[int]]) -> list[tuple[int, ...]]:
        return sorted(tuple(token for token in row if token) for row in rows)

    texts = [(row.text, None) for row in setting.rows if row.task == "cola"]
    whole = sorted(tuple(row["input_ids"]) for row in setting.twin.encode(texts))
    assert bare(drawn(0)[:7]) == bare(drawn(0)[7:14]) == whole
    assert drawn(0) == drawn(0) != drawn(1)


def test_entropy_is_that_of_the_labels_there_are() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64)
    p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(entropy(logits), -(p * p.log()).sum(dim=1))
    filled = torch.cat([logits, torch.full((5, 2), -torch.inf)], dim=1)
    torch.testing.assert_close(entropy(filled), entropy(logits))
    assert torch.equal(entropy(logits[:, :1]), torch.zeros(5, dtype=torch.float64))


def test_errors(setting: Setting) -> None:
    vectors = TaskVectors(setting.base, setting.tuned)
    with pytest.raises(InputError, match="learning_rate must be above 0"):
        learn_coefficients(vectors, dict, scaling=0.3, steps=1, learning_rate=0)
    with pytest.raises(InputError, match="batch_size must be a whole number from 1"):
        unlabelled_batches(setting.twin, setting.rows, batch_size=0, seed=0)
    with pytest.raises(UnsuitedError, match="no test inputs of mnli"):
        unlabelled_batches(setting.twin, [row for row in setting.rows if row.task == "cola"], batch_size=1, seed=0)
    with pytest.raises(UnsuitedError, match="all tasks are regressions"):
        unlabelled_batches(Setting(labels={"stsb": 1}).twin, [], batch_size=1, seed=0)
