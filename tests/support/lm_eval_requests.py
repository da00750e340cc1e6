"""Requests as lm-eval makes them, and a twin as lm-eval serves it."""

from lm_eval.api.instance import Instance

from tests.support.models import WORDS
from twin_bench_lm_eval.causal import CausalTwin
from twin_bench_lm_eval.model import TwinMerged

GREEDY = {"until": ["dog"], "max_gen_toks": 12, "do_sample": False}


def text(rng, count):
    return " ".join(rng.choices(WORDS, k=count))


def scored(pairs):
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def rolling(texts):
    return [Instance("loglikelihood_rolling", {}, (string,), index) for index, string in enumerate(texts)]


def generated(prompts, **options):
    return [Instance("generate_until", {}, (prompt, GREEDY | options), i) for i, prompt in enumerate(prompts)]


def served(directory, device="cpu", **options):
    model = TwinMerged(pretrained=str(directory), device=device, dtype="float32", **options)
    assert isinstance(model, CausalTwin)
    return model
