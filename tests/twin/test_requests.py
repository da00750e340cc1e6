"""The scheduler: answers in order, equal to one dense model a request, whatever else is in the list."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.support.dense import dense, mixes
from tests.support.models import CAUSAL_VOCABULARY as VOCABULARY
from tests.support.models import WORDS, tiny_causal_tokenizer
from twin_bench import InputError, TwinModel
from twin_bench.twin.causal import TwinCausalLM, tokens
from twin_bench.twin.requests import Generate, Score, generate, score
from twin_bench.twin.sampling import Completion, Sampling, takes_largest

pytestmark = pytest.mark.versions

KINDS = ["llama", "qwen2", "gemma", "gpt2", "opt"]
END = 3


def drawn_ids(generator: torch.Generator, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(4, VOCABULARY, (count,), generator=generator).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_one_dense_model_a_request(causal_families: Any, causal_twins: Any, kind: str) -> None:
    """Token by token, with shared inputs and one over the window, in every order and at every batch size."""
    twin = TwinModel.from_pretrained(causal_twins(kind))
    generator = torch.Generator().manual_seed(5)
    context, long = drawn_ids(generator, 6), drawn_ids(generator, 70)
    requests = [Score(context, (token,)) for token in drawn_ids(generator, 3)]
    requests += [Score(context, drawn_ids(generator, 4)), Score(drawn_ids(generator, 2), drawn_ids(generator, 5))]
    requests += [Score(long, drawn_ids(generator, 3))]
    weights = mixes(6, 3)["mixed"]
    weights[:4] = weights[0]
    scored = score(twin, requests, fusion_weights=weights, batch_size=2)
    for request, row_weights, found in zip(requests, weights, scored, strict=True):
        text = torch.tensor([[*request.context, *request.continuation]])[:, -65:]
        after = list(request.continuation)
        with torch.no_grad():
            logits = dense(causal_families(kind), row_weights)(text[:, :-1]).logits[0, -len(after) :]
        expected = logits.log_softmax(dim=-1)[range(len(after)), after]
        torch.testing.assert_close(found.log_probs.double(), expected, rtol=1e-4, atol=1e-4)
        assert found.greedy == (logits.argmax(dim=-1).tolist() == after)
    order = torch.randperm(6, generator=generator).tolist()
    for batch_size in (1, 4, 64):
        again = score(twin, [requests[row] for row in order], fusion_weights=weights[order], batch_size=batch_size)
        for row, found in zip(order, again, strict=True):
            torch.testing.assert_close(found.log_probs, scored[row].log_probs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return the list that the router's rows are added to."""
    calls: list[list[int]] = []
    features_of = TwinCausalLM.features_of

    def spied(self: TwinCausalLM, rows: Any, *arguments: Any, **options: Any) -> list[Tensor]:
        calls.extend(row["input_ids"] for row in rows)
        return features_of(self, rows, *arguments, **options)

    monkeypatch.setattr(TwinCausalLM, "features_of", spied)
    return calls


def test_each_distinct_context_is_routed_once_and_nothing_else_is(causal_twins: Any, read: list[list[int]]) -> None:
    twin = TwinModel.from_pretrained(causal_twins("llama"))
    context = (5, 6, 7, 8)
    score(twin, [Score(context, (9,)), Score(context, (10, 11)), Score((12, 13), (9,))])
    assert read == [[5, 6, 7, 8], [12, 13]]
    read.clear()
    score(twin, [Score((5,), (6, 7), routed_on=context), Score((12,), (6,), routed_on=(12, 9))])
    assert read == [[5, 6, 7, 8], [12, 9]]
    read.clear()
    generate(twin, [Generate(context, 1), Generate(context, 3), Generate((12, 13), 2, completions=2)])
    assert read == [[5, 6, 7, 8], [12, 13]]


def greedy(model: Any, prompt: Sequence[int], steps: int) -> tuple[list[int], list[float], int | None]:
    """Return the most probable tokens one after the other, without a cache, their log-probabilities, and the end."""
    ids, log_probs = torch.tensor([list(prompt)]), []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids).logits[0, -1].log_softmax(dim=-1)
        best = int(logits.argmax())
        if best == END:
            return ids[0, len(prompt) :].tolist(), log_probs, best
        log_probs.append(float(logits[best]))
        ids = torch.cat([ids, torch.tensor([[best]])], dim=1)
    return ids[0, len(prompt) :].tolist(), log_probs, None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", ["one_hot", "mixed", "equal"])
