"""A language model's twin in lm-eval: against lm-eval's own HFLM on merged checkpoints, and dense models a request."""

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from tests.support.dense import dense
from tests.support.lm_eval_requests import generated, rolling, scored, served, text
from twin_bench import InputError, TwinModel
from twin_bench.compat import SINCE_5

pytestmark = pytest.mark.versions


def test_one_expert_answers_as_hflm_on_its_own_checkpoint(alone, causal_families, requests):
    pairs, prompts, documents = requests
    twin = served(alone, batch_size=4)
    hf = HFLM(causal_families("llama").recipe["experts"]["mmlu"], device="cpu", dtype="float32", batch_size=4)
    for (found, greedy), (expected, hf_greedy) in zip(
        twin.loglikelihood(scored(pairs)), hf.loglikelihood(scored(pairs)), strict=True
    ):
        assert abs(found - expected) <= 1e-4
        assert greedy == hf_greedy
    found, expected = (model.loglikelihood_rolling(rolling(documents)) for model in (twin, hf))
    assert found == pytest.approx(expected, abs=1e-4)
    assert twin.generate_until(generated(prompts)) == hf.generate_until(generated(prompts))
    assert twin.max_length == hf.max_length


def test_order_and_batch_size_change_nothing(three, requests):
    pairs, prompts, documents = requests
    first = served(three, batch_size=1)
    expected = first.loglikelihood(scored(pairs))
    texts, whole = first.generate_until(generated(prompts)), first.loglikelihood_rolling(rolling(documents))
    order = random.Random(1).sample(range(len(pairs)), len(pairs))
    for batch_size in (4, "auto"):
        model = served(three, batch_size=batch_size)
        found = model.loglikelihood(scored([pairs[row] for row in order]))
        for row, (log_likelihood, greedy) in zip(order, found, strict=True):
            assert log_likelihood == pytest.approx(expected[row][0], abs=1e-5)
            assert greedy == expected[row][1]
        assert model.generate_until(generated(prompts[::-1])) == texts[::-1]
        assert model.loglikelihood_rolling(rolling(documents)) == pytest.approx(whole, abs=1e-4)


def encoded_pair(model, context, continuation):
    """Return the tokens of both as lm-eval has them: a word's space is the continuation's; no context is the bos."""
    before = model.tok_encode(context.rstrip())
    return before or [2], model.tok_encode(context + continuation)[len(before) :]


def test_each_request_is_its_own_dense_model(three, causal_families, requests):
    """Routing read here from each context alone; the model made for it in float64; greedy text step by step."""
    pairs, prompts, _ = requests
    model, twin = served(three, batch_size=4), TwinModel.from_pretrained(three)
    found = model.loglikelihood(scored(pairs))
    for (context, continuation), (log_likelihood, _) in zip(pairs, found, strict=True):
        before, after = encoded_pair(model, context, continuation)
        weights = twin.route(torch.tensor([before[-64:]]))[0]
        ids = torch.tensor([before + after])[:, -65:]
        with torch.no_grad():
            logits = dense(causal_families("llama"), weights)(ids[:, :-1]).logits[0, -len(after) :]
        expected = logits.log_softmax(dim=-1)[range(len(after)), after].sum()
        assert log_likelihood == pytest.approx(float(expected), abs=1e-4)
    for prompt, answer in zip(prompts, model.generate_until(generated(prompts)), strict=True):
        ids = torch.tensor([model.tok_encode(prompt)])[:, -64 + 12 :]
        start = ids.shape[1]
        reference = dense(causal_families("llama"), twin.route(ids)[0])
        while ids.shape[1] < start + 12 and ids[0, -1] != 3:
            with torch.no_grad():
                ids = torch.cat([ids, reference(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        assert answer == model.tok_decode(ids[0, start:]).split("dog")[0]


def test_other_answers_change_no_weight(three, monkeypatch):
    model = served(three, batch_size=4)
    seen = []
    route_all = model.twin.route_all

    def spied(*arguments, **options):
        seen.append(route_all(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(model.twin, "route_all", spied)
    for answers in ((" cat", " dog"), (" under the bird", " is")):
        model.loglikelihood(scored([("the small cat", answer) for answer in answers]))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][0], seen[0][1])


def test_a_prompt_is_encoded_as_it_would_be_alone(three):
    """HFLM adds a bos token, or leaves it out, by what the first prompt of a batch begins with."""
    model = served(three, batch_size=2, add_bos_token=True)
    prompts = ["[CLS]the cat", "a dog sat on", "[CLS]a bird", "is it"]
    assert model.generate_until(generated(prompts))[1] == model.generate_until(generated(prompts[1:2]))[0]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"max_gen_toks": 1},
        {"max_gen_toks": 5, "until": ["a", "dog"]},
        {"repetition_penalty": 2.0},
        {"do_sample": None, "temperature": 0.0},
    ],
)
def test_texts_are_hflms_whatever_the_options(alone, causal_families, options):
    """Few-shot examples are in front of the prompts, so those of one token share a prefix."""
    rng = random.Random(3)
    prompts = [*(f"{text(random.Random(4), 12)} {text(rng, 3 + row)}" for row in range(4)), "the cat"]
    hf = HFLM(causal_families("llama").recipe["experts"]["mmlu"], device="cpu", dtype="float32")
    found = served(alone, batch_size=3).generate_until(generated(prompts, **options))
    assert found == hf.generate_until(generated(prompts, **options))
    assert len(set(found)) > 1


