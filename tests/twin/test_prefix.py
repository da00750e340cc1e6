"""Shared prefixes: which rows share one, and that sharing changes no answer."""

from __future__ import annotations

import dataclasses
import random
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from twin_bench.compat import cache_argument
from twin_bench.twin import prefix
from twin_bench.twin.builder import build_twin
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.encoded import packed
from twin_bench.twin.plan import Group
from twin_bench.twin.prefix import Sharing, shared_prefixes
from twin_bench.twin.recipe import Recipe
from twin_bench.twin.requests import Score, score

pytestmark = pytest.mark.versions

A, B = tuple(range(100, 140)), tuple(range(200, 260))


def test_rows_that_begin_alike_share_what_they_have_in_common() -> None:
    rows = {0: (*A, 1), 7: (*B, 1, 2), 2: (*A, 2, 3), 3: (9,), 4: (*B[:50], 5), 5: (8, 8)}
    limits = {row: len(ids) - 1 for row, ids in rows.items()}
    assert shared_prefixes(rows, limits) == [Sharing((0, 2), 40), Sharing((4, 7), 50), Sharing((3, 5), 0)]


def test_a_prefix_never_reaches_a_token_that_is_asked_about() -> None:
    rows = {0: (*A, 1), 1: (*A, 1, 2)}
    assert shared_prefixes(rows, {0: 25, 1: 40}) == [Sharing((0, 1), 25)]
    assert shared_prefixes(rows, {0: 15, 1: 40}) == [Sharing((0, 1), 0)]


def test_a_row_does_not_shorten_what_others_share_for_less() -> None:
    """Three rows share 40 tokens: a fourth, which shares 20 of them, would cost more than it brings."""
    rows = {0: (*A, 1), 1: (*A, 2), 2: (*A, 3), 3: (*A[:20], *B)}
    limits = {row: len(ids) - 1 for row, ids in rows.items()}
    assert shared_prefixes(rows, limits) == [Sharing((0, 1, 2), 40), Sharing((3,), 0)]


def test_a_long_list_behind_one_prefix_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []

    def counted(rows: tuple[int, ...], length: int) -> Sharing:
        copied.append(len(rows))
        return Sharing(rows, length)

    monkeypatch.setattr(prefix, "Sharing", counted)
    rows = {row: (*A, row + 300) for row in range(1000)}
    (found,) = shared_prefixes(rows, dict.fromkeys(rows, 40))
    assert found == (tuple(range(1000)), 40)
    assert sum(copied) == 1000


def test_the_same_rows_are_found_as_when_sets_grow_by_copies() -> None:
    """Against the rule as its docstring has it, on random rows of lists, tuples and arrays."""
    rng = random.Random(0)
    for _ in range(40):
        starts = [rng.choices(range(9), k=rng.randint(10, 40)) for _ in range(3)]
        made = [rng.choice(starts)[: rng.randint(8, 40)] + rng.choices(range(9), k=rng.randint(1, 4)) for _ in range(9)]
        rows = {row: rng.choice([list, tuple, lambda ids: array("I", ids)])(ids) for row, ids in enumerate(made)}
        limits = {row: rng.randint(0, len(ids)) for row, ids in rows.items()}
        expected: list[tuple[tuple[int, ...], int]] = []
        for row in sorted(rows, key=lambda row: (tuple(rows[row]), row)):
            if expected:
                own, length = expected[-1]
                pairs = zip(rows[own[0]], rows[row], strict=False)
                same = next((place for place, (one, other) in enumerate(pairs) if one != other), 99)
                common = min(same, len(rows[own[0]]), len(rows[row]), length, limits[row])
                if common >= 16 and len(own) * common >= (len(own) - 1) * length:
                    expected[-1] = ((*own, row), common)
                    continue
            expected.append(((row,), limits[row]))
        alone = tuple(sorted(own[0] for own, _ in expected if len(own) == 1))
        assert shared_prefixes(rows, limits) == [one for one in expected if len(one[0]) > 1] + [(alone, 0)] * bool(
            alone
        )


def test_packed_tokens_have_the_order_of_the_tokens() -> None:
    rows = [(), (1,), (1, 2), (1, 256), (2,), (255, 1), (256,), (65536, 0), (300, 7)]
    assert [tuple(one) for one in sorted(rows, key=packed)] == sorted(rows)


