"""The engine on prompts that begin alike: what they share is run once where one token is asked for."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import WORDS, tiny_causal_tokenizer
from twin_bench import TwinModel
from twin_bench.recipe import Recipe
from twin_bench.twin.build import build_twin
from twin_bench.twin.causal import tokens
from twin_bench_helm.engine import Ask, Completion, Engine

pytestmark = pytest.mark.versions

ONE_TOKEN = Ask((), max_tokens=1, temperature=0.0, top_p=1.0, completions=1, stop=(), seed="s")
DRAWN = dataclasses.replace(ONE_TOKEN, temperature=3.0)
SEVERAL = dataclasses.replace(DRAWN, completions=3)
TEXT = dataclasses.replace(ONE_TOKEN, max_tokens=6)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def directory(request: pytest.FixtureRequest, causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a twin whose rows have one expert's weight each: only such can share keys and values."""
    recipe = causal_families(request.param).recipe
    router = {**recipe["router"], "epochs": 20, "top_k": 1, "layer": 0}
    directory = tmp_path_factory.mktemp("engine") / "twin"
    build_twin(Recipe.model_validate({**recipe, "router": router}), directory)
    return directory


def requests() -> list[Ask]:
    """Return requests of all kinds, in a drawn order: prompts of several lengths after three beginnings, and alone."""
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS[7 * task : 7 * task + 9], k=20)) for task in range(3)]  # the router's own
    ids = [tiny_causal_tokenizer()(text)["input_ids"] for text in texts]
    starts = [tuple(own[:length]) for own, length in zip(ids, (20, 24, 30), strict=True)]
    asked = []
    for kind in (ONE_TOKEN, DRAWN, SEVERAL, TEXT):
        prompts = [(*start, *draw.choices(range(4, 300), k=length)) for start in starts for length in (1, 3, 6, 4)]
        prompts += [starts[0], tuple(draw.choices(range(4, 300), k=5)), (7,)]
        asked += [dataclasses.replace(kind, prompt=prompt, seed=f"s{index}") for index, prompt in enumerate(prompts)]
    draw.shuffle(asked)
    return asked


def same(found: Sequence[Completion], expected: Sequence[Completion]) -> bool:
    return [one.tokens for one in found] == [one.tokens for one in expected] and all(
        ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)
        for ours, theirs in zip(found, expected, strict=True)
    )


def test_requests_that_begin_alike_are_answered_as_each_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests()
    twin = TwinModel.from_pretrained(directory)
    alone = [Engine(twin, 1).answer([request])[0] for request in asked]
    together = TwinModel.from_pretrained(directory)
    shared: list[tuple[int, int]] = []
    sharing = together.sharing

    def watched(*arguments: Any, **options: Any) -> Any:
        for batch, prefix in sharing(*arguments, **options):
            shared.append((options["steps"], prefix.length))
            yield batch, prefix

    monkeypatch.setattr(together, "sharing", watched)
    found = Engine(together, 3).answer(asked)
    for request, ours, theirs in zip(asked, found, alone, strict=True):
        assert same(ours, theirs), request
    assert {length for steps, length in shared if steps == 1} >= {0, 24, 30}
    assert {length for steps, length in shared if steps > 1} == {0}
    assert together.route_all([tokens(request.prompt) for request in asked]).any(dim=0).sum() > 1


def test_one_token_has_its_probability_under_the_prompts_own_model(directory: Path) -> None:
    """Whatever the temperature it was drawn at."""
    twin = TwinModel.from_pretrained(directory)
    asked = [request for request in requests() if request.max_tokens == 1]
    found, expected = [], []
    for request, answer in zip(asked, Engine(twin, 3).answer(asked), strict=True):
        logits = twin(torch.tensor([request.prompt])).logits[0, -1]
        assert len(answer) == request.completions
        for completion in answer:
            for token, log_prob in zip(completion.tokens, completion.log_probs, strict=True):
                assert request.temperature or token == logits.argmax()
                found.append(log_prob)
                expected.append(float(logits.log_softmax(dim=-1)[token]))
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(found)) > 0.8 * len(found) > 40