def test_texts_are_those_of_one_dense_model_a_request(
    causal_families: Any, causal_twins: Any, kind: str, mix: str
) -> None:
    twin = TwinModel.from_pretrained(causal_twins(kind))
    generator = torch.Generator().manual_seed(2)
    lengths = [9, 3, 6, 2, 9, 5]
    requests = [Generate(drawn_ids(generator, count), 1 + 5 * (row % 2)) for row, count in enumerate(lengths)]
    weights = mixes(len(requests), 3)[mix]
    expected = [
        greedy(dense(causal_families(kind), row_weights), request.prompt, request.max_new_tokens)
        for request, row_weights in zip(requests, weights, strict=True)
    ]
    order = torch.randperm(len(requests), generator=generator).tolist()
    for batch_size in (1, 2, 8):
        found = generate(twin, [requests[row] for row in order], batch_size=batch_size, fusion_weights=weights[order])
        for row, (completion,) in zip(order, found, strict=True):
            assert (completion.tokens, completion.end_token) == (expected[row][0], expected[row][2])
            assert completion.log_probs == pytest.approx(expected[row][1], abs=1e-4)
    silent = generate(twin, requests, fusion_weights=weights, log_probs=False)
    assert [completion.tokens for (completion,) in silent] == [ids for ids, _, _ in expected]
    assert all(not completion.log_probs for (completion,) in silent[1::2])


def test_a_text_ends_before_its_end_token(causal_twins: Any) -> None:
    twin = TwinModel.from_pretrained(causal_twins("llama"))
    requests = [Generate((5, 6, 7), 4), Generate((5, 6, 7), 1), Generate((9, 8, 7, 6), 4)]
    whole = [completion.tokens for (completion,) in generate(twin, requests)]
    ends = whole[0][0]
    twin.model.generation_config.eos_token_id = [END, ends]
    found = [completion for (completion,) in generate(twin, requests)]
    assert found[:2] == [Completion([], [], ends)] * 2
    kept = whole[2][: whole[2].index(ends)] if ends in whole[2] else whole[2]
    assert found[2].tokens == kept


def test_a_stop_string_ends_a_text_in_any_company(causal_twins: Any) -> None:
    """The rows of a batch that end early are filled with padding, which belongs to no completion."""
    twin = TwinModel.from_pretrained(causal_twins("llama"))
    prompts = [(5, 6, 7), (9, 8, 7, 6), (20, 30), (100, 110, 120, 130)]
    free = generate(twin, [Generate(prompt, 8) for prompt in prompts])
    stop = next(
        text
        for (completion,) in free
        for token in completion.tokens[:3]
        if (text := twin.tokenizer.decode([token])).strip().isascii()
    )
    requests = [Generate(prompt, 8, Sampling(stop=(stop,))) for prompt in prompts]
    alone = [generate(twin, [request])[0][0] for request in requests]
    together = [completion for (completion,) in generate(twin, requests)]
    assert [found.tokens for found in together] == [found.tokens for found in alone]
    lengths = [len(found.tokens) for found in alone]
    assert min(lengths) < max(lengths) == 8


GREEDY = Generate((), 1)
DRAWN = dataclasses.replace(GREEDY, decoding=Sampling(temperature=3.0))
SEVERAL = dataclasses.replace(DRAWN, completions=3)
TEXT = dataclasses.replace(GREEDY, max_new_tokens=6)
TEXTS = dataclasses.replace(TEXT, decoding=Sampling(temperature=3.0, top_p=0.9), completions=2)


