"""SMILE against a loop over tokens and experts with scipy's SVD, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.support.models import tiny_causal, tiny_classifier
from twin_bench import InputError
from twin_bench.adaptive.smile import install_smile
from twin_bench.merging.task_vectors import TaskVectors

OPTIONS = {"rank": 3, "gate_rank": 2, "top_k": 1}


def naive_token(x: Tensor, layer: nn.Linear, experts: list[nn.Linear], rank: int, gate_rank: int, top_k: int) -> Tensor:
    """Return one token's output (m,): a list of scores, the best of them, and their experts' truncated deltas."""
    W_0, b_0 = layer.weight.double(), layer.bias.double()
    decomposed = []
    for expert in experts:
        U, S, Vh = scipy.linalg.svd((expert.weight.double() - W_0).numpy(), full_matrices=False)
        true_rank = int((S[0] * 1e-6 < S).sum()) if S[0] > 0 else 0
        decomposed.append((torch.tensor(U), torch.tensor(S), torch.tensor(Vh), true_rank))
    scores = [float((Vh[: min(gate_rank, r)] @ x).norm()) for _, _, Vh, r in decomposed]
    best = sorted(range(len(experts)), key=lambda t: -scores[t])[:top_k]
    total = sum(math.exp(scores[t]) for t in best)
    y = W_0 @ x + b_0
    for t in best:
        U, S, Vh, _ = decomposed[t]
        delta = U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]
        y = y + math.exp(scores[t]) / total * (delta @ x + experts[t].bias.double() - b_0)
    return y


def layers(m: int, n: int, kind: str, dtype: torch.dtype) -> tuple[nn.Linear, list[nn.Linear]]:
    """Return a base layer and four experts; of `deficient` ones the second differs by rank 1 and the third in bias."""
    torch.manual_seed(m + n)
    base = nn.Linear(n, m).to(dtype)
    experts = [nn.Linear(n, m).to(dtype) for _ in range(4)]
    if kind == "deficient":
        experts[1].weight = nn.Parameter(base.weight + torch.outer(*(torch.randn(k).to(dtype) for k in (m, n))))
        experts[2].weight = nn.Parameter(base.weight.clone())
    return base.requires_grad_(False), [expert.requires_grad_(False) for expert in experts]


def smile_of(base: nn.Module, experts: list[nn.Module], **options: int) -> tuple[nn.Module, int]:
    model, tuned = nn.ModuleDict({"layer": base}), {str(t): e.state_dict() for t, e in enumerate(experts)}
    named = {task: {f"layer.{name}": p for name, p in parameters.items()} for task, parameters in tuned.items()}
    added = install_smile(model, TaskVectors(dict(model.named_parameters()), named), **options)
    return model["layer"], added


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(("m", "n", "kind"), [(6, 6, "full"), (9, 5, "full"), (4, 11, "full"), (8, 7, "deficient")])
def test_every_token_takes_its_own_experts(m: int, n: int, kind: str, top_k: int, dtype: torch.dtype) -> None:
    base, experts = layers(m, n, kind, dtype)
    options = {**OPTIONS, "top_k": top_k}
    x = torch.randn(3, 5, n).to(dtype)
    expected = torch.stack([naive_token(token.double(), base, experts, **options) for token in x.flatten(0, 1)])
    smile, _ = smile_of(base, experts, **options)
    found = smile(x)
    assert found.dtype is dtype
    exact = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(found.flatten(0, 1).double(), expected, rtol=exact, atol=exact)


def test_conv1d_is_a_linear_layer_turned() -> None:
    base, experts = layers(6, 8, "full", torch.float32)
    x = torch.randn(2, 4, 8)

    def turned(layer: nn.Linear) -> Conv1D:
        conv = Conv1D(6, 8)
        conv.weight, conv.bias = nn.Parameter(layer.weight.T.clone()), nn.Parameter(layer.bias.clone())
        return conv

    conv, _ = smile_of(turned(base), [turned(expert) for expert in experts], **OPTIONS)
    linear, _ = smile_of(base, experts, **OPTIONS)
    torch.testing.assert_close(conv(x), linear(x))


def test_one_expert_at_full_rank_comes_back_and_equal_experts_do() -> None:
    base, experts = layers(7, 5, "full", torch.float32)
    x = torch.randn(4, 5)
    for given in (experts[:1], experts[:1] * 3):
        smile, _ = smile_of(base, given, rank=5, gate_rank=2, top_k=1)
        torch.testing.assert_close(smile(x), experts[0](x), rtol=1e-4, atol=1e-5)


def test_the_order_of_experts_does_not_matter() -> None:
    base, experts = layers(7, 5, "full", torch.float32)
    x = torch.randn(20, 5)
    one, other = smile_of(base, experts, **OPTIONS)[0], smile_of(base, experts[::-1], **OPTIONS)[0]
    torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-6)


def test_unchanged_layers_stay_themselves_and_what_is_added_is_counted() -> None:
    base, experts = layers(7, 5, "full", torch.float32)
    same, added = smile_of(base, [base, base], **OPTIONS)
    assert same is base
    assert added == 0
    _, added = smile_of(base, experts, **OPTIONS)
    assert added == 4 * (3 * (7 + 5) + 2 * 5 + 7)


@pytest.mark.parametrize("make", [lambda **o: tiny_classifier("bert", **o), lambda **o: tiny_causal("llama", **o)])
def test_a_model_of_one_whole_expert_is_that_expert_but_for_embeddings_and_norms(make: Any) -> None:
    base, expert = make(), make(seed=3)
    linear = {path for path, layer in base.named_modules() if isinstance(layer, nn.Linear)}
    others = {name: p for name, p in base.state_dict().items() if name.rpartition(".")[0] not in linear}
    expert.load_state_dict({**expert.state_dict(), **others})
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11]])
    with torch.no_grad():
        expected = expert(input_ids=ids).logits
        vectors = TaskVectors(dict(base.named_parameters()), {"a": dict(expert.named_parameters())})
        install_smile(base, vectors, rank=100, gate_rank=1, top_k=1)
        torch.testing.assert_close(base(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_options_out_of_range() -> None:
    base, experts = layers(4, 4, "full", torch.float32)
    for option, value, message in (
        ("top_k", 5, "top_k must be a whole number from 1 to 4, the number of experts, not 5"),
        ("rank", 0, "rank must be a whole number from 1, not 0"),
        ("gate_rank", 1.5, "gate_rank must be a whole number from 1, not 1.5"),
    ):
        with pytest.raises(InputError, match=message):
            smile_of(base, experts, **{**OPTIONS, option: value})
