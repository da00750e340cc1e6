"""What a GPU is asked to do: few operations, and none that makes the caller wait in a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.support.launches import Launches
from twin_bench.checkpoints.factors import Factors
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers import install

LAYERS, EXPERTS, ROWS = 12, 8, 32
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 40,
}
ALL = torch.softmax(torch.randn(ROWS, EXPERTS, generator=torch.Generator().manual_seed(0)), dim=1)
THREE = torch.cat([ALL[:, :3], torch.zeros(ROWS, EXPERTS - 3)], dim=1)


@pytest.fixture(scope="module", params=["roberta", "llama"])
def twin(request: pytest.FixtureRequest) -> tuple[str, Any, Fusion, Callable[[], Any]]:
    """Return a model of twelve layers in bfloat16 with its fusion and a forward of one step of 32 rows.

    RoBERTa's experts changed all linear layers, norms and biases, and Llama's its linear layers, as LoRA does.
    """
    torch.manual_seed(0)
    if request.param == "roberta":
        model: Any = transformers.RobertaModel(transformers.RobertaConfig(**SHAPE), add_pooling_layer=False)
    else:
        model = transformers.LlamaModel(transformers.LlamaConfig(num_key_value_heads=2, **SHAPE))
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    linear = {f"{name}.weight" for name, layer in model.named_modules() if type(layer) is nn.Linear}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    exclusive = {
        f"expert{number}": Exclusive(
            {name: Factors(0.1 * torch.randn(shapes[name][0], 1), torch.randn(1, shapes[name][1])) for name in linear},
            {name: 0.1 * torch.randn(s) for name, s in shapes.items() if len(s) == 1 and request.param == "roberta"},
        )
        for number in range(EXPERTS)
    }
    fusion = install(model, exclusive)
    inputs = {"input_ids": torch.ones(ROWS, 8, dtype=torch.long)}
    return request.param, model, fusion, lambda: model(**inputs, **({"use_cache": False}))


@torch.no_grad()
def counted(run: Callable[[], Any]) -> Launches:
    with Launches() as launches:
        run()
    return launches


def plain(twin: Any) -> Launches:
    _, _, fusion, run = twin
    with fusion.shared():
        return counted(run)


def test_no_layer_reads_values_that_the_device_has(twin: Any) -> None:
    """Which columns are in use is found once a block, from weights on the CPU: once for each set of ranks."""
    _, _, fusion, run = twin
    expected = plain(twin).read
    for weights in (ALL, THREE):
        with fusion.per_row(weights, steps=True):
            first, second = counted(run), counted(run)
        assert first.read <= expected + 2
        assert second.read == expected
        with fusion.fuse(weights[0]):
            assert counted(run).read == expected


def test_few_operations_are_added(twin: Any) -> None:
    """Llama has seven linear layers a block and RoBERTa six, each with three operations more: down, weighted, up."""
    kind, _, fusion, run = twin
    before, linear = plain(twin).launched, sum(layer.is_matrix for layer in fusion.layers)
    others = len(fusion.layers) - linear
    for weights in (ALL, THREE):
        with fusion.per_row(weights, steps=True):
            first, second = counted(run).launched, counted(run).launched
        # A linear layer with biases a row adds these as well, and a norm scales and moves what it has normalised.
        added = 3 * linear if kind == "llama" else 4 * linear + others
        assert second - before <= added
        assert first - second <= 2 * linear + 20
        with fusion.fuse(weights[0]):
            assert counted(run).launched <= before


@pytest.mark.parametrize("weights", [ALL[0], THREE[0]], ids=["all", "three"])
def test_a_fusion_takes_two_operations_a_matrix(twin: Any, weights: Tensor) -> None:
    """With all experts in use; with three of eight, their columns are gathered as well."""
    _, _, fusion, _ = twin
    matrices = sum(layer.is_matrix for layer in fusion.layers)
    fusion.forget()

    def fuse() -> None:
        with fusion.fuse(weights):
            pass

    counts = counted(fuse)
    assert counts.launched <= (2 if weights.all() else 4) * matrices + 30
    assert counts.launched <= (200 if weights.all() else 360)
    assert counts.read <= 6