def test_a_penalty_of_the_models_own_holds_for_one_token_too(alone, causal_families):
    hf = HFLM(causal_families("llama").recipe["experts"]["mmlu"], device="cpu", dtype="float32")
    model, prompts = served(alone, batch_size=3), ["the cat the cat", "a dog", "is it or is it"]
    plain = model.generate_until(generated(prompts, max_gen_toks=1))
    for served_model in (hf.model, model.twin.model):
        served_model.generation_config.suppress_tokens = model.tok_encode(plain[2])
    found = model.generate_until(generated(prompts, max_gen_toks=1))
    assert found == hf.generate_until(generated(prompts, max_gen_toks=1))
    assert found != plain


@pytest.mark.parametrize("kind", [str, int])
def test_what_a_model_thinks_is_cut_as_hflm_cuts_it(alone, causal_families, kind):
    prompts = [text(random.Random(6), size) for size in (3, 5, 7)]
    hf = HFLM(causal_families("llama").recipe["experts"]["mmlu"], device="cpu", dtype="float32")
    model = served(alone, batch_size=3)
    plain = hf.generate_until(generated(prompts, until=[]))
    ids = torch.tensor([hf.tok_encode(prompts[0])])
    token = int(hf.model.generate(ids, max_new_tokens=4, do_sample=False)[0, -1])
    think = token if kind is int else hf.tok_decode([token])
    model.think_end_token = hf.think_end_token = think
    found = hf.generate_until(generated(prompts, until=[]))
    assert model.generate_until(generated(prompts, until=[])) == found != plain


def test_a_length_of_prompt_and_text_counts_no_padding(three, alone, causal_families):
    prompts = [text(random.Random(7), size) for size in (3, 6)]
    hf = HFLM(causal_families("llama").recipe["experts"]["mmlu"], device="cpu", dtype="float32", batch_size=1)
    asked = generated(prompts, max_length=20)
    assert served(alone, batch_size=2).generate_until(asked) == hf.generate_until(asked)


