"""Decoding: where texts end, what a generation config asks for, and what a text's time is."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

from tests.support.models import tiny_causal_tokenizer, tiny_tokenizer
from twin_bench import TwinModel
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.requests import Generate, generate
from twin_bench.twin.sampling import Completion, Sampling, stop_length

pytestmark = pytest.mark.versions

PROMPTS = [(5, 6, 7), (9, 8, 7, 6), (20, 30), (100, 110, 120, 130), (41,), (60, 61, 62), (7, 7), (200, 150, 100)]


@pytest.fixture
def twin(causal_twins: Any) -> TwinCausalLM:
    return TwinModel.from_pretrained(causal_twins("llama"))


def texts(twin: TwinCausalLM, requests: Sequence[Generate], **options: Any) -> list[Completion]:
    return [completion for (completion,) in generate(twin, requests, **options)]


def same(found: Sequence[Completion], expected: Sequence[Completion]) -> bool:
    return all(
        dataclasses.replace(ours, log_probs=[]) == dataclasses.replace(theirs, log_probs=[])
        and ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)
        for ours, theirs in zip(found, expected, strict=True)
    )


def first(twin: TwinCausalLM, found: Completion, stop: str) -> int:
    """Return the number of tokens of a text up to the token that completes a stop string, or of all its tokens."""
    counts = (count for count in range(1, len(found.tokens)) if stop in twin.tokenizer.decode(found.tokens[:count]))
    return next(counts, len(found.tokens))


@pytest.mark.parametrize("padding", ["[PAD]", "[SEP]"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_text_ends_at_its_stop_string_in_any_company(twin: TwinCausalLM, padding: str, pieces: int) -> None:
    """Rows that end early are filled with padding, which may be the token that ends a text."""
    twin.tokenizer.pad_token = padding
    free = texts(twin, [Generate(prompt, 12) for prompt in PROMPTS])
    candidates = [twin.tokenizer.decode(found.tokens[2 : 2 + pieces]) for found in free]
    stop = next(text for text in candidates if "\ufffd" not in text)
    requests = [Generate(prompt, 12, Sampling(stop=("nowhere", stop))) for prompt in PROMPTS]
    alone = [texts(twin, [request])[0] for request in requests]
    for batch_size in (2, 8):
        assert same(texts(twin, requests, batch_size=batch_size), alone)
    for found, whole in zip(alone, free, strict=True):
        kept = first(twin, whole, stop)
        assert found.tokens == whole.tokens[:kept]
        assert found.log_probs == pytest.approx(whole.log_probs[:kept], abs=1e-4)
        assert found.finish_reason == ("stop" if stop in twin.tokenizer.decode(found.tokens) else "length")
    assert {found.finish_reason for found in alone} == {"stop", "length"}
    assert sum(len(found.tokens) for found in alone) < 12 * len(PROMPTS)


def test_a_stop_string_does_not_begin_in_the_prompt(twin: TwinCausalLM) -> None:
    (free,) = texts(twin, [Generate(PROMPTS[0], 6)])
    straddling = twin.tokenizer.decode([*PROMPTS[0][-1:], *free.tokens[:1]])
    assert straddling not in twin.tokenizer.decode(free.tokens)
    for steps in (1, 6):
        (found,) = texts(twin, [Generate(PROMPTS[0], steps, Sampling(stop=(straddling,)))])
        assert (found.tokens, found.finish_reason) == (free.tokens[:steps], "length")


def llama_tokenizer() -> Any:
    """Return a tokenizer like Llama 2's: a space is part of the token after it, and all bytes are tokens."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "\u2581ab", "ba"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")


STOPS = ["a", " a", "ab", "\n", "\n\n", "a b", "b a", "\u00e9", "\u20ac", "a\u00e9b", "the cat", "##"]


