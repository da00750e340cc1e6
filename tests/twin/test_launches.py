"""What a GPU is asked to do: few operations, and none that makes the caller wait in a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.support.launches import Launches
from twin_bench.checkpoints.factors import Factors
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers import Together, find_together, install, together
from twin_bench.twin.plan import Group
from twin_bench.twin.planned import PlannedModel

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


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers compute together on the CPU, as they do on other devices."""
    monkeypatch.setattr(together, "ALONE", ())


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

    def run(rows: int = ROWS) -> Any:
        return model(input_ids=torch.ones(rows, 8, dtype=torch.long), use_cache=False)

    with torch.no_grad(), find_together(fusion), fusion.per_row(ALL):
        run()
    return request.param, model, fusion, run


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
    """Layers that read the same input share three operations: down, weighted, up. The plain product is added to them.

    Of one block these are query, key and value; RoBERTa has three linear layers beside them, and Llama the gate and the
    projection and two more. A bias a row is written once more, and a norm scales and moves what it has normalised.
    """
    kind, _, fusion, run = twin
    before, norms = plain(twin).launched, sum(not layer.is_matrix for layer in fusion.layers)
    for weights in (ALL, THREE):
        with fusion.per_row(weights, steps=True):
            first, second = counted(run).launched, counted(run).launched
        assert second - before <= (4 * 3 if kind == "llama" else 4 * 4) * LAYERS + norms
        assert second <= (1.3 if kind == "llama" else 2.4) * before
        assert first - second <= (150 if kind == "llama" else 140)
        with fusion.fuse(weights[0]):
            assert counted(run).launched <= before


@torch.no_grad()
def test_layers_together_are_what_each_is_alone(twin: Any) -> None:
    """Of another block, of other shapes or of the same block, but of another input: these stay apart."""
    kind, model, fusion, _ = twin
    names = {id(layer): name.rpartition(".")[2] for name, layer in model.named_modules()}
    found = [[names[id(layer)] for layer in one.layers] for one in fusion.together]
    attention = ["query", "key", "value"] if kind == "roberta" else ["q_proj", "k_proj", "v_proj"]
    assert found == [attention, *([["gate_proj", "up_proj"]] if kind == "llama" else [])] * LAYERS
    layers = [layer for one in fusion.together for layer in one.layers]
    apart = copy.deepcopy(model)
    for layer in apart.modules():
        if hasattr(layer, "together"):
            layer.together = Together((layer,))
    alone = next(layer for layer in apart.modules() if hasattr(layer, "together")).fusion
    with fusion.per_row(ALL), alone.per_row(ALL):
        inputs = torch.ones(ROWS, 8, dtype=torch.long)
        expected, states = (one(input_ids=inputs).last_hidden_state.float() for one in (apart, model))
    assert (states - expected).norm() <= 0.02 * expected.norm()
    assert not torch.equal(states[0], states[1])
    for layer in layers:
        assert layer.A.untyped_storage().data_ptr() == layer.together.layers[0].A.untyped_storage().data_ptr()


