"""An encoder-decoder's twin in lm-eval: against HFLM's backend seq2seq on its own checkpoint, and dense models."""

import functools
import random

import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from tests.support.dense import dense
from tests.support.families import alone
from tests.support.lm_eval_requests import generated, rolling, scored, text
from twin_bench import InputError, TwinModel
from twin_bench_lm_eval.model import TwinMerged, serving
from twin_bench_lm_eval.seq2seq import Seq2SeqTwin

pytestmark = pytest.mark.versions

RNG = random.Random(0)
PAIRS = [(text(RNG, words), text(RNG, answer)) for words, answer in ((3, 2), (8, 1), (8, 3), (20, 4), (45, 2))]
PAIRS += [(PAIRS[2][0], " is it"), (PAIRS[2][0] + " ", "is it"), ("", "the cat")]
PROMPTS = [text(RNG, words) for words in (3, 8, 8, 15)]
DOCUMENTS = [text(RNG, words) for words in (5, 60)]


@functools.cache
def served(directory, **options):
    model = TwinMerged(pretrained=str(directory), device="cpu", dtype="float32", **options)
    assert isinstance(model, Seq2SeqTwin)
    return model


@pytest.fixture(scope="module")
def pairs_of(seq2seq_families, tmp_path_factory):
    """Return a function from kind to the twin of one expert, and HFLM of that expert."""

    @functools.cache
    def pair(kind):
        family = seq2seq_families(kind)
        expert = family.recipe["experts"]["mmlu"]
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(expert)
        # Else HFLM ties Flan-T5's output layer to the embeddings: transformers 5 says of every T5 that it is tied.
        model.config.tie_word_embeddings = kind != "flan-t5"
        tokenizer = transformers.AutoTokenizer.from_pretrained(expert)
        hf = HFLM(model, tokenizer=tokenizer, backend="seq2seq", batch_size=1)
        return served(alone(family, tmp_path_factory.mktemp("alone")), batch_size=4), hf

    return pair


@pytest.mark.parametrize("kind", ["t5", "flan-t5", "bart"])
def test_one_expert_answers_as_hflm_on_its_own_checkpoint(pairs_of, kind):
    twin, hf = pairs_of(kind)
    found, expected = (model.loglikelihood(scored(PAIRS)) for model in (twin, hf))
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-5, rel=1e-6)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    found, expected = (model.loglikelihood_rolling(rolling(DOCUMENTS)) for model in (twin, hf))
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-6)
    assert twin.max_length == hf.max_length == 64


@pytest.mark.parametrize("kind", ["t5", "flan-t5", "bart"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"max_gen_toks": 5, "until": ["a", "dog"]},
        {"max_length": 9, "repetition_penalty": 2.0},
    ],
)
def test_texts_are_hflms_of_a_batch_of_one(pairs_of, kind, options):
    """HFLM counts the padding of a batch to the tokens that it generates, and BART's positions with it."""
    twin, hf = pairs_of(kind)
    found, expected = (model.generate_until(generated(PROMPTS, **options)) for model in (twin, hf))
    assert found == expected
    assert len(set(found)) > 1


def test_a_last_token_that_the_model_asks_for_comes_where_hflm_has_it(pairs_of):
    twin, hf = pairs_of("bart")
    plain = twin.generate_until(generated(PROMPTS, until=[]))
    for model in (twin.twin.model, hf.model):
        model.generation_config.forced_eos_token_id = 3
        model.generation_config.num_beams = 2
    try:
        found, expected = (model.generate_until(generated(PROMPTS, until=[])) for model in (twin, hf))
    finally:
        for model in (twin.twin.model, hf.model):
            model.generation_config.forced_eos_token_id = None
            model.generation_config.num_beams = 1
    assert found == expected != plain


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_each_request_is_its_own_dense_model(seq2seq_families, seq2seq_twins, kind):
    """Routing read here from each context alone; the model made for it in float64."""
    directory = seq2seq_twins(kind)
    model, twin = served(directory, batch_size=4), TwinModel.from_pretrained(directory)
    found = model.loglikelihood(scored(PAIRS[:-1]))
    for (context, continuation), (log_likelihood, greedy) in zip(PAIRS[:-1], found, strict=True):
        moved = context[len(context.rstrip()) :]
        source = torch.tensor([model.tok_encode(context.rstrip())[-64:]])
        target = torch.tensor([model.tok_encode(moved + continuation, add_special_tokens=False)])
        reference = dense(seq2seq_families(kind), twin.route(source)[0])
        with torch.no_grad():
            logits = reference(input_ids=source, labels=target).logits[0]
        expected = logits.log_softmax(dim=-1)[range(target.shape[1]), target[0]].sum()
        assert log_likelihood == pytest.approx(float(expected), abs=1e-4)
        assert greedy == bool((logits.argmax(dim=-1) == target[0]).all())
    texts = model.generate_until(generated(PROMPTS, until=["zz"]))
    for prompt, answer in zip(PROMPTS, texts, strict=True):
        source = torch.tensor([model.tok_encode(prompt)])
        reference = dense(seq2seq_families(kind), twin.route(source)[0])
        ids = reference.generate(source, max_length=source.shape[1] + 12, do_sample=False)
        assert answer == model.tok_decode(ids[0])