@pytest.mark.parametrize("make", [llama_tokenizer, tiny_causal_tokenizer, tiny_tokenizer])
@pytest.mark.parametrize("stop", STOPS)
def test_a_row_ends_with_the_token_that_completes_the_stop_string(make: Any, stop: str) -> None:
    """Step by step, as `generate` asks. The prompt holds the stop string itself."""
    tokenizer, draw = make(), random.Random(stop)
    prompt = tokenizer(stop)["input_ids"]
    some = [token for text in (stop, "a", "\u20ac", " the") for token in tokenizer(text)["input_ids"]]
    for _ in range(60):
        ids = draw.choices([*some, draw.randrange(len(tokenizer))], k=8)
        ids[4:4] = prompt if draw.random() < 0.5 else []
        (criterion,) = Sampling(stop=("#nowhere", stop)).options(tokenizer, ["s"], len(prompt))["stopping_criteria"]
        for count in range(1, len(ids) + 1):
            ends = bool(criterion(torch.tensor([[*prompt, *ids[:count]]]), None))
            assert ends == (stop in tokenizer.decode(ids[:count]))
            if ends:
                padded = [*ids[:count], *[tokenizer.pad_token_id] * 3]
                assert stop_length(tokenizer, padded, ("#nowhere", stop)) == count
                break
            assert stop_length(tokenizer, ids[:count], ("#nowhere", stop)) is None


def test_one_token_can_complete_a_stop_string_or_end_the_text(twin: TwinCausalLM) -> None:
    (free,) = texts(twin, [Generate(PROMPTS[1], 1)])
    stop = (twin.tokenizer.decode(free.tokens),)
    stopped = [texts(twin, [Generate(PROMPTS[1], steps, Sampling(stop=stop))])[0] for steps in (1, 5)]
    assert same(stopped, [dataclasses.replace(free, stopped=True)] * 2)
    assert stopped[0].finish_reason == "stop"
    twin.model.generation_config.eos_token_id = free.tokens[0]
    ended = [texts(twin, [Generate(PROMPTS[1], steps)])[0] for steps in (1, 5)]
    assert [found.finish_reason for found in ended] == ["endoftext"] * 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 0.01},  # a prompt's own tokens win
        {"suppress_tokens": [7, 31, 68, 97, 214]},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"do_sample": True, "temperature": 9.0},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_one_token_is_the_first_of_a_longer_text(
    twin: TwinCausalLM, settings: dict[str, Any], temperature: float
) -> None:
    """Whatever the model's generation config asks for. Its log-probability is the model's own."""
    plain = texts(twin, [Generate(prompt, 1, seed="s") for prompt in PROMPTS])
    for name, value in settings.items():
        setattr(twin.model.generation_config, name, value)
    decoding = Sampling(temperature)
    one = texts(twin, [Generate(prompt, 1, decoding, seed="s") for prompt in PROMPTS])
    several = texts(twin, [Generate(prompt, 5, decoding, seed="s") for prompt in PROMPTS])
    assert [found.tokens for found in one] == [found.tokens[:1] for found in several]
    assert [found.log_probs for found in one] == [pytest.approx(found.log_probs[:1], abs=1e-4) for found in several]
    if "repetition_penalty" in settings and not temperature:
        assert [found.tokens for found in one] != [found.tokens for found in plain]
    for request, found in zip(PROMPTS, one, strict=True):
        weights = twin.route(torch.tensor([request]))
        logits = twin(torch.tensor([request]), fusion_weights=weights).logits[0, -1].log_softmax(dim=-1)
        if found.tokens:
            assert found.log_probs == [pytest.approx(float(logits[found.tokens[0]]), abs=1e-4)]


