"""Memory between plan and run: a batch that needs the fused copy's room gets it, whatever runs it."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from tests.support.random_twins import random_twin
from twin_bench import InputError, TwinModel
from twin_bench.errors import RefusedError
from twin_bench.serving.engine import Ask, Engine
from twin_bench.twin import requests, seq2seq_requests
from twin_bench.twin.device import rounded
from twin_bench.twin.memory import ONE_FORWARD, Budget, Sizes, Use
from twin_bench.twin.plan import Costs, Group, plan
from twin_bench.twin.rehearsal import rehearse_score
from twin_bench.twin.requests import Generate, Score

DIFFUSE = torch.softmax(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
CROWDED = Group((0, 1, 2), None, crowded=True)


def with_copy(twin: Any) -> Any:
    """Return a twin that holds the fused copy."""
    with twin.fusion.fuse(DIFFUSE[0]):
        pass
    assert twin.fusion.holds_copies
    return twin


def test_the_copy_is_freed_before_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = with_copy(random_twin("llama"))
    twin.compiling = "on"
    monkeypatch.setattr(type(twin.steps), "_stepped", lambda steps, plain, args, kwargs: plain(*args, **kwargs))
    twin.limit_memory(int(twin.sizes.held + 0.9 * twin.sizes.copy))
    requests.generate(twin, [Generate([5, 6, row], 2) for row in range(7, 10)], fusion_weights=DIFFUSE)
    assert not twin.fusion.holds_copies


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_the_copy_is_freed_before_beams(kind: str) -> None:
    twin = with_copy(random_twin(kind))
    inputs = {"input_ids": torch.full((3, 4), 5), "attention_mask": torch.ones(3, 4, dtype=torch.long)}
    twin.generate_batch(inputs, CROWDED, DIFFUSE, max_new_tokens=2, num_beams=2)
    assert not twin.fusion.holds_copies


def test_the_copy_is_freed_before_an_encoder() -> None:
    twin = with_copy(random_twin("bart"))
    held: list[bool] = []
    twin.backbone.register_forward_pre_hook(lambda *_: held.append(twin.fusion.holds_copies))
    with torch.no_grad():
        twin.logits([[5, 6], [7, 8], [5, 9]], [[6]] * 3, CROWDED, DIFFUSE)
    assert held
    assert not any(held)


def test_a_rehearsal_takes_the_ways_that_fit() -> None:
    """Fused weights fit and factors do not; a limit holds five rows of eight."""
    twin = random_twin("llama")
    twin.__dict__["sizes"] = replace(twin.sizes, factors=10 * twin.sizes.copy)
    needed = Budget(twin.sizes, 0).needed(5, 21, 2, fused=True)
    twin.limit_memory(int(twin.sizes.held + needed))
    assert rehearse_score(twin, [Score([5] * 20, [6, 7])], 8) == 5


def test_the_copy_is_freed_before_a_prefix() -> None:
    """The pass over the prefix needs its room; the rows behind it do not. So it is where a router reads."""
    twin = random_twin("llama")
    twin.costs = replace(twin.costs, rebuild=math.inf)
    ids = list(range(5, 705))
    limit = int(twin.sizes.held + twin.sizes.copy + 0.9 * Budget(twin.sizes, 0, Use(1)).needed(1, 700, 0, fused=False))
    rows = [Score([*ids, row], [8]) for row in (7, 8)]
    twin.limit_memory(limit)
    held: list[bool] = []
    with_copy(twin)
    twin.model.base_model.register_forward_pre_hook(lambda *_: held.append(twin.fusion.holds_copies))
    requests.score(twin, rows, fusion_weights=DIFFUSE[:1].expand(2, -1))
    assert held
    assert not any(held)
    limit = int(twin.sizes.held + twin.sizes.copy)
    limit += int(0.9 * Budget(twin.sizes, 0, Use(1, shared=True)).needed(1, 700, 0, fused=True))
    twin.limit_memory(limit)
    held.clear()
    with_copy(twin)
    twin.features_of([{"input_ids": [*ids, row]} for row in (7, 8)], [-1], batch_size=2)
    assert held
    assert not any(held)


def budget_of(room: float) -> Budget:
    """Return a budget in which a token takes 10 bytes and a position's logits 50: factors and a copy take none."""
    none = dict.fromkeys((field.name for field in fields(Sizes)), 0)
    return Budget(Sizes(**{**none, "block": 10, "by_row": 10, "logit": 50}), room, asked={0: 1, 1: 40})


