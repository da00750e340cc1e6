"""Memory: the estimate against what torch allocates, and lists that are answered within a limit."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.allocated import Allocated
from tests.support.random_twins import random_twin
from twin_bench import InputError, TwinModel
from twin_bench.twin import requests, seq2seq_requests
from twin_bench.twin.memory import Budget, Sizes, Use, memory_limit
from twin_bench.twin.plan import Costs, Group, batches, plan
from twin_bench.twin.requests import Generate, Score

BELOW, ABOVE = 0.9, 1.25
"""How far the estimate may lie from what is allocated, as a part of it."""
ROWS = 6
DIFFUSE = torch.softmax(torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0)), dim=1)
DIFFUSE[:, 3] = 0  # the columns of the others are gathered


def allocated(twin: Any, run: Callable[[], object], *, fused: bool) -> int:
    """Return the most bytes of a list that is answered with fused weights, or on the low-rank path."""
    costs = twin.costs
    costs = replace(costs, batch=1e6)  # one batch of all rows
    free = replace(costs, fuse=(0.0,) * 4, rebuild=0.0, columns=(1.0,) * 4, joint=4.0)
    twin.costs = free if fused else replace(costs, rebuild=math.inf)
    run()  # what is made once
    twin.release()
    with Allocated() as found:
        run()
    assert twin.fusion.holds_copies == fused
    twin.costs = costs
    return found.peak


def ragged(length: int) -> list[list[int]]:
    return [[*range(5, 5 + length - row * length // 12)] for row in range(ROWS)]


@pytest.mark.parametrize(
    ("kind", "dtype", "fused"),
    [
        ("llama", torch.float32, True),
        ("llama", torch.bfloat16, False),
        ("grouped", torch.bfloat16, False),
        ("eager", torch.float32, False),
        ("opt", torch.float32, False),
        ("gpt2", torch.bfloat16, True),
        ("bart", torch.float32, False),
        ("t5", torch.float32, False),
        ("gemma2", torch.float32, True),
        ("bloom", torch.float32, False),
    ],
)
def test_the_estimate_is_what_torch_allocates(kind: str, dtype: torch.dtype, fused: bool) -> None:
    """Of log-likelihoods of few and of many tokens, and of texts with and without their logits.

    An encoder and a decoder count as one longer model, which is too much where targets are long.
    """
    twin = random_twin(kind, dtype)
    weights = DIFFUSE[:1].expand(ROWS, -1) if fused else DIFFUSE
    answer: Any = seq2seq_requests if kind in ("bart", "t5") else requests
    above = {"bart": 1.35, "t5": 2.1, "eager": 1.35}.get(kind, ABOVE)
    options: Any = {"batch_size": ROWS, "fusion_weights": weights}
    for length, asked in ((200, 1), (160, 60)):
        contexts = [[9 + row, *own] for row, own in enumerate(ragged(length))]
        scores = [Score(own, [7] * asked) for own in contexts]
        longest = length + asked + (1 if kind in ("bart", "t5") else 0)
        positions = asked if kind in ("bart", "t5") else min(asked * ROWS, longest - min(map(len, contexts)) + 1)
        needed = Budget(twin.sizes, math.inf).needed(ROWS, longest, positions, fused=fused)
        found = allocated(twin, lambda own=scores: answer.score(twin, own, **options), fused=fused)
        assert BELOW * found <= needed <= above * found
    for length, steps, kept in ((100, 4, False), (16, 24, True)):
        texts = [Generate([9 + row, *own], steps) for row, own in enumerate(ragged(length))]
        needed = Budget(twin.sizes, math.inf, Use(steps, logits=kept)).needed(ROWS, length + 1, 1, fused=fused)
        told = {**options, "log_probs": kept}
        found = allocated(twin, lambda own=texts, told=told: answer.generate(twin, own, **told), fused=fused)
        assert BELOW * found <= needed <= above * found


def test_the_cache_of_compiled_steps_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its full length from the first step on, and 8 rows where 6 are asked for."""
    twin = random_twin("llama")
    twin.compiling = "on"
    monkeypatch.setattr(type(twin.steps), "_stepped", lambda steps, plain, args, kwargs: plain(*args, **kwargs))
    texts = [Generate(own, 6) for own in ragged(60)]
    for rows in (ROWS, 2 * ROWS):
        needed = Budget(twin.sizes, math.inf, Use(6, compiled=rows)).needed(ROWS, 60, 1, fused=True)
        options: Any = {"batch_size": rows, "fusion_weights": DIFFUSE[:1].expand(ROWS, -1), "log_probs": False}
        found = allocated(twin, lambda options=options: requests.generate(twin, texts, **options), fused=True)
        assert BELOW * found <= needed <= ABOVE * found