@pytest.mark.parametrize("steps", [1, 4])
def test_the_likeliest_tokens_are_those_of_the_dense_logits(twin: TwinCausalLM, steps: int) -> None:
    """At every place, whatever was drawn there. Requests that ask for none, or for other numbers, stand among them."""
    counts = [3, 0, 5, 3, 400]
    drawn = Sampling(4.0, stop=("#nowhere",))
    asked = [
        Generate(prompt, steps, drawn, seed="s", likeliest=count)
        for prompt, count in zip(PROMPTS, counts, strict=False)
    ]
    others = texts(twin, [dataclasses.replace(request, likeliest=0) for request in asked])
    for request, found, other in zip(asked, texts(twin, asked), others, strict=True):
        assert (found.tokens, found.log_probs) == (other.tokens, pytest.approx(other.log_probs, abs=1e-5))
        weights, ids = twin.route(torch.tensor([request.prompt])), [*request.prompt, *found.tokens]
        logits = twin(torch.tensor([ids]), fusion_weights=weights).logits[0].log_softmax(dim=-1)
        assert len(found.likeliest) == len(found.tokens)
        for place, told in enumerate(found.likeliest, start=len(request.prompt) - 1):
            expected = logits[place].topk(min(request.likeliest, 300))
            assert [token for token, _ in told] == expected.indices.tolist()
            assert [value for _, value in told] == pytest.approx(expected.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_completions_are_rows_of_a_forward(twin: TwinCausalLM, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Generate(PROMPTS[0], steps, Sampling(5.0), completions=7, seed="a")
    requests = [request, dataclasses.replace(request, prompt=PROMPTS[1], completions=2)]
    expected = [generate(twin, [one], batch_size=50)[0] for one in requests]
    rows: list[int] = []
    forward = twin.model.forward

    def counted(*arguments: Any, **inputs: Any) -> Any:
        output = forward(*arguments, **inputs)
        rows.append(len(output.logits))
        return output

    monkeypatch.setattr(twin.model, "forward", counted)
    done: list[int] = []
    found = generate(twin, requests, batch_size=4, progress=done.append)
    assert max(rows) <= 4
    assert sum(done) == 2 * 2  # each request is routed, and answered
    for ours, theirs in zip(found, expected, strict=True):
        assert same(ours, theirs)
    assert len({str(one.tokens) for one in found[0]}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_is_the_largest_of_scores_and_float64_noise(dtype: torch.dtype) -> None:
    """The noise is drawn from each row's own generator. The device needs no float64."""
    seeds = [f"s/{number}" for number in range(400)]
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(400, 1)
    scores[:, 7] = -torch.inf
    draw = Sampling(1.0).options(None, seeds, 3)["logits_processor"][-1]
    found = draw(torch.zeros(400, 0), scores)
    states = [int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1 for seed in seeds]
    uniform = torch.stack(
        [torch.rand(50, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in states]
    )
    expected = (scores.double() - torch.log(-torch.log(uniform))).argmax(dim=-1)
    assert found.argmax(dim=-1).tolist() == expected.tolist()
    assert (found.shape, found.dtype, found.device) == (scores.shape, dtype, scores.device)
    assert len(set(expected.tolist())) > 20
    assert 7 not in expected


@pytest.mark.parametrize("steps", [1, 4])
def test_top_k_leaves_that_many_tokens(twin: TwinCausalLM, steps: int) -> None:
    """Of a distribution that is nearly flat. The first k that are drawn from are the likeliest ones at each place."""
    request = Generate(PROMPTS[0], steps, Sampling(1e3, top_k=3), completions=40, likeliest=3)
    (found,) = generate(twin, [request])
    drawn = {token for one in found for token in one.tokens[:1]}
    assert drawn == {token for token, _ in found[0].likeliest[0]}
    assert all(token in dict(place) for one in found for token, place in zip(one.tokens, one.likeliest, strict=True))
    ((greedy,),) = generate(twin, [Generate(PROMPTS[0], steps)])
    (sole,) = generate(twin, [dataclasses.replace(request, decoding=Sampling(1e3, top_k=1), likeliest=0)])
    assert same(sole, [greedy] * 40)


def test_texts_share_the_time_of_their_batch(twin: TwinCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Generate(prompt, 3) for prompt in PROMPTS[:4]] + [Generate(prompt, 1) for prompt in PROMPTS[4:]]
    batch, slept = twin.generate_batch, 0.2

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(slept)
        return batch(*arguments, **options)

    monkeypatch.setattr(twin, "generate_batch", slow)
    begun = time.perf_counter()
    found = texts(twin, requests, batch_size=4)
    taken = time.perf_counter() - begun
    assert 0.99 * slept < sum(one.seconds for one in found) <= taken
    assert len({one.seconds for one in found[:4]}) == 1
    assert found[0].seconds > slept / 4 > found[-1].seconds
