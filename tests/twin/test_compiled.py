"""Compiled decoding: one graph without a break in each mode, and the texts of steps that are not compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager, eager
from torch._dynamo.exc import BackendCompilerFailed

from tests.support.dense import mixes
from tests.support.families import built
from twin_bench import TwinModel
from twin_bench.compat import SINCE_5
from twin_bench.twin import memory
from twin_bench.twin.compiled import CompiledSteps, filled, runs_step_by_step
from twin_bench.twin.memory import padded_length
from twin_bench.twin.requests import Generate, generate
from twin_bench.twin.sampling import Sampling

pytestmark = [pytest.mark.versions, pytest.mark.skipif(not SINCE_5, reason="they need transformers 5")]

PROMPTS = [[5, 6, 7], [9, 8, 7, 6], [20, 30], [100, 110, 120, 130], [41], [60, 61, 62], [9, 8]]


class Counting:
    """A backend of torch.compile that runs operations one by one, and counts the graphs that it was given."""

    def __init__(self, backend: Any) -> None:
        self.graphs, self._backend = 0, backend

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        compiled: Callable[..., Any] = self._backend(graph, inputs)
        return compiled


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def joint(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a twin whose experts have a joint basis, as they are not truncated."""
    recipe = {**causal_families("llama").recipe, "exclusive": {"density": 1.0}}
    return built(recipe, tmp_path_factory.mktemp("joint") / "twin")


def pair(directory: Path, mode: str, backend: Any = aot_eager) -> tuple[Any, Any, Counting]:
    """Return a twin, the same one with compiled steps, and what counts their graphs. A break would be an error.

    The plan is made to fuse all rows or none.
    """
    plain, compiled = (TwinModel.from_pretrained(directory) for _ in range(2))
    counting = Counting(backend)
    compiled.compiling = "on"
    compiled.steps = CompiledSteps(compiled.model, compiled.fusion, backend=counting, fullgraph=True)
    for twin in (plain, compiled):
        experts = len(twin.expert_names)
        free, dear = (0.0,) * experts, (1e9,) * experts
        fused = {"fuse": free, "rebuild": 0.0, "columns": dear, "joint": 1e9}
        rows = {"fuse": dear, "rebuild": 1e9, "columns": free, "joint": 0.0}
        twin.costs = dataclasses.replace(twin.costs, **(fused if mode == "fused" else rows))
    return plain, compiled, counting


def assert_equal_texts(plain: Any, compiled: Any, asked: list[Generate], weights: Tensor, **options: Any) -> None:
    expected = generate(plain, asked, fusion_weights=weights, **options)
    found = generate(compiled, asked, fusion_weights=weights, **options)
    assert not compiled.steps.failed
    for row, same in zip(expected, found, strict=True):
        for text, other in zip(row, same, strict=True):
            assert (other.tokens, other.end_token) == (text.tokens, text.end_token)
            assert other.log_probs == pytest.approx(text.log_probs, abs=1e-4)
    assert len({tuple(text.tokens) for row in expected for text in row}) > 1


