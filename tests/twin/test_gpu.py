"""Twins on a CUDA device: against dense models made for every sample in float64, and against themselves on the CPU."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.dense import batch, dense, mixes, truncated, whole
from tests.support.families import DENSITY, built
from twin_bench import TwinModel
from twin_bench.twin import requests, seq2seq_requests
from twin_bench.twin.requests import Generate, Score
from twin_bench.twin.sampling import Sampling

pytestmark = pytest.mark.gpu

ROWS = 6
KINDS = {
    **dict.fromkeys(("bert", "roberta", "distilbert", "gpt2"), "classifier"),
    **dict.fromkeys(("llama", "gemma", "opt"), "causal"),
    **dict.fromkeys(("flan-t5", "bart"), "seq2seq"),
}
LANGUAGE = [kind for kind, what in KINDS.items() if what != "classifier"]
WEIGHTS = mixes(ROWS, 3)["mixed"]
TASKS = ["cola", "stsb", "mnli"] * (ROWS // 3)
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""The largest relative error of hidden states and logits, by dtype."""
PROMPTS = [[5, 6, 7], [9, 8, 7, 6], [20, 30], [100, 110, 120, 130], [41], [60, 61, 62]]


@pytest.fixture(scope="module")
def family(families: Any, causal_families: Any, seq2seq_families: Any) -> Any:
    """Return a function from kind to its family."""
    makers = {"classifier": families, "causal": causal_families, "seq2seq": seq2seq_families}
    return lambda kind: makers[KINDS[kind]](kind)


