"""The steps of a generation: each layer starts few operations, and adds what the dense sum adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.launches import Launches
from tests.support.random_twins import random_twin
from twin_bench.checkpoints.factors import Factors
from twin_bench.compat import Conv1D
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers import TwinConv1D, TwinLinear
from twin_bench.twin.layers.steps import by_step

IN, OUT, EXPERTS, RANK, ROWS = 96, 64, 4, 3, 5
GENERATOR = torch.Generator().manual_seed(0)
ALL = torch.softmax(torch.randn(ROWS, EXPERTS, generator=GENERATOR), dim=1)
TWO = ALL * torch.tensor([1.0, 0.0, 1.0, 0.0])


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR) / shape[-1] ** 0.5


def made(kind: type[nn.Module], dtype: torch.dtype) -> tuple[Any, Fusion]:
    """Return a layer with random experts, which change its bias as well, and its fusion."""
    layer = (nn.Linear(IN, OUT) if kind is nn.Linear else Conv1D(OUT, IN)).to(dtype)
    m, n = layer.weight.shape
    fusion = Fusion(EXPERTS, dtype)
    exclusive = {
        f"e{k}": Exclusive({"x.weight": Factors(drawn(m, RANK), drawn(RANK, n))}, {"x.bias": drawn(OUT)})
        for k in range(EXPERTS)
    }
    return (TwinLinear if kind is nn.Linear else TwinConv1D)(layer, fusion, "x", exclusive), fusion


def dense(twin: Any, weights: Tensor, x: Tensor) -> Tensor:
    """Return the output in float64, of the factors as the layer stores them."""
    B, A = (part.double() for part in twin.factors())
    whole = twin.weight.double() + torch.einsum("mr,br,rn->bmn", B, weights.double()[:, twin.owner], A)
    whole = whole if isinstance(twin, TwinConv1D) else whole.mT
    bias = twin.bias.double() + weights.double() @ twin.bias_vectors.double()
    return torch.bmm(x.double(), whole) + bias[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("weights", [ALL, TWO])
@torch.no_grad()
def test_a_step_adds_what_the_dense_sum_adds(kind: type[nn.Module], dtype: torch.dtype, weights: Tensor) -> None:
    """After the prompts, step by step. The last step has other inputs."""
    twin, fusion = made(kind, dtype)
    bound = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3}[dtype]
    with fusion.per_row(weights.to(torch.promote_types(dtype, torch.float32)), steps=True):
        for tokens in (7, 1, 1):
            x = torch.randn(ROWS, tokens, IN, generator=GENERATOR).to(dtype)
            found, expected = twin(x), dense(twin, weights.to(dtype), x)
            assert found.dtype == dtype
            assert (found.double() - expected).norm() <= bound * expected.norm()
        assert by_step(twin, x) is not None
    with fusion.per_row(weights):
        assert by_step(twin, x) is None


@torch.no_grad()
def test_a_step_starts_few_operations() -> None:
    """The plain layer's product, and of the exclusive vectors two products, a scaling, and each row's bias."""
    twin, fusion = made(nn.Linear, torch.bfloat16)
    x = torch.randn(ROWS, 1, IN, generator=GENERATOR).bfloat16()
    with fusion.per_row(ALL, steps=True):
        twin(x)
        with Launches() as step:
            twin(x)
    assert step.launched == 5
    assert sum(step.operations.values()) <= 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_those_of_steps_without_a_cache(dtype: torch.dtype) -> None:
    """Each row with weights of its own; a forward without steps runs all tokens again."""
    twin = random_twin("llama", dtype)
    ids = torch.tensor([[*range(5 + row, 17 + row)] for row in range(ROWS)])
    out = twin.generate(ids, fusion_weights=ALL, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
    whole = twin(out.sequences, fusion_weights=ALL).logits[:, -6:-1].float()
    steps_ = torch.stack(out.logits, dim=1).float()
    assert (whole - steps_).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * whole.norm()
