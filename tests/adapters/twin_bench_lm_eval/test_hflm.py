"""The methods that lm-eval's own tests of HFLM call, of a one-expert twin and of HFLM on that expert's checkpoint."""

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria

from tests.support.lm_eval_requests import generated, rolling, scored, served, text

pytestmark = pytest.mark.versions

STRINGS = [text(random.Random(number), size) for number, size in enumerate((5, 2, 9))]


@pytest.fixture(scope="module")
def pair(alone, causal_families):
    """Return the twin and HFLM, both with batches of three."""
    hf = HFLM(causal_families("llama").recipe["experts"]["mmlu"], device="cpu", dtype="float32", batch_size=3)
    return served(alone, batch_size=3), hf


def test_texts_become_tokens_and_back(pair):
    twin, hf = pair
    for string in STRINGS:
        for options in ({}, {"left_truncate_len": 3}, {"add_special_tokens": False}):
            assert twin.tok_encode(string, **options) == hf.tok_encode(string, **options)
        assert twin.tok_decode(twin.tok_encode(string)) == hf.tok_decode(hf.tok_encode(string)) == string
    for side in ("left", "right"):
        for mine, theirs in zip(
            twin.tok_batch_encode(STRINGS, padding_side=side, left_truncate_len=8),
            hf.tok_batch_encode(STRINGS, padding_side=side, left_truncate_len=8),
            strict=True,
        ):
            assert torch.equal(mine, theirs)


def test_what_a_model_is_asked_about_itself(pair):
    twin, hf = pair
    for name in ("max_length", "max_gen_toks", "eot_token_id", "prefix_token_id", "batch_size", "rank", "world_size"):
        assert getattr(twin, name) == getattr(hf, name), name
    assert twin.device == hf.device
    assert twin.backend == hf.backend == "causal"
    assert twin.vocab_size == hf.vocab_size


def test_logits_of_a_batch(pair):
    twin, hf = pair
    ids, _ = twin.tok_batch_encode(STRINGS, padding_side="right")
    found, expected = twin._model_call(ids), hf._model_call(ids)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    rows = [twin._select_cont_toks(logits, contlen=2, inplen=5) for logits in found]
    for mine, theirs in zip(rows, (hf._select_cont_toks(one, contlen=2, inplen=5) for one in expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop", [["\n\n"], ["dog", "cat"], [" "]])
@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"temperature": 0.0}, {"num_beams": 2}])
def test_a_batch_is_continued(pair, stop, options):
    twin, hf = pair
    ids, _ = twin.tok_batch_encode(STRINGS)
    found = twin._model_generate(ids, max_length=ids.shape[1] + 10, stop=stop, **options)
    assert torch.equal(found, hf._model_generate(ids, max_length=ids.shape[1] + 10, stop=stop, **options))
    one = twin.tok_batch_encode(STRINGS[:1])[0]
    assert torch.equal(
        twin._model_generate(one, one.shape[1] + 4, stop), hf._model_generate(one, one.shape[1] + 4, stop)
    )


def test_where_a_text_stops(pair):
    """The criteria that HFLM makes and those of the twin's decoding end the same continuations."""
    twin, hf = pair
    ids, _ = twin.tok_batch_encode(STRINGS)
    for stop in (["dog"], ["a", "small"]):
        for model in pair:
            criteria = stop_sequences_criteria(model.tokenizer, stop, ids.shape[1], len(ids))
            assert len(criteria) == len(stop)
        asked = generated(STRINGS, until=stop)
        assert twin.generate_until(asked) == hf.generate_until(asked)
        assert not any(word in answer for answer in twin.generate_until(asked) for word in stop)


def test_requests_of_every_type(pair):
    twin, hf = pair
    pairs = [(string, f" {word}") for string in STRINGS for word in ("dog", "cat sat", "the")] + [("", "the cat")]
    for (mine, greedy), (theirs, hf_greedy) in zip(
        twin.loglikelihood(scored(pairs)), hf.loglikelihood(scored(pairs)), strict=True
    ):
        assert mine == pytest.approx(theirs, abs=1e-4)
        assert greedy == hf_greedy
    documents = [*STRINGS, text(random.Random(8), 80), ""]
    found, expected = (model.loglikelihood_rolling(rolling(documents)) for model in pair)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[-1] == expected[-1] == 0
    asked = [(None, [5, 6, 7], [8]), (None, [9], [10, 11])]
    mine, theirs = (model._loglikelihood_tokens(asked, disable_tqdm=True) for model in pair)
    assert [one for one, _ in mine] == pytest.approx([one for one, _ in theirs], abs=1e-4)


def test_a_batch_size_is_detected_for_requests_as_hflm_detects_it(pair):
    twin, hf = pair
    requests = [(None, [5] * 8, [6]), (None, [5], [6])]
    assert hf._detect_batch_size(requests, 0) == 64  # a CPU's memory holds it
    assert twin._detect_batch_size(requests, 0) == twin._detect_batch_size(requests, 1) == 16