def test_a_shared_prefix_is_counted_once() -> None:
    twin = random_twin("llama")
    every = Group(tuple(range(ROWS)), None)

    def run() -> None:
        prefix = twin.prefix([7] * 150, Group((0,), None), DIFFUSE)
        twin.logits([[5] * 20] * ROWS, [19], every, DIFFUSE, prefix)

    with torch.no_grad(), Allocated() as found:
        run()
    needed = Budget(twin.sizes, math.inf, Use(prefix=150)).needed(ROWS, 20, 1, fused=False)
    assert BELOW * found.peak <= needed <= ABOVE * found.peak
    assert needed < Budget(twin.sizes, math.inf).needed(ROWS, 170, 1, fused=False) / 3


def test_a_prefix_stays_beside_the_texts_behind_it() -> None:
    """Each row has the prefix in its own cache, and the prefix itself waits for other batches."""
    twin = random_twin("llama")
    texts = [Generate([*range(5, 305), 400 + row], 4) for row in range(ROWS)]
    weights = DIFFUSE[:1].expand(ROWS, -1)
    told: Any = {"batch_size": ROWS, "fusion_weights": weights, "log_probs": False}
    found = allocated(twin, lambda: requests.generate(twin, texts, **told), fused=True)
    needed = Budget(twin.sizes, math.inf, Use(4, prefix=300)).needed(ROWS, 1, 1, fused=True)
    assert BELOW * found <= needed <= ABOVE * found
    assert needed < 0.6 * Budget(twin.sizes, math.inf, Use(4)).needed(ROWS, 301, 1, fused=True)


def lists(twin: Any) -> tuple[list[Any], list[Any]]:
    """Return the answers to lists whose rows are fused, take the low-rank path, and share a prefix."""
    few = [Score([5, *range(6, 46), row], [8] * 3) for row in range(40, 48)]
    rows = [Score([9 + row, *own], [7] * 5) for row, own in enumerate(ragged(120))]
    weights = torch.cat([torch.eye(4)[:1].expand(len(few), -1), DIFFUSE])
    scores = requests.score(twin, [*few, *rows], batch_size=8, fusion_weights=weights)
    texts = [Generate(own, 5) for own in ragged(40)]
    written = requests.generate(twin, texts, batch_size=8, fusion_weights=DIFFUSE.roll(1, 0))
    return [one.log_probs for one in scores], [one.tokens for (one,) in written]


def test_a_list_is_answered_within_a_limit() -> None:
    """With room for all, without room for the fused copy, and with room for little more than a row."""
    twin = random_twin("llama")
    twin.costs = replace(twin.costs, rebuild=0.0, fuse=(0.0, 1.0, 1.0, 1.0))  # one-hot rows are fused
    scores, texts = lists(twin)
    assert twin.fusion.holds_copies
    sizes, row = twin.sizes, Budget(twin.sizes, math.inf).needed(1, 126, 126, fused=False)
    for room in (3 * sizes.copy, 1.5 * sizes.copy, 0.9 * sizes.copy, 1.05 * row):
        twin.limit_memory(int(sizes.held + room))
        twin.release()
        with Allocated() as found:
            again, written = lists(twin)
        assert found.peak <= room / BELOW
        for ours, theirs in zip(again, scores, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert written == texts


def test_the_fused_copy_is_freed() -> None:
    """Before a batch that needs its room, and when it is asked for."""
    twin = random_twin("llama")
    with twin.fusion.fuse(DIFFUSE[0]):
        pass
    layer = next(layer for layer in twin.fusion.layers if layer.is_matrix)
    kept = weakref.ref(layer.fused_weight)
    weights, every = DIFFUSE, Group(tuple(range(ROWS)), None)
    with twin.fused(every, weights):
        assert kept() is not None
    with twin.fused(every._replace(crowded=True), weights):
        assert kept() is None
    assert not twin.fusion.holds_copies
    with twin.fusion.fuse(DIFFUSE[0]):
        pass
    assert twin.fusion.holds_copies
    twin.release()
    assert not twin.fusion.holds_copies


def test_what_cannot_fit_is_refused_in_one_line() -> None:
    twin = random_twin("llama")
    sizes = twin.sizes
    with pytest.raises(InputError, match=rf"max_memory {sizes.held}: the twin alone takes 4\.66 MB; give more"):
        twin.limit_memory(sizes.held)
    twin.limit_memory(sizes.held + 1_000_000)
    says = r"one row of 601 tokens needs 4\.\d+ MB beside the 4\.66 MB of the twin, and 1 MB are left for it; use a"
    with pytest.raises(InputError, match=says) as raised:
        requests.score(twin, [Score([5] * 600, [6, 7])], fusion_weights=DIFFUSE[:1])
    assert "max_memory" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="one row of 500 tokens and 100 to generate needs"):
        requests.generate(twin, [Generate([5] * 500, 100)], fusion_weights=DIFFUSE[:1])