def test_hflms_own_calls_are_routed(three, causal_families):
    """`_model_call` and `_model_generate` of prompts that no request list held, with a mask and without one."""
    model, twin = served(three), TwinModel.from_pretrained(three)
    prompts = [model.tok_encode("the cat sat"), model.tok_encode("a small dog is")]
    length = max(map(len, prompts))
    padded = torch.tensor([[0] * (length - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    logits = model._model_call(padded, attn_mask=mask)
    for row, ids in enumerate(prompts):
        reference = dense(causal_families("llama"), twin.route(torch.tensor([ids]))[0])
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0].float()
        torch.testing.assert_close(logits[row, length - len(ids) :], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model._model_call(torch.tensor([ids]))[0], expected, rtol=1e-4, atol=1e-4)
    until = model.generate_until(generated(["the cat sat", "a small dog is"], until=[], max_gen_toks=6))
    for options in ({"attention_mask": mask}, {}):
        texts = model._model_generate(padded, length + 6, ["dog"], do_sample=False, **options)
        assert [model.tok_decode(ids[length:].tolist()) for ids in texts] == until


def test_beams_have_their_prompts_weights(three):
    model = served(three, batch_size=2)
    prompts = ["the cat", "a dog sat on"]
    together = model.generate_until(generated(prompts, num_beams=3))
    assert together == [model.generate_until(generated([prompt], num_beams=3))[0] for prompt in prompts]


def test_sampling_is_seeded(three):
    model = served(three, batch_size=4)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate_until(generated(["the cat", "a dog"], do_sample=True, temperature=5.0)))
    assert drawn[0] == drawn[1] != drawn[2]


def test_features_are_kept_where_a_directory_is_named(three, requests, tmp_path, monkeypatch):
    monkeypatch.delenv("TWIN_BENCH_CACHE", raising=False)
    without = served(three)
    asked = scored(requests[0])
    expected = without.loglikelihood(asked)
    assert without.twin.feature_cache is None
    monkeypatch.setenv("TWIN_BENCH_CACHE", str(tmp_path))
    assert served(three).loglikelihood(asked) == expected
    monkeypatch.setattr(TwinModel, "features", lambda *_: pytest.fail("a row is run for the router"))
    assert served(three).loglikelihood(asked) == expected
    assert list((tmp_path / "features").glob("*-2.safetensors"))


def test_the_model_says_what_it_is(three, alone):
    info = served(three, protocol="routed").get_model_info()
    assert (info["protocol"], info["fusion"], info["routing"]) == ("routed", "exact", "router")
    assert {"model", "router", "experts/mmlu", "experts/bbq"} <= info["digests"].keys()
    assert info["model_revision"] == "main"
    assert info["model_sha"] == served(three).get_model_info()["model_sha"]
    assert len(info["model_sha"]) == 64
    assert info["model_sha"] != served(alone).get_model_info()["model_sha"]


def test_requests_that_cannot_be_answered(three):
    model = served(three)
    with pytest.raises(InputError, match="an empty context"):
        model.generate_until(generated([""]))
    with pytest.raises(InputError, match="max_gen_toks 64 leaves no room in a window of 64"):
        model.generate_until(generated(["the cat"], max_gen_toks=64))
    with pytest.raises(InputError, match="num_return_sequences: lm-eval takes one text"):
        model.generate_until(generated(["the cat"], num_return_sequences=2, num_beams=2))
    with pytest.raises(InputError, match="no chat template; leave out"):
        model.chat_template(True)
    assert not model.chat_template(False)
    with pytest.raises(InputError, match="--use_cache"):
        model.set_cache_hook(None)


def test_a_chat_template_is_applied(three):
    model = served(three)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    assert model.chat_template(True) == model.tokenizer.chat_template
    history = [{"role": "system", "content": "big"}, {"role": "user", "content": "cat"}]
    assert model.apply_chat_template(history) == "system big user cat "


@pytest.mark.skipif(not SINCE_5, reason="device maps need transformers 5")
@pytest.mark.parametrize(
    "places",
    [
        {"device_map": {"": "disk"}},
        {"parallelize": True},
        {"parallelize": True, "max_cpu_memory": 40000},
        {"parallelize": True, "device_map": "sequential", "max_cpu_memory": "40KB"},
    ],
)
def test_layers_on_several_devices_answer_as_on_one(three, tmp_path, places):
    """HFLM's arguments of several devices. 40 KB hold a part of the tiny Llama."""
    alone, spread = served(three, batch_size=4), served(three, batch_size=4, offload_folder=str(tmp_path), **places)
    offloaded = {layer.weight.is_meta for layer in spread.twin.fusion.layers}
    assert offloaded == ({True} if "device_map" in places and "parallelize" not in places else offloaded)
    assert (True in offloaded) == (places != {"parallelize": True})
    pairs = [("the cat", " dog sat"), ("a bird", " is"), ("the cat", " is")]
    found, expected = (model.loglikelihood(scored(pairs)) for model in (spread, alone))
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-5)
    prompts = ["the cat", "a dog sat on"]
    assert spread.generate_until(generated(prompts)) == alone.generate_until(generated(prompts))
    assert spread.device == spread.twin.device == alone.device
