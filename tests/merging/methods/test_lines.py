"""LiNeS against its formula on a small model of three layers, and on every method that it can scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import twin_bench
from tests.support.merges import EXPERTS, models
from twin_bench import InputError
from twin_bench.errors import UnsuitedError
from twin_bench.leaderboard.suite import Suite
from twin_bench.merging.methods.lines import depth
from twin_bench.merging.recipe import Shared
from twin_bench.merging.registry import find_method

DEPTHS = {
    "bert.embeddings.LayerNorm.weight": 0,
    "bert.encoder.layer.0.attention.self.query.weight": 0,
    "bert.encoder.layer.1.output.dense.bias": 0.5,
    "bert.encoder.layer.2.output.dense.weight": 1,
    "bert.pooler.dense.weight": 1,
}
WRAPPED = sorted(n for n, m in twin_bench.methods().items() if m.track == "data-free" and "merge" not in m.defaults)


def layered(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model whose tensors are those of `models`, named as three layers of an encoder and what is around them."""
    base, tuned = models(dtype)

    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(DEPTHS, tensors.values(), strict=False))

    return rename(base), {task: rename(expert) for task, expert in tuned.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 0.9), (1, -1), (0.0, 1)])
def test_lines_is_its_formula(dtype: torch.dtype, alpha: float, beta: float) -> None:
    base, tuned = layered(dtype)
    merged = twin_bench.merge("lines", base, tuned, alpha=alpha, beta=beta, scaling=0.6)
    for name, relative in DEPTHS.items():
        total = sum(expert[name].double() - base[name].double() for expert in tuned.values())
        expected = base[name].double() + (alpha + beta * relative) * 0.6 * total
        torch.testing.assert_close(merged[name], expected.to(dtype))


def test_alpha_is_the_authors_unless_given() -> None:
    """norm_1(sum tau) / (T norm_1(tau_merged)): for task arithmetic the first layer is the average's."""
    base, tuned = layered(torch.float32)
    average = twin_bench.merge("average", base, tuned)
    for scaling in (0.3, 2.0):
        flat = twin_bench.merge("lines", base, tuned, beta=0.0, scaling=scaling)
        for name in base:
            torch.testing.assert_close(flat[name], average[name])
    ties = twin_bench.merge("ties", base, tuned, density=0.5)
    total = sum(sum(e[n].double() - base[n].double() for e in tuned.values()).abs().sum() for n in base)
    norm = sum((ties[n].double() - base[n].double()).abs().sum() for n in base)
    merged = twin_bench.merge("lines", base, tuned, merge="ties", density=0.5, beta=0.7)
    for name, relative in DEPTHS.items():
        expected = base[name] + (total / (4 * norm) + 0.7 * relative) * (ties[name].double() - base[name])
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WRAPPED)
def test_any_data_free_merge_can_be_scaled(name: str) -> None:
    base, tuned = models(experts=EXPERTS[name])
    plain = twin_bench.merge(name, base, tuned)
    twice = twin_bench.merge("lines", base, tuned, merge=name, alpha=2, beta=0)
    for tensor in base:
        torch.testing.assert_close(twice[tensor], 2 * plain[tensor] - base[tensor], rtol=1e-4, atol=1e-5)


def test_a_merge_is_scaled_before_it_is_rounded() -> None:
    base = {f"h.{layer}.w": torch.ones(2, dtype=torch.bfloat16) for layer in range(2)}
    tuned = {t: {name: torch.full((2,), 1 + 2**-7, dtype=torch.bfloat16) for name in base} for t in "ab"}
    merged = twin_bench.merge("lines", base, tuned, alpha=0.0, beta=8.0, scaling=2**-4)
    assert merged["h.1.w"].tolist() == [1 + 2**-7] * 2  # tau is 2**-10, and 1 + tau would round to 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layer.3.output.dense.weight", 0.3),
        ("model.layers.10.mlp.down_proj.weight", 1.0),
        ("transformer.h.5.attn.c_attn.weight", 0.5),
        ("h.5.attn.c_attn.weight", 0.5),
        ("decoder.block.2.layer.1.EncDecAttention.q.weight", 0.2),
        ("model.layers.4.mlp.experts.9.w1.weight", 0.4),
        ("model.layers.7.self_attn.q_proj.weight.A", 0.7),
        ("model.embed_tokens.weight", 0.0),
        ("transformer.wte.weight", 0.0),
        ("transformer.wpe.weight", 0.0),
        ("shared.weight", 0.0),
        ("transformer.ln_f.weight", 1.0),
        ("model.norm.weight", 1.0),
        ("lm_head.weight", 1.0),
        ("classifier.0.weight", 1.0),
    ],
)
def test_depth_of_names(name: str, expected: float) -> None:
    assert depth(name, 11) == pytest.approx(expected)


def test_options_of_the_merge_are_checked_and_seeded() -> None:
    base, tuned = models()
    with pytest.raises(InputError, match="lines has no option 'densty'; did you mean 'density'"):
        twin_bench.merge("lines", base, tuned, merge="ties", densty=0.5)
    with pytest.raises(InputError, match="lines has no option 'density'"):
        twin_bench.merge("lines", base, tuned, density=0.5)
    with pytest.raises(InputError, match="lines: density must be a number"):
        twin_bench.merge("lines", base, tuned, merge="ties", density="half")
    with pytest.raises(InputError, match="ties: density must be in"):
        twin_bench.merge("lines", base, tuned, merge="ties", density=2)
    with pytest.raises(InputError, match="unknown merge method 'tis'"):
        twin_bench.merge("lines", base, tuned, merge="tis")
    for unfit in ("lines", "twin", "pretrained"):
        with pytest.raises(InputError, match=f"merge must be a data-free method that builds on no other, not {unfit}"):
            twin_bench.merge("lines", base, tuned, merge=unfit)
    for alpha in ("high", True, None):
        with pytest.raises(InputError, match="alpha must be a number or"):
            twin_bench.merge("lines", base, tuned, alpha=alpha)
    header = find_method("lines").given({"merge": "dare_ties"})
    assert header.seeded(7)["seed"] == 7
    assert header.needs == ("seed",)


def test_recipes_and_suites_pass_the_options_on() -> None:
    Shared.model_validate({"method": "lines", "merge": "ties", "density": 0.5})
    with pytest.raises(ValueError, match="no option 'density'"):
        Shared.model_validate({"method": "lines", "density": 0.5})
    item = {"deep_dare": {"method": "lines", "merge": "dare_ties", "density": 0.5}}
    suite = Suite(name="s", base_model="b", experts="e", data="d", methods=[item])
    expected = {"merge": "dare_ties", "density": 0.5, "seed": 9, "alpha": "auto", "beta": 1.0}
    assert suite.entries()[-1].settings(seed=9) == {"scaling": 1.0, "trim": 1.0, **expected}


def test_a_model_without_layers_is_unsuited() -> None:
    base = {"layers.0.weight": torch.zeros(2), "embed.weight": torch.zeros(2)}
    with pytest.raises(UnsuitedError, match="needs two layers"):
        twin_bench.merge("lines", base, {"a": base})