@contextmanager
def tokens_run(twin: TwinCausalLM) -> Iterator[list[int]]:
    """Collect the tokens of every forward of the backbone, padding included."""
    run: list[int] = []

    def count(_: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        run.append((args[0] if args else inputs["input_ids"]).numel())

    hook = twin.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    yield run
    hook.remove()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt2"])
def test_scores_with_a_shared_prefix_are_those_without(causal_families: Any, tmp_path: Path, kind: str) -> None:
    family = causal_families(kind)
    build_twin(Recipe.model_validate({**family.recipe, "router": None}), tmp_path / "twin")
    twin = TwinCausalLM.from_pretrained(tmp_path / "twin")
    generator = torch.Generator().manual_seed(0)
    draw = lambda length: torch.randint(4, 26, (length,), generator=generator).tolist()  # noqa: E731
    examples = draw(30)
    contexts = [examples + draw(3 + row) for row in range(5)] + [draw(12), examples[:24] + draw(5)]
    requests = [Score(context, draw(1 + row % 3)) for row, context in enumerate(contexts)]
    experts = len(twin.expert_names)
    weights = torch.eye(experts)[0].repeat(len(requests), 1)
    with tokens_run(twin) as run:
        together = score(twin, requests, fusion_weights=weights, batch_size=4)
    assert sum(run) <= sum(len(one.context) + len(one.continuation) for one in requests) - 4 * 24
    for request, row_weights, found in zip(requests, weights, together, strict=True):
        (alone,) = score(twin, [request], fusion_weights=row_weights[None])
        torch.testing.assert_close(found.log_probs, alone.log_probs, rtol=1e-4, atol=1e-4)
        with torch.no_grad(), twin.fusion.fuse(row_weights):
            ids = torch.tensor([[*request.context, *request.continuation]])
            logits = twin.model(ids).logits[0].log_softmax(-1)
        start = len(request.context) - 1
        expected = [logits[start + place, token] for place, token in enumerate(request.continuation)]
        torch.testing.assert_close(found.log_probs, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_prefix_is_not_copied(causal_twins: Any, kind: str) -> None:
    """Rows read its keys and values where they lie. Nothing of a batch stays beside them."""
    twin = TwinCausalLM.from_pretrained(causal_twins(kind))
    weights = torch.full((3, 3), 1 / 3)
    group = Group((0, 1, 2), weights[0])
    one = twin.prefix([*range(5, 25)], group, weights)
    cache: Any = one.cache
    rows = [[30, 31], [32], [33, 34]]
    shared = one.for_rows(3)
    for layer, own in zip(shared.layers, cache.layers, strict=True):
        for name in ("keys", "values"):
            mine, kept = getattr(layer, name), getattr(own, name)
            assert mine.shape == (3, *kept.shape[1:])
            assert mine.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()
    before = [layer.keys.clone() for layer in cache.layers]
    first = twin.logits(rows, [0, 1], group, weights, one)
    assert torch.equal(first, twin.logits(rows, [0, 1], group, weights, one))
    alone = torch.cat([twin.logits([[*range(5, 25), *row]], [20], group, weights)[:, 0] for row in rows])
    torch.testing.assert_close(first[:, 0], alone, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    with twin.fusion.fuse(weights[0]), torch.no_grad():
        twin.model(torch.tensor([[30], [31], [32]]), **{cache_argument(twin.model.forward): shared}, use_cache=False)
    assert {layer.keys.shape[-2] for layer in shared.layers} == {20}


def test_rows_with_weights_of_their_own_share_nothing(
    causal_families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = causal_families("llama")
    build_twin(Recipe.model_validate({**family.recipe, "router": None}), tmp_path / "twin")
    twin = TwinCausalLM.from_pretrained(tmp_path / "twin")
    requests = [Score([*range(4, 24), 4, 5, 6, row + 5], [7]) for row in range(4)]
    weights = torch.softmax(torch.randn(4, len(twin.expert_names), generator=torch.Generator().manual_seed(0)), dim=1)
    twin.costs = dataclasses.replace(twin.costs, rebuild=1e9)  # all in one group, on the low-rank path
    batches = []
    logits = twin.logits

    def watched(rows: Any, positions: Any, group: Any, *rest: Any) -> Any:
        batches.append((group.rows, group.weights))
        return logits(rows, positions, group, *rest)

    monkeypatch.setattr(twin, "logits", watched)
    monkeypatch.setattr(twin, "prefix", lambda *_: pytest.fail("a prefix is run"))
    score(twin, requests, fusion_weights=weights)
    assert batches == [((0, 1, 2, 3), None)]