def requests_that_begin_alike() -> list[Generate]:
    """Return requests of all kinds, in a drawn order: prompts of several lengths after three beginnings, and alone."""
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS[7 * task : 7 * task + 9], k=20)) for task in range(3)]  # the router's own
    ids = [tiny_causal_tokenizer()(text)["input_ids"] for text in texts]
    starts = [tuple(own[:length]) for own, length in zip(ids, (20, 24, 30), strict=True)]
    asked = []
    for kind in (GREEDY, DRAWN, SEVERAL, TEXT, TEXTS):
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


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_requests_that_begin_alike_are_answered_as_each_alone(
    sharp_twins: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The common beginning is run once, for requests of one token and of several."""
    twin, asked = TwinModel.from_pretrained(sharp_twins(kind)), requests_that_begin_alike()
    alone = [generate(twin, [request], batch_size=1)[0] for request in asked]
    passes: list[int] = []
    prefix = twin.prefix

    def watched(ids: Any, *rest: Any) -> Any:
        passes.append(len(ids))
        return prefix(ids, *rest)

    monkeypatch.setattr(twin, "prefix", watched)
    for request, ours, theirs in zip(asked, generate(twin, asked, batch_size=3), alone, strict=True):
        assert same(ours, theirs), request
    assert {24, 30} <= set(passes)
    passes.clear()
    generate(twin, [request for request in asked if request.max_new_tokens > 1], batch_size=3)
    assert {24, 30} <= set(passes)
    assert twin.route_all([tokens(request.prompt) for request in asked]).any(dim=0).sum() > 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_token_has_its_probability_under_the_prompts_own_model(sharp_twins: Any, kind: str) -> None:
    """Whatever the temperature it was drawn at."""
    twin = TwinModel.from_pretrained(sharp_twins(kind))
    asked = [request for request in requests_that_begin_alike() if request.max_new_tokens == 1]
    found, expected = [], []
    for request, answer in zip(asked, generate(twin, asked, batch_size=3), strict=True):
        logits = twin(torch.tensor([request.prompt])).logits[0, -1]
        assert len(answer) == request.completions
        for completion in answer:
            for token, log_prob in zip(completion.tokens, completion.log_probs, strict=True):
                assert request.decoding != Sampling() or token == logits.argmax()
                found.append(log_prob)
                expected.append(float(logits.log_softmax(dim=-1)[token]))
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(found)) > 0.8 * len(found) > 40


def test_a_seed_decides_what_is_drawn(causal_twins: Any) -> None:
    twin = TwinModel.from_pretrained(causal_twins("llama"))
    one = dataclasses.replace(TEXTS, prompt=(5, 6, 7), seed="a")
    first, again, other = generate(twin, [one, one, dataclasses.replace(one, seed="b")])
    assert first == again
    assert first != other
    assert first[0] != first[1]


def test_a_twin_told_the_task_takes_it_from_the_request(causal_twins: Any, causal_families: Any) -> None:
    twin = TwinModel.from_pretrained(causal_twins("llama"), routing="task")
    prompt = (5, 6, 7, 8)
    for index, task in enumerate(twin.expert_names):
        ((completion,),) = generate(twin, [Generate(prompt, 4, task=task)])
        (scored,) = score(twin, [Score(prompt, completion.tokens, task=task)])
        model = dense(causal_families("llama"), torch.eye(3)[index])
        assert completion.tokens == greedy(model, prompt, 4)[0]
        assert scored.log_probs.tolist() == pytest.approx(completion.log_probs, abs=1e-4)
    assert score(twin, []) == generate(twin, []) == []
    for untold in ([Generate(prompt, 1)], [Generate(prompt, 1, task="mmlu"), Generate(prompt, 1)]):
        with pytest.raises(InputError, match="routing=task needs the rows' tasks"):
            generate(twin, untold)
    with pytest.raises(InputError, match="no expert of task 'mlmu'"):
        score(twin, [Score(prompt, (5,), task="mlmu")])


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Score((5,), ()), "an empty continuation"),
        (Score((), (5,)), "an empty context"),
        (Score((5,), (VOCABULARY,)), f"token {VOCABULARY} in a continuation"),
        (Score((5,), (5,) * 65), "a continuation of 65 tokens; the model's window is 64"),
        (Generate((), 3), "an empty prompt"),
        (Generate((VOCABULARY,), 3), f"token {VOCABULARY} in a prompt"),
        (Generate((5,), 0), "1 completions of 0 tokens: ask for one of each at least"),
        (Generate((5,) * 60, 5), "a prompt of 60 tokens and 5 to generate; the model's window is 64"),
    ],
)
def test_requests_that_cannot_be_answered(causal_twins: Any, request_: Any, says: str) -> None:
    twin = TwinModel.from_pretrained(causal_twins("llama"))
    with pytest.raises(InputError, match=says):
        score(twin, [request_]) if isinstance(request_, Score) else generate(twin, [request_])


@pytest.mark.parametrize("routing", ["router", "none"])
def test_every_request_is_reported_twice_routed_and_answered(causal_twins: Any, routing: Any) -> None:
    twin = TwinModel.from_pretrained(causal_twins("llama"), routing=routing)
    done: list[int] = []
    scores = [Score((5, 6), (7,)), Score((5, 6), (7,)), Score((5,), (6, 7))]
    score(twin, scores, progress=done.append)
    assert sum(done) == 2 * 3
    done.clear()
    generate(twin, [Generate((5, 6), 1), Generate((5, 6), 3, completions=2)], progress=done.append)
    assert sum(done) == 2 * 2
    done.clear()
    score(twin, scores, fusion_weights=torch.eye(3), progress=done.append)
    assert sum(done) == 2 * 3


@pytest.mark.parametrize(
    ("options", "settings", "largest"),
    [
        ({}, {}, True),
        ({"do_sample": False, "use_cache": True}, {"eos_token_id": [1, 2], "temperature": 0.6}, True),
        ({"do_sample": False, "num_beams": 1}, {"do_sample": True, "repetition_penalty": 1.0, "num_beams": 3}, True),
        ({}, {"do_sample": True}, False),
        ({"do_sample": True}, {}, False),
        ({"num_beams": 2}, {}, False),
        ({"repetition_penalty": 1.1}, {}, False),
        ({}, {"repetition_penalty": 1.1}, False),
        ({}, {"suppress_tokens": [1]}, False),
        ({}, {"num_beams": 2}, False),
    ],
)
def test_when_generate_takes_the_largest_logit(options: Any, settings: Any, largest: bool) -> None:
    assert takes_largest(options, transformers.GenerationConfig(**settings)) == largest