def test_each_row_must_fit() -> None:
    """A row of 90 tokens takes 900 bytes, and one of 60 whose 40 last logits are needed 2,000."""
    costs, lengths = Costs(fuse=(1.0,), rebuild=1.0, columns=(10.0,), joint=10.0), [90, 60]
    for weights in (torch.tensor([[0.5], [0.25]]), torch.full((2, 1), 0.5)):
        with pytest.raises(InputError, match="one row of 60 tokens needs"):
            plan(weights, lengths, costs, budget=budget_of(1999))
        assert plan(weights, lengths, costs, budget=budget_of(2000))


@pytest.mark.parametrize("state", ["held", "released", "none"])
def test_without_a_limit_the_free_memory_bounds_a_plan(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused copy counts as free, so that a plan is the same whether it is held or not. A CPU has no bound."""
    twin = random_twin("llama")
    if state == "none":
        assert twin.budget() is None
        return
    total, others = 16 * twin.sizes.copy, twin.sizes.copy // 2
    taken = others + twin.sizes.held + (twin.sizes.copy if state == "held" else 0)
    if state == "held":
        with_copy(twin)
    monkeypatch.setattr(type(twin), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - taken, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    expected = rounded(0.9 * (total - others - twin.sizes.held), total)
    assert twin.budget().room == pytest.approx(expected)


def test_free_memory_is_rounded_down() -> None:
    assert rounded(61e9, 80e9) == rounded(64e9, 80e9) == 60e9
    assert rounded(0, 80e9) == 0
    assert 0.75e9 < rounded(1e9, 80e9) <= 1e9


def test_a_row_is_refused_before_work_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a list nothing is routed. An engine answers the neighbours of a request that does not fit."""
    twin = random_twin("llama")
    twin.limit_memory(twin.sizes.held + 1_000_000)
    long, short = [5] * 600, [5, 6]
    with monkeypatch.context() as patch:
        patch.setattr(type(twin), "route_all", None)
        with pytest.raises(InputError, match="one row of 601 tokens needs"):
            requests.score(twin, [Score(short, [6]), Score(long, [6, 7])])
        with pytest.raises(InputError, match="one row of 600 tokens and 9 to generate needs"):
            requests.generate(twin, [Generate(short, 1), Generate(short, 3), Generate(long, 9)])
    patched = twin.checked_weights
    monkeypatch.setattr(
        type(twin), "route_all", lambda own, rows, *_, **__: patched(DIFFUSE[:1], 1).expand(len(rows), -1)
    )
    ask = Ask((5, 6), max_tokens=3, temperature=0.0, top_p=1.0, completions=1, stop=(), seed="s")
    large = [replace(ask, prompt=tuple(long), max_tokens=steps) for steps in (9, 0)]
    found = Engine(twin, 4).answer([ask, *large])
    assert [isinstance(one, RefusedError) for one in found] == [False, True, True]


def limited(kind: str, rows: int, tokens: int, positions: int, use: Use = ONE_FORWARD) -> Any:
    """Return a twin that has just room for one batch, and whose model tells when it is run."""
    twin = random_twin(kind)
    least = min(float(Budget(twin.sizes, 0, use).needed(rows, tokens, positions, fused=way)) for way in (True, False))
    twin.limit_memory(int(twin.sizes.held + least) + 1)
    twin.run = []
    for part in (twin.model, twin.backbone):
        part.register_forward_pre_hook(lambda *_: twin.run.append(1))
    return twin


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_callers_batch_that_does_not_fit_is_refused_before_anything_is_run(kind: str) -> None:
    """As many rows as fit are answered as they are without a limit."""
    twin, plain = limited(kind, 3, 24 if kind == "bart" else 20, 4 if kind == "bart" else 20), random_twin(kind)
    ids = torch.arange(5, 65).view(3, 20)
    given = {"labels": torch.full((3, 4), 7)} if kind == "bart" else {}
    answered = twin(ids, **given, fusion_weights=DIFFUSE).logits
    torch.testing.assert_close(answered, plain(ids, **given, fusion_weights=DIFFUSE).logits, rtol=1e-4, atol=1e-4)
    twin.run.clear()
    more = {name: torch.cat([tensor, tensor]) for name, tensor in {"input_ids": ids, **given}.items()}
    with pytest.raises(
        InputError, match=r"^a batch of 6 rows of 2\d tokens needs .*; use fewer rows at once, a larger"
    ):
        twin(**more)
    with pytest.raises(InputError, match=r"^a batch of 900 rows of 20 tokens and 2 to generate needs"):
        twin.generate(ids.repeat(300, 1), max_new_tokens=2)
    assert not twin.run


def test_a_classifiers_batch_that_does_not_fit_is_refused(twins: Any) -> None:
    twin = TwinModel.from_pretrained(twins("bert"))
    ids = torch.full((64, 20), 5)
    least = min(float(Budget(twin.sizes, 0).needed(8, 20, 1, fused=way)) for way in (True, False))
    twin.limit_memory(int(twin.sizes.held + least) + 1)
    assert len(twin(ids[:8], fusion_weights=DIFFUSE[:1, :3].expand(8, -1), task="cola").logits) == 8
    for run in (lambda: twin(ids, task="cola"), lambda: twin.route(ids)):
        with pytest.raises(InputError, match=r"^a batch of 64 rows of 20 tokens needs"):
            run()


def test_a_batch_is_generated_fused_only_where_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan fuses rows of equal weights where one of them fits, and all of them must."""
    use = Use(3)
    twin = random_twin("llama")
    twin.costs = replace(twin.costs, rebuild=0.0, fuse=(0.0,) * 4, columns=(1.0,) * 4, joint=4.0)
    needed = [float(Budget(twin.sizes, 0, use).needed(3, 500, 1, fused=way)) for way in (True, False)]
    assert Budget(twin.sizes, 0, use).needed(1, 500, 1, fused=True) < needed[1] < needed[0]
    twin.limit_memory(int(twin.sizes.held + needed[1]) + 1)
    made: list[Group] = []

    def noted(inputs: Any, group: Group, weights: torch.Tensor, **options: Any) -> Any:
        made.append(group)
        return run(inputs, group, weights, **options)

    run = twin.generate_batch
    monkeypatch.setattr(twin, "generate_batch", noted)
    twin.generate(torch.arange(5, 505).expand(3, -1), fusion_weights=DIFFUSE[:1].expand(3, -1), max_new_tokens=3)
    assert [group.weights for group in made] == [None]


def test_an_encoder_decoders_text_that_does_not_fit_is_refused_before_the_routing() -> None:
    twin = limited("bart", 1, 20, 1, Use(4, True))
    prompt = list(range(5, 25))
    weights = DIFFUSE[:1]
    assert len(seq2seq_requests.generate(twin, [Generate(prompt, 4)], fusion_weights=weights)) == 1
    twin.run.clear()
    told: list[tuple[int, ...]] = []
    with pytest.raises(InputError, match=r"^one row of 40 tokens and 4 to generate needs"):
        seq2seq_requests.generate(
            twin,
            [Generate(prompt, 4), Generate([*prompt, *prompt], 4)],
            fusion_weights=weights.expand(2, -1),
            progress=lambda *done: told.append(done),
        )
    assert not twin.run
    assert not told