@pytest.mark.parametrize("mode", ["fused", "rows"])
def test_one_graph_serves_any_weights_and_texts(joint: Path, mode: str) -> None:
    """Whatever experts are in use: all, one a row, or others a row than before; greedy texts and drawn ones."""
    plain, compiled, counting = pair(joint, mode)
    assert any(getattr(layer, "basis", None) for layer in compiled.fusion.layers)
    decoding = Sampling(temperature=1.0, top_p=0.9, stop=("x",))
    greedy = [Generate(prompt, 6) for prompt in PROMPTS[:4]]
    # The fourth row fills the batch up, and draws nothing from the others' generators.
    drawn = [Generate(prompt, 6, decoding, seed=str(prompt), likeliest=2) for prompt in PROMPTS[:3]]
    for mix, asked in (("diffuse", greedy), ("one_hot", greedy), ("any real number", drawn), ("mixed", greedy)):
        weights = mixes(4, 3)[mix][: len(asked)]
        assert_equal_texts(plain, compiled, asked, weights[:1].expand_as(weights) if mode == "fused" else weights)
    assert counting.graphs == 1
    ids = torch.tensor([[0, 5, 6, 7], [9, 8, 7, 6], [1, 2, 3, 4], [0, 0, 0, 9]])
    given = {"attention_mask": (ids != 0).long(), "fusion_weights": weights[:1].expand_as(weights)}
    for options in ({"max_new_tokens": 5, "do_sample": True}, {"max_length": 9}, {"max_new_tokens": 5, "num_beams": 2}):
        texts = []
        for twin in (plain, compiled):
            torch.manual_seed(0)
            texts.append(twin.generate(ids, **given, **options))
        assert torch.equal(*texts)
    assert counting.graphs == 1
    assert "forward" not in vars(compiled.model)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_experts_without_a_joint_basis_have_graphs_without_breaks(causal_twins: Any, kind: str) -> None:
    """OPT's layers have biases, it computes its positions itself, and its MLP takes flattened tokens."""
    plain, compiled, counting = pair(causal_twins(kind), "rows", backend=eager)
    assert not any(getattr(layer, "basis", None) for layer in compiled.fusion.layers)
    assert_equal_texts(plain, compiled, [Generate(prompt, 4) for prompt in PROMPTS[:4]], mixes(4, 3)["diffuse"])
    assert counting.graphs == 1


@pytest.mark.slow
def test_other_shapes_take_few_graphs_more(causal_twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of other numbers of rows, with longer prompts and caches."""
    monkeypatch.setattr(memory, "LEAST_LENGTH", 8)
    plain, compiled, counting = pair(causal_twins("llama"), "rows", backend=eager)
    weights = mixes(7, 3)["mixed"]
    for prompts, steps, size in ((PROMPTS[:3], 3, 8), (PROMPTS, 20, 8), ([[*range(10, 40)], *PROMPTS[:6]], 10, 2)):
        asked = [Generate(prompt, steps) for prompt in prompts]
        assert_equal_texts(plain, compiled, asked, weights[: len(asked)], batch_size=size)
    assert 2 <= counting.graphs <= 4


def test_what_can_not_be_compiled_runs_step_by_step(causal_twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch finds no compiler: the first step says so, and the texts are the same."""
    plain, compiled, _ = pair(causal_twins("llama"), "rows")

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise BackendCompilerFailed(eager, RuntimeError("no compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda forward, **options: fails)
    compiled.steps = CompiledSteps(compiled.model, compiled.fusion)
    asked, weights = [Generate(prompt, 6) for prompt in PROMPTS[:3]], mixes(3, 3)["diffuse"]
    found = generate(compiled, asked, fusion_weights=weights)
    assert compiled.steps.failed
    assert [one.tokens for (one,) in found] == [one.tokens for (one,) in generate(plain, asked, fusion_weights=weights)]


def test_when_steps_are_compiled(causal_twins: Any) -> None:
    twin: Any = TwinModel.from_pretrained(causal_twins("llama"))
    assert twin.compiling == "off"
    twin.compiling = "auto"
    assert not twin.compiles(10**6)  # on a CPU
    twin.compiling = "on"
    assert twin.compiles(1)
    twin.compiling = "off"
    assert not twin.compiles(10**6)
    config = twin.model.generation_config
    assert runs_step_by_step({"max_new_tokens": 3, "num_beams": 1, "do_sample": None}, config)
    for other in ({"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": 1}):
        assert not runs_step_by_step(other, config)


def test_few_shapes_are_run() -> None:
    counts = [len(filled(tuple(range(rows)), 12)) for rows in (1, 2, 3, 5, 8, 9, 12)]
    assert counts == [1, 2, 4, 8, 8, 12, 12]
    assert filled((7, 8, 9), 4) == (7, 8, 9, 9)
    assert [padded_length(length) for length in (1, 64, 65, 257, 600, 1025)] == [64, 64, 128, 320, 640, 1280]
    every = [padded_length(length) for length in range(1, 4097)]
    assert all(length <= padded < length + max(64, length / 4 + 1) for length, padded in enumerate(every, 1))
    assert len(set(every)) <= 20