def test_order_and_batch_size_change_nothing(seq2seq_twins):
    first = served(seq2seq_twins("bart"), batch_size=1)
    expected, texts = first.loglikelihood(scored(PAIRS)), first.generate_until(generated(PROMPTS))
    order = random.Random(1).sample(range(len(PAIRS)), len(PAIRS))
    model = served(seq2seq_twins("bart"), batch_size="auto")
    for row, (found, greedy) in zip(order, model.loglikelihood(scored([PAIRS[row] for row in order])), strict=True):
        assert found == pytest.approx(expected[row][0], abs=1e-5)
        assert greedy == expected[row][1]
    assert model.generate_until(generated(PROMPTS[::-1])) == texts[::-1]


def test_equal_contexts_are_encoded_once_a_batch(seq2seq_twins, monkeypatch):
    model = served(seq2seq_twins("t5"), batch_size=8)
    asked = scored([(context, answer) for context, _ in PAIRS[:2] for answer in (" cat", " the dog", " is")])
    expected = model.loglikelihood(asked)
    encoder = model.twin.backbone
    sizes = []
    hook = encoder.register_forward_pre_hook(
        lambda _, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(model.twin, "route_all", lambda rows, *_, **__: torch.full((len(rows), 3), 1 / 3))
    model.loglikelihood(asked)
    hook.remove()
    assert sum(sizes) == 2
    assert model.loglikelihood(asked) != expected


def test_arguments_and_calls_of_hflm(seq2seq_twins):
    directory = seq2seq_twins("bart")
    with pytest.raises(InputError, match="backend=causal: a twin's kind is in its twin"):
        TwinMerged(pretrained=str(directory), device="cpu", backend="causal")
    with pytest.raises(InputError, match="max_length=65; the model's window is 64"):
        TwinMerged(pretrained=str(directory), device="cpu", max_length=65)
    twin = TwinModel.from_pretrained(directory, routing="task")
    model = serving(twin, task="bbq", batch_size=2, max_length=None)
    source, target = torch.tensor([[5, 6, 7, 3]]), torch.tensor([[8, 9]])
    given = twin(source, labels=target, task="bbq").logits
    assert torch.equal(model._model_call(source, attn_mask=torch.ones_like(source), labels=target), given)
    ids = model._model_generate(source, 8, ["dog"], do_sample=False)
    assert torch.equal(ids, twin.generate(source, task="bbq", max_length=8, do_sample=False))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_batch_size_is_that_of_the_costliest_batch(seq2seq_twins, monkeypatch, kind):
    """Each rehearsal runs with fused weights and with each row's own; the device here has no memory for more rows."""
    first, asked = served(seq2seq_twins(kind), batch_size=1), generated(PROMPTS[:1], num_beams=2)
    scores, texts = first.loglikelihood(scored(PAIRS[:3])), first.generate_until(asked)
    model = TwinMerged(pretrained=str(seq2seq_twins(kind)), device="cpu", batch_size="auto", max_batch_size=16)
    seen = []

    def watch(module, args, options):
        seen.append((tuple(options["encoder_hidden_states"].shape[:2]), options["input_ids"].shape[1]))
        if len(options["input_ids"]) > 8:
            raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(Seq2SeqTwin, "device", torch.device("meta"))
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)
    model.twin.model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
    size = model._detect_batch_size([(None, [5, 6, 7], [8, 9]), (None, [5], [6])])
    assert 6 <= size <= 8
    assert seen[-2:] == [((size, 3), 2)] * 2
    for (found, _), (expected, _) in zip(model.loglikelihood(scored(PAIRS[:3])), scores, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    seen.clear()
    assert model.generate_until(asked) == texts
    length = len(model.tok_encode(PROMPTS[0]))
    assert any(width == length and steps == length + 11 for (_, width), steps in seen)  # a text of its whole length