@pytest.fixture(scope="module")
def directory(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from kind and density to a twin of it. At density 1 the experts have a joint basis."""

    @functools.cache
    def of(kind: str, density: float = DENSITY) -> Path:
        recipe = {**family(kind).recipe, "exclusive": {"density": density}}
        return built(recipe, tmp_path_factory.mktemp(kind) / "twin")

    return of


@pytest.fixture(scope="module")
def expected(family: Any) -> Any:
    """Return a function from kind and density to what each row's dense model computes on the CPU, in float64."""

    @functools.cache
    def of(kind: str, density: float) -> list[Tensor]:
        found: list[Tensor] = []
        for row, weights in enumerate(WEIGHTS):
            model = dense(family(kind), weights, truncated if density == DENSITY else whole)
            found += computed(model, {name: tensor[row : row + 1] for name, tensor in inputs_of(kind).items()})
        return found

    return of


def inputs_of(kind: str) -> dict[str, Tensor]:
    inputs = batch(ROWS)
    if KINDS[kind] == "seq2seq":
        inputs["decoder_input_ids"] = batch(ROWS, seed=1)["input_ids"][:, :5].clamp(min=4)
    return inputs


@torch.no_grad()
def computed(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return a language model's logits or a classifier's hidden states, each row's own without padding."""
    found = model(**inputs).logits if hasattr(model, "lm_head") else model.base_model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].bool()
    rows = range(len(found))
    return [found[row] if "decoder_input_ids" in inputs else found[row][mask[row]] for row in rows]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    one, other = (torch.cat([row.flatten() for row in rows]).double().cpu() for rows in (found, expected))
    return float((one - other).norm() / other.norm())


def test_products_in_float32_are_not_rounded_to_tf32() -> None:
    """Nothing here changes torch's default, and answers in float32 rely on it."""
    assert torch.get_float32_matmul_precision() == "highest"
    one, other = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = one.cuda() @ other.cuda()
    assert error([found], [one.double() @ other.double()]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
@pytest.mark.parametrize("mode", ["fused", "rows", "joint"])
def test_fusion_is_the_dense_model_of_every_row(
    directory: Any, expected: Any, kind: str, dtype: torch.dtype, mode: str
) -> None:
    density = 1.0 if mode == "joint" else DENSITY
    twin = TwinModel.from_pretrained(directory(kind, density), device="cuda", dtype=dtype)
    assert any(getattr(layer, "basis", None) for layer in twin.fusion.layers) == (mode == "joint")
    inputs = {name: tensor.cuda() for name, tensor in inputs_of(kind).items()}
    if mode == "fused":
        found = []
        for row, weights in enumerate(WEIGHTS.cuda()):
            with twin.fusion.fuse(weights):
                found += computed(twin.model, {name: tensor[row : row + 1] for name, tensor in inputs.items()})
    else:
        with twin.fusion.per_row(WEIGHTS.cuda()):
            found = computed(twin.model, inputs)
    assert {row.dtype for row in found} == {dtype}
    assert error(found, expected(kind, density)) < ERRORS[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_that_is_moved_after_use_answers_as_a_new_one(directory: Any, expected: Any, kind: str) -> None:
    twin = TwinModel.from_pretrained(directory(kind))
    for place in ("cpu", "cuda", torch.bfloat16, "cpu", "cuda"):
        twin.to(place)
        inputs = {name: tensor.to(twin.device) for name, tensor in inputs_of(kind).items()}
        with twin.fusion.per_row(WEIGHTS.to(twin.device)):
            rows = computed(twin.model, inputs)
        with twin.fusion.fuse(WEIGHTS[1].to(twin.device)):
            fused = computed(twin.model, inputs)[1]
        assert error(rows, expected(kind, DENSITY)) < ERRORS[twin.model.dtype]
        assert error([fused], expected(kind, DENSITY)[1:2]) < ERRORS[twin.model.dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_routed_as_on_the_cpu(directory: Any, kind: str) -> None:
    encoded = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in ([5, 6, 7], [9, 8], [20, 21, 22, 23])]
    cpu, gpu = (TwinModel.from_pretrained(directory(kind), device=device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(gpu.route_all(encoded).cpu(), cpu.route_all(encoded), atol=1e-5, rtol=0)
    ids = torch.tensor([encoded[0]["input_ids"]])
    torch.testing.assert_close(gpu.route(ids.cuda()).cpu(), cpu.route(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [kind for kind, what in KINDS.items() if what == "classifier"])
@pytest.mark.parametrize("protocol", ["standard", "paper", "routed"])
def test_classifiers_answer_as_on_the_cpu(directory: Any, kind: str, protocol: Any) -> None:
    texts = [("the cat sat", None), ("a small dog is quick", None), ("who why", None)] * 2
    logits, probes = [], []
    for device in ("cpu", "cuda"):
        twin: Any = TwinModel.from_pretrained(directory(kind), device=device, protocol=protocol)
        logits.append([one.logits for one in twin.classify(texts, TASKS, fusion_weights=WEIGHTS)])
        probes.append(twin.probe(twin.encode(texts), TASKS, WEIGHTS))
        if protocol == "standard":
            inputs = {name: tensor.to(device) for name, tensor in batch(ROWS).items()}
            logits[-1].append(twin(**inputs, task=TASKS, fusion_weights=WEIGHTS.to(device)).logits.cpu())
    for one, other in (logits, probes):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", LANGUAGE)
def test_drawn_texts_depend_on_their_seeds_alone(directory: Any, kind: str) -> None:
    """A text is the same in any company. The device draws otherwise than the CPU."""
    answer: Any = (seq2seq_requests if KINDS[kind] == "seq2seq" else requests).generate
    twin = TwinModel.from_pretrained(directory(kind), device="cuda")
    decoding = Sampling(temperature=1.0, top_p=0.95)
    asked = [Generate(prompt, 8, decoding, seed=str(prompt), completions=2) for prompt in PROMPTS]
    found = [
        [[text.tokens for text in one] for one in answer(twin, asked, fusion_weights=WEIGHTS, batch_size=size)]
        for size in (1, 4, 12)
    ]
    assert found[0] == found[1] == found[2]
    assert len({tuple(text) for one in found[0] for text in one}) > len(PROMPTS)


def test_the_device_draws_from_the_distribution() -> None:
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    draw = Sampling(1.0).options(None, [str(number) for number in range(20000)], 3)["logits_processor"][-1]
    drawn = draw(torch.zeros(20000, 0), scores.cuda().repeat(20000, 1)).argmax(dim=-1)
    shares = torch.bincount(drawn, minlength=50).cpu() / 20000
    assert float((shares - scores[0].softmax(dim=0)).abs().max()) < 0.01


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("weights", [WEIGHTS, WEIGHTS[:1].expand_as(WEIGHTS)], ids=["rows", "alike"])
def test_compiled_steps_write_the_texts_of_plain_ones(directory: Any, kind: str, weights: Tensor) -> None:
    """It takes a minute or more: torch compiles two graphs."""
    asked = [Generate(prompt, 8) for prompt in PROMPTS]
    twins: list[Any] = [TwinModel.from_pretrained(directory(kind), device="cuda") for _ in range(2)]
    twins[1].compiling = "on"
    plain, *compiled = (requests.generate(twin, asked, fusion_weights=weights) for twin in (*twins, twins[1]))
    assert not twins[1].steps.failed
    for found in compiled:
        for (text,), (same,) in zip(plain, found, strict=True):
            assert (same.tokens, same.end_token) == (text.tokens, text.end_token)
            assert same.log_probs == pytest.approx(text.log_probs, abs=1e-4)


@pytest.mark.parametrize("kind", LANGUAGE)
def test_greedy_texts_are_those_of_the_cpu(directory: Any, kind: str) -> None:
    answer: Any = (seq2seq_requests if KINDS[kind] == "seq2seq" else requests).generate
    asked = [
        Generate(prompt, steps, seed=str(steps), completions=2, likeliest=2)
        for prompt, steps in zip(PROMPTS, (8, 8, 1, 8, 8, 1), strict=True)
    ]
    cpu, gpu = (
        answer(TwinModel.from_pretrained(directory(kind), device=device), asked, fusion_weights=WEIGHTS)
        for device in ("cpu", "cuda")
    )
    for one, other in zip(cpu, gpu, strict=True):
        for text, same in zip(one, other, strict=True):
            assert (same.tokens, same.end_token) == (text.tokens, text.end_token)
            assert same.log_probs == pytest.approx(text.log_probs, abs=1e-4)
    assert len({tuple(text.tokens) for one in cpu for text in one}) > 1


@pytest.mark.parametrize("kind", LANGUAGE)
def test_log_likelihoods_are_those_of_the_cpu(directory: Any, kind: str) -> None:
    """Each context has two continuations, and long ones share a prefix. Weights are found by the router, or given."""
    answer: Any = (seq2seq_requests if KINDS[kind] == "seq2seq" else requests).score
    begun = list(range(10, 32))
    asked = [Score([*begun, *prompt], [own, 7]) for prompt in PROMPTS[:3] for own in (5, 6)]
    for weights in (None, WEIGHTS, WEIGHTS[:1].repeat(ROWS, 1)):
        cpu, gpu = (
            answer(TwinModel.from_pretrained(directory(kind), device=device), asked, fusion_weights=weights)
            for device in ("cpu", "cuda")
        )
        for one, other in zip(cpu, gpu, strict=True):
            torch.testing.assert_close(other.log_probs, one.log_probs, atol=1e-3, rtol=1e-4)
            assert other.greedy == one.greedy


def test_next_logits_take_weights_as_they_come(directory: Any) -> None:
    """A caller's weights may be on the CPU, as those of `probe` are in a build."""
    encoded = [{"input_ids": prompt, "attention_mask": [1] * len(prompt)} for prompt in PROMPTS]
    for kind in LANGUAGE:
        cpu, gpu = (TwinModel.from_pretrained(directory(kind), device=device) for device in ("cpu", "cuda"))
        found = gpu.probe(encoded, TASKS, WEIGHTS)
        torch.testing.assert_close(found, cpu.probe(encoded, TASKS, WEIGHTS), atol=1e-4, rtol=1e-4)


def test_weights_fused_in_inference_mode_are_fused_anew_outside_it(directory: Any, expected: Any) -> None:
    twin = TwinModel.from_pretrained(directory("llama"), device="cuda")
    inputs = {name: tensor.cuda() for name, tensor in inputs_of("llama").items()}
    for inference in (True, False, True):
        for row in (0, 1):
            with torch.inference_mode(inference), twin.fusion.fuse(WEIGHTS[row].cuda()):
                found = computed(twin.model, inputs)[row]
            assert error([found], expected("llama", DENSITY)[row : row + 1]) < ERRORS[torch.float32]