@pytest.mark.parametrize(
    ("size", "found"),
    [
        *[(40_000, 40_000), ("40000", 40_000), ("40GB", 40 * 10**9), ("2GiB", 2 * 2**30), (None, None)],
        *[("40gb", 40 * 10**9), ("40Gb", 40 * 10**9), ("3mb", 3 * 10**6), ("2gib", 2 * 2**30), ("2kiB", 2048)],
    ],
)
def test_sizes(size: Any, found: int | None) -> None:
    assert memory_limit(size) == found


@pytest.mark.parametrize("size", ["much", 0, -1, True, 1.5, "0GB", "", "infGB", "nanGB"])
def test_no_sizes(size: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f"max_memory {size!r}: expected bytes, or a text such as 40GB")):
        memory_limit(size)


SIZES = Sizes(
    held=1000,
    copy=500,
    hidden=0,
    block=10,
    by_row=10,
    attention=0,
    rotated=0,
    together=0,
    mask=0,
    masked=0,
    scores=0,
    cached=2,
    layer=1,
    repeated=0,
    logit=5,
    exact=0,
)
COSTS = Costs(fuse=(1.0,), rebuild=1.0, columns=(10.0,), joint=10.0)


def planned(room: float, lengths: list[int], **asked: Any) -> list[Group]:
    weights, budget = torch.ones(len(lengths), 1), Budget(SIZES, room, **asked)
    groups = plan(weights, lengths, COSTS, batch_size=8, budget=budget)
    return [batch for group in groups for batch in batches(group, lengths, 8, COSTS, budget=budget)]


def test_a_plan_fuses_where_the_copy_fits() -> None:
    """A row of ten tokens takes 100 bytes, and the copy 500."""
    (batch,) = planned(500 + 800, [10] * 8)
    assert batch.weights is not None
    assert [len(batch.rows) for batch in planned(500 + 300, [10] * 8)] == [2, 3, 3]
    rows = planned(599, [10] * 8)
    assert [(len(batch.rows), batch.weights, batch.crowded) for batch in rows] == [(3, None, True), (5, None, True)]
    with pytest.raises(InputError, match=r"one row of 10 tokens needs 0\.0001 MB"):
        planned(99, [10] * 8)


def test_a_plan_fuses_where_the_factors_do_not_fit() -> None:
    """Experts of a high rank: a generation keeps more of their factors than a fused copy takes."""
    sizes, use = replace(SIZES, kept_factors=800), Use(steps=5)
    budget, weights = Budget(sizes, 700, use), torch.ones(1, 1)
    dear = replace(COSTS, rebuild=1e9)
    (group,) = plan(weights, [10], dear, steps=5, batch_size=8, budget=budget)
    assert group.weights is not None
    (group,) = plan(weights, [10], dear, steps=5, batch_size=8, budget=replace(budget, room=1000))
    assert group.weights is None
    with pytest.raises(InputError, match="one row of 10 tokens and 5 to generate needs"):
        plan(weights, [10], dear, steps=5, batch_size=8, budget=replace(budget, room=600))


def test_logits_of_rows_that_end_apart_are_counted() -> None:
    """Rows of 40 and of 20 tokens need ten positions each: all rows of a batch compute the logits of twenty."""
    lengths, asked = [40, 20], {0: 10, 1: 10}
    sizes, costs = replace(SIZES, logit=100), replace(COSTS, batch=1000.0)
    weights = torch.ones(2, 1)

    def cut(room: float) -> list[int]:
        budget = Budget(sizes, 500 + room, asked=asked)
        (group,) = plan(weights, lengths, costs, batch_size=8, budget=budget)
        return [len(batch.rows) for batch in batches(group, lengths, 8, costs, budget=budget)]

    assert cut(2 * 20 * 100) == [2]
    assert cut(2 * 20 * 100 - 1) == [1, 1]


def test_a_figure_and_a_device_map(causal_twins: Any) -> None:
    directory = causal_twins("llama")
    assert TwinModel.from_pretrained(directory, max_memory="1GB").max_memory == 10**9
    with pytest.raises(InputError, match=r"max_memory '1GB': with device_map give a size for each device"):
        TwinModel.from_pretrained(directory, device_map="auto", max_memory="1GB")
    with pytest.raises(InputError, match="max_memory 1000: the twin alone takes"):
        TwinModel.from_pretrained(directory, max_memory=1000)
