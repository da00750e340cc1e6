"""Models whose positions or rotary embeddings depend on more than a token's place: no prefix is shared."""

from __future__ import annotations

import pytest
import torch

from tests.support.random_twins import random_twin
from twin_bench.twin.requests import Generate, Score, generate, score

PROMPTS = [[*range(20, 50), *range(100 + 20 * row, 100 + 20 * row + n)] for row, n in enumerate((3, 9, 1, 12))]
NONE = torch.zeros(4, 4)


def test_positions_that_begin_after_the_padding_are_those_of_the_model() -> None:
    """RoBERTa's, against transformers' own model of each row alone, without padding and without given positions."""
    twin = random_twin("roberta")
    length = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in PROMPTS])
    found = twin(ids, (ids != 0).long(), fusion_weights=NONE).logits
    given = [Score(row[:-2], row[-2:]) for row in PROMPTS]
    scored = score(twin, given, batch_size=4, fusion_weights=NONE)
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad(), twin.fusion.shared():
            expected = twin.model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(found[row, -len(prompt) :], expected, rtol=1e-4, atol=1e-4)
        likely = expected.log_softmax(dim=-1)
        own = [likely[len(prompt) - 3 + place, prompt[len(prompt) - 2 + place]] for place in (0, 1)]
        torch.testing.assert_close(scored[row].log_probs, torch.stack(own), rtol=0, atol=1e-4)


def test_texts_after_such_positions_are_those_of_generate() -> None:
    twin = random_twin("roberta")
    texts = generate(twin, [Generate(row, 6) for row in PROMPTS], batch_size=4, fusion_weights=NONE)
    for prompt, (ours,) in zip(PROMPTS, texts, strict=True):
        with torch.no_grad(), twin.fusion.shared():
            whole = twin.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert ours.tokens == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["roberta", "longrope"])
def test_they_share_no_prefix(kind: str) -> None:
    assert not random_twin(kind).shares_prefixes
    assert random_twin("llama").shares_prefixes