@torch.no_grad()
def test_an_input_is_not_mistaken_for_another() -> None:
    """The same layers called with other inputs, in another order, twice, alone, and in another block."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(6, 5) for name in "abc"})
    factors = {name: Factors(torch.randn(5, 2), torch.randn(2, 6)) for name in "abc"}
    fusion = install(model, {"e": Exclusive({f"{name}.weight": one for name, one in factors.items()}, {})})
    first, other = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    with find_together(fusion), fusion.per_row(torch.ones(2, 1)):
        for name in "abc":
            model[name](first)
    assert fusion.together_known
    assert [len(one.layers) for one in fusion.together] == [3]

    def right(name: str, x: Tensor, weight: float) -> None:
        dense = model[name].weight + weight * factors[name].B @ factors[name].A
        torch.testing.assert_close(model[name](x), x @ dense.T + model[name].bias, rtol=1e-5, atol=1e-5)

    with fusion.per_row(torch.full((2, 1), 0.5)):
        for name, x in zip("abbcaac", (first, first, other, first, other, other, other), strict=True):
            right(name, x, 0.5)
    with fusion.per_row(torch.full((2, 1), 2.0)):
        right("b", other, 2.0)
        right("c", other, 2.0)
        other.mul_(3.0)
        right("a", other, 2.0)
        model.double()
    factors = {name: Factors(one.B.double(), one.A.double()) for name, one in factors.items()}
    with fusion.per_row(torch.full((2, 1), 2.0)):
        right("c", other.double(), 2.0)
        right("a", other.double(), 2.0)


@torch.no_grad()
def test_layers_together_are_converted_with_the_model() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(6, 5) for name in "ab"})
    factors = {name: Factors(torch.randn(5, 2), torch.randn(2, 6)) for name in "ab"}
    fusion = install(model, {"e": Exclusive({f"{name}.weight": one for name, one in factors.items()}, {})})
    dense = {name: model[name].weight + factors[name].B @ factors[name].A for name in "ab"}
    biases = {name: model[name].bias.clone() for name in "ab"}
    x, weights = torch.randn(2, 3, 6), torch.ones(2, 1)
    with find_together(fusion), fusion.per_row(weights):
        for name in "ab":
            model[name](x)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        inputs = x.to(dtype)
        with fusion.per_row(weights):
            for name in "ab":
                expected = x @ dense[name].T + biases[name]
                found = model[name](inputs)
                assert found.dtype == dtype
                assert (found.float() - expected).norm() <= 0.02 * expected.norm()
    assert {layer.together for layer in model.values()} == set(fusion.together)


@torch.no_grad()
def test_layers_are_put_together_once_by_threads_that_wait_for_each_other() -> None:
    model = nn.ModuleDict({name: nn.Linear(6, 5) for name in "ab"})
    factors = {f"{name}.weight": Factors(torch.randn(5, 2), torch.randn(2, 6)) for name in "ab"}
    fusion = install(model, {"e": Exclusive(factors, {})})
    x = torch.randn(2, 3, 6)

    def run() -> None:
        with torch.no_grad(), find_together(fusion), fusion.per_row(torch.ones(2, 1)):
            for name in "ab":
                model[name](x)

    with ThreadPoolExecutor(3) as threads:
        with fusion.shared():
            waiting = [threads.submit(run) for _ in range(3)]
        for one in waiting:
            one.result()
    assert len(fusion.together) == 1
    assert {layer.together for layer in model.values()} == set(fusion.together)


@torch.no_grad()
def test_layers_of_a_part_that_runs_later_are_found_then() -> None:
    """An encoder's texts are read in one block, and a decoder answers in the next."""
    model = nn.ModuleDict({name: nn.Linear(6, 5) for name in "abcd"})
    factors = {f"{name}.weight": Factors(torch.randn(5, 2), torch.randn(2, 6)) for name in "abcd"}
    fusion = install(model, {"e": Exclusive(factors, {})})
    for part in ("ab", "ab", "cd"):
        x = torch.randn(2, 3, 6)
        with find_together(fusion), fusion.per_row(torch.ones(2, 1)):
            for name in part:
                model[name](x)
    assert [one.layers for one in fusion.together] == [(model["a"], model["b"]), (model["c"], model["d"])]
    assert fusion.together_known


@torch.no_grad()
def test_no_forward_is_run_but_those_that_are_asked_for() -> None:
    """BigBird's attention is another one for good after a short text."""
    shape = {**SHAPE, "num_hidden_layers": 1, "max_position_embeddings": 64}
    config = transformers.BigBirdConfig(attention_type="block_sparse", block_size=4, num_random_blocks=1, **shape)
    model = transformers.BigBirdModel(config, add_pooling_layer=False).eval()
    linear = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and "self" in name]
    factors = {f"{name}.weight": Factors(0.1 * torch.randn(32, 1), torch.randn(1, 32)) for name in linear}
    twin = PlannedModel()
    twin.model, twin.expert_names = model, ("e",)
    twin.fusion = install(model, {"e": Exclusive(factors, {})})
    for _ in range(2):
        with twin.fused(Group((0, 1), None), torch.ones(2, 1)):
            model(input_ids=torch.ones(2, 48, dtype=torch.long))
    assert model.attention_type == "block_sparse"
    assert [len(one.layers) for one in twin.fusion.together] == [3]


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
