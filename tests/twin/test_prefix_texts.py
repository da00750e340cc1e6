"""Texts of several tokens whose prompts begin alike: the beginning is run once, and no text changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.random_twins import random_twin
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.prefix import Sharing, worth_their_batches
from twin_bench.twin.requests import Generate, generate
from twin_bench.twin.sampling import Completion, Decoding, Sampling

pytestmark = pytest.mark.versions

STEPS = 12
EXAMPLES = [*range(20, 80)]
OTHER = [19, *range(20, 39)]
LENGTHS = [3, 9, 1, 30, 3, 12, 75]
SAME = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
GREEDY = Sampling()


def prompts() -> list[list[int]]:
    """Return prompts that begin with the same 60 tokens, and one that does not.

    Beside the longest of them, the shortest ones have more padding than the prefix has tokens.
    """
    return [[*EXAMPLES, *range(100 + 50 * row, 100 + 50 * row + n)] for row, n in enumerate(LENGTHS)] + [OTHER]


@contextmanager
def inputs_of(twin: TwinCausalLM) -> Iterator[list[tuple[int, int]]]:
    """Collect the rows and tokens of every forward."""
    found: list[tuple[int, int]] = []

    def take(_: nn.Module, args: Any) -> None:
        rows, tokens = args[0].shape
        found.append((rows, tokens))

    hook = twin.model.get_input_embeddings().register_forward_pre_hook(take)
    yield found
    hook.remove()


def asked(decoding: Decoding = GREEDY, **how: Any) -> list[Generate]:
    """Return a request for each prompt, with the three most probable tokens of each place."""
    return [Generate(ids, STEPS, decoding, likeliest=3, seed=f"s{row}", **how) for row, ids in enumerate(prompts())]


def alike(found: Completion, expected: Completion) -> None:
    """Compare tokens, and the log-probabilities of the most probable tokens of each place."""
    assert found.tokens == expected.tokens
    assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-5)
    for ours, theirs in zip(found.likeliest, expected.likeliest, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "grouped", "eager", "gpt2", "opt", "bloom", "gemma2"])
@pytest.mark.parametrize("fused", [True, False])
def test_prompts_that_begin_alike_have_the_texts_of_each_alone(kind: str, fused: bool) -> None:
    twin = random_twin(kind)
    if not fused:
        twin.fusion.keeps_copies = False
    texts = asked()
    alone = [generate(twin, [request], fusion_weights=SAME)[0][0] for request in texts]
    with inputs_of(twin) as inputs:
        found = generate(twin, texts, batch_size=4, fusion_weights=SAME.expand(len(texts), -1))
    for (ours,), theirs in zip(found, alone, strict=True):
        alike(ours, theirs)
    assert len({tuple(one.tokens) for one in alone}) > 1
    read = sum(rows * tokens for rows, tokens in inputs if tokens > 1)
    whole = sum(map(len, prompts()))
    if twin.generates_after_prefixes({}):
        assert read == 60 + 3 * 75 + 4 * 9 + 20
    else:
        assert kind == "gemma2" or (kind == "bloom" and type(twin.model).__dict__["prepare_inputs_for_generation"])
        assert read >= whole


def test_only_rows_of_equal_weights_share() -> None:
    twin = random_twin("llama")
    twin.fusion.keeps_copies = False  # all on the low-rank path, in one group
    texts = asked()
    weights = torch.softmax(torch.randn(len(texts), 4, generator=torch.Generator().manual_seed(0)), dim=1)
    weights[1] = weights[3] = weights[5]
    alone = [generate(twin, [one], fusion_weights=own[None])[0][0] for one, own in zip(texts, weights, strict=True)]
    with inputs_of(twin) as inputs:
        found = generate(twin, texts, batch_size=3, fusion_weights=weights)
    for (ours,), theirs in zip(found, alone, strict=True):
        alike(ours, theirs)
    assert (1, 60) in inputs
    assert (3, 30) in inputs


def test_drawn_texts_of_one_prompt_share_it_and_stay() -> None:
    """Each draws from its own seed, and a penalty reads the tokens of the prompt."""
    twin = random_twin("llama")
    drawn = Sampling(temperature=2.0, top_p=0.9)
    twin.model.generation_config.repetition_penalty = 1.3
    texts = asked(drawn, completions=4)[:3]
    alone = [generate(twin, [request], batch_size=1, fusion_weights=SAME)[0] for request in texts]
    with inputs_of(twin) as inputs:
        found = generate(twin, texts, batch_size=4, fusion_weights=SAME.expand(3, -1))
    for ours, theirs in zip(found, alone, strict=True):
        assert [one.tokens for one in ours] == [one.tokens for one in theirs]
        assert len({tuple(one.tokens) for one in ours}) == 4
    assert max(tokens for rows, tokens in inputs if rows > 1) <= 10


@pytest.mark.parametrize("setting", [{"num_beams": 2}, {"no_repeat_ngram_size": 2}, {"use_cache": False}])
def test_other_ways_of_generating_share_nothing(setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    twin = random_twin("llama")
    monkeypatch.setattr(twin, "prefix", lambda *_: pytest.fail("a prefix is run"))
    for name, value in setting.items():
        setattr(twin.model.generation_config, name, value)
    assert not twin.generates_after_prefixes({name: value for name, value in setting.items() if name != "use_cache"})
    monkeypatch.setattr(Sampling, "options", lambda *_: {})
    texts = [Generate(ids, STEPS) for ids in prompts()[:3]]
    generate(twin, texts, batch_size=3, fusion_weights=SAME.expand(3, -1), log_probs=False)


def test_settings_that_do_nothing_leave_prefixes_shared() -> None:
    twin = random_twin("llama")
    twin.model.generation_config.no_repeat_ngram_size = 0
    assert twin.generates_after_prefixes({"min_new_tokens": 0})


def test_a_set_of_few_rows_keeps_its_place_in_a_full_batch() -> None:
    """Two rows that share 100 tokens save 100. A batch of their own, with room for 6 more, costs 3/4 of a batch."""
    few, many, alone = Sharing((0, 1), 100), Sharing(tuple(range(2, 18)), 40), Sharing((18,), 0)
    assert worth_their_batches([few, many, alone], 133, 8) == [few, many, alone]
    assert worth_their_batches([few, many, alone], 134, 8) == [many, Sharing((0, 1, 18), 0)]
