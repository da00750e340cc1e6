"""Shared prefixes: which rows share one, and that sharing changes no answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from twin_bench.recipe import Recipe
from twin_bench.twin.build import build_twin
from twin_bench.twin.causal import TwinCausalLM, tokens
from twin_bench.twin.prefix import Sharing, shared_prefixes

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


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt2"])
def test_log_likelihoods_and_texts_with_a_shared_prefix_are_those_without(
    causal_families: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = causal_families(kind)
    build_twin(Recipe.model_validate({**family.recipe, "router": None}), tmp_path / "twin")
    twin = TwinCausalLM.from_pretrained(tmp_path / "twin")
    generator = torch.Generator().manual_seed(0)
    draw = lambda length: torch.randint(4, 26, (length,), generator=generator).tolist()  # noqa: E731
    examples = draw(30)
    contexts = [examples + draw(3 + row) for row in range(5)] + [draw(12), examples[:24] + draw(5)]
    requests = [(context, draw(1 + row % 3)) for row, context in enumerate(contexts)]
    experts = len(twin.expert_names)
    weights = torch.eye(experts)[0].repeat(len(requests), 1)
    together = twin.log_likelihoods(requests, fusion_weights=weights, batch_size=4)
    passes = []
    keys_and_values = twin._keys_and_values

    def watched(ids: Any, *rest: Any) -> Any:
        passes.append(len(ids))
        return keys_and_values(ids, *rest)

    monkeypatch.setattr(twin, "_keys_and_values", watched)
    twin.log_likelihoods(requests, fusion_weights=weights, batch_size=4)
    assert max(passes) >= 24
    for request, row_weights, found in zip(requests, weights, together, strict=True):
        (alone,) = twin.log_likelihoods([request], fusion_weights=row_weights[None])
        torch.testing.assert_close(found.log_probs, alone.log_probs, rtol=1e-4, atol=1e-4)
        with torch.no_grad(), twin.fusion.fuse(row_weights):
            logits = twin.model(torch.tensor([[*request[0], *request[1]]])).logits[0].log_softmax(-1)
        start = len(request[0]) - 1
        expected = [logits[start + place, token] for place, token in enumerate(request[1])]
        torch.testing.assert_close(found.log_probs, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_rows_with_weights_of_their_own_share_nothing(causal_families: Any, tmp_path: Path) -> None:
    family = causal_families("llama")
    build_twin(Recipe.model_validate({**family.recipe, "router": None}), tmp_path / "twin")
    twin = TwinCausalLM.from_pretrained(tmp_path / "twin")
    prompts = [[*range(4, 24), 4, 5, 6, row + 5] for row in range(4)]
    weights = torch.softmax(torch.randn(4, len(twin.expert_names), generator=torch.Generator().manual_seed(0)), dim=1)
    twin.costs = dataclasses.replace(twin.costs, rebuild=1e9)  # all in one group, on the low-rank path
    shared = list(twin.sharing(weights, prompts, dict.fromkeys(range(4), 23), 8))
    assert [batch.weights for batch, _ in shared] == [None]
    assert all(prefix.length == 0 and prefix.cache is None for _, prefix in shared)
    assert sorted(row for batch, _ in shared for row in batch.rows) == [0, 1, 2, 3]
    assert tokens(prompts[0])["attention_mask"] == [1] * 24
