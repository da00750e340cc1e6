"""WEMoE (Tang et al., 2024): every MLP block mixes the experts' task vectors for each input; the rest is merged."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from twin_bench.adaptive.learning import Learning, check_learning
from twin_bench.adaptive.unlabelled import (
    Batches,
    adapted_note,
    earlier_learning,
    entropy_loss,
    learning_batches,
    unlabelled_inputs,
)
from twin_bench.adaptive.vectors import part_of, stored_bytes, stored_numbers, whole_task_vector
from twin_bench.checkpoints.sources import load_model
from twin_bench.compat import Conv1D
from twin_bench.contenders import Contender, Context
from twin_bench.contenders.context import size
from twin_bench.contenders.storage import base_bytes, bytes_of, head_bytes
from twin_bench.errors import UnsuitedError
from twin_bench.measured import Meter
from twin_bench.merging.by_name import merge_lazily
from twin_bench.merging.registry import served_method
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.features import blocks_of
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers import install
from twin_bench.twin.parts import Parts


@served_method(
    title="WEMoE",
    paper="arXiv:2402.00433",
    track="test-time",
    needs=("unlabelled test inputs", "seed"),
    sees=("scored rows",),
    check_options=check_learning,
)
def wemoe(
    context: Context,
    *,
    scaling: float = 0.3,
    steps: int = 1000,
    learning_rate: float = 1e-4,
    batch_size: int = 16,
    seed: int = 0,
) -> Iterator[Contender]:
    """theta_0 + sum_t w_t(x) tau_t in the linear layers of an MLP block, task arithmetic with `scaling` elsewhere.

    Each block has its own weights: w(x) is the mean over x's tokens of W_2 relu(W_1 h + b_1) + b_2, where h is the
    block's input. The weights need not be positive or sum to 1. The gates start at `scaling` (b_2; their matrices are
    normal with deviation 0.01). They learn by Adam from the entropy of predictions on *unlabelled test inputs*, with
    one batch of `batch_size` of every task a step. Learning runs in float32.

    The authors' code (FusionBench) averages the gate over the batch while it learns, and over padding tokens always.
    Here every input has its own weights, in learning as in scoring, and padding does not count. An answer therefore
    depends on nothing else in the batch. A regression head has no entropy, so its task adds no loss.
    """
    with Meter(context.device) as meter:
        sources = context.sources
        inputs = unlabelled_inputs(context)
        learning = earlier_learning(context, inputs)
        base = dict(sources.base.items())
        merged = merge_lazily("task_arithmetic", base, sources.experts, scaling=scaling, device=context.device)
        model = load_model(sources, base, "float32")
        mixed = {f"{path}.{kind}" for layers in mlp_layers(model) for path in layers for kind in ("weight", "bias")}
        model.load_state_dict({name: merged[name] for name in base if name not in mixed}, strict=False)
        vectors = {task: whole_task_vector(expert, base, sources.skeleton) for task, expert in sources.experts.items()}
        gates = install_gates(model, vectors, scaling=scaling, seed=seed)
        heads = {task: expert.head() for task, expert in sources.experts.items()}
        twin = TwinClassifier(model, sources.tokenizer, Parts(heads=heads), routing="none").to(context.device)
        batches = learning_batches(
            context, twin, inputs, batch_size=batch_size, seed=seed, steps=steps, after=learning.steps
        )
        learn_gates(twin, gates, batches, steps=steps, learning_rate=learning_rate, learning=learning)
    kept, learned = [part_of(vector, mixed) for vector in vectors.values()], list(gates.parameters())
    numbers = size(base) + sum(map(stored_numbers, kept)) + sum(parameter.numel() for parameter in learned)
    stored = base_bytes(sources) + sum(map(stored_bytes, kept)) + bytes_of(learned) + head_bytes(sources)
    dtype = next(tensor.dtype for tensor in base.values() if tensor.is_floating_point())
    twin = twin.to(getattr(torch, context.dtype) if context.dtype else dtype)
    yield Contender(twin, context.names, meter.taken.after(learning.earlier), numbers, stored, adapted_note(inputs))


class Gate(nn.Module):
    """The gate of one block, a network d -> d -> T."""

    def __init__(self, width: int, experts: int, scaling: float, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(width, width), nn.Linear(width, experts)
        with torch.no_grad():
            for layer, bias in ((self.hidden, 0.0), (self.output, scaling)):
                layer.weight.normal_(std=0.01, generator=generator)
                layer.bias.fill_(bias)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Return each row's weights (batch, T) from hidden states (batch, length, d). Padding (mask 0) is left out."""
        weights: Tensor = self.output(torch.relu(self.hidden(hidden)))
        if mask is None:
            return weights.mean(dim=1)
        kept = mask.to(weights)[..., None]
        return (weights * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


def mlp_layers(model: Any) -> list[list[str]]:
    """Return, for each block, the paths of its linear layers outside attention in the order in which they run."""
    paths = {id(module): path for path, module in model.named_modules()}
    blocks = blocks_of(model.base_model, model.config.num_hidden_layers)
    return [
        [
            f"{paths[id(block)]}.{path}"
            for path, layer in block.named_modules()
            if type(layer) in (nn.Linear, Conv1D) and "attn" not in path and "attention" not in path
        ]
        for block in blocks
    ]


def install_gates(model: Any, vectors: Mapping[str, Exclusive], *, scaling: float, seed: int) -> nn.ModuleList:
    """Let the MLP blocks of `model` mix task vectors. Return the gates that set the weights, one for each block.

    Args:
        model: holds theta_0 in the linear layers of its MLP blocks. It is changed in place and contains the gates then.
        vectors: expert to its whole task vector. Only its part in those layers is used.
        scaling: the initial value of all gates' weights.
        seed: the seed of the gates' initial matrices.

    Raises:
        UnsuitedError: no expert changes a linear layer of an MLP block.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = _Mask()
    model.base_model.register_forward_pre_hook(masks, with_kwargs=True)  # it may also run without its head
    gates = nn.ModuleList()
    for layers in mlp_layers(model):
        names = {f"{path}.{kind}" for path in layers for kind in ("weight", "bias")}
        own = {task: part_of(vector, names) for task, vector in vectors.items()}
        if not any(part.factors or part.vectors for part in own.values()):
            continue
        fusion = install(model, own)
        entry = model.get_submodule(layers[0])
        width = entry.weight.shape[0 if type(entry).__name__.endswith("Conv1D") else 1]
        gate = Gate(width, len(vectors), scaling, generator).to(entry.weight)
        entry.register_forward_pre_hook(_Follow(gate, fusion, masks))
        gates.append(gate)
    if not gates:
        raise UnsuitedError("wemoe mixes the linear layers of MLP blocks, and no expert changes one")
    model.add_module("gates", gates)
    return gates


def learn_gates(
    twin: TwinClassifier,
    gates: nn.ModuleList,
    batches: Iterator[Batches],
    *,
    steps: int,
    learning_rate: float,
    learning: Learning | None = None,
) -> None:
    """Train the gates of `twin` in place: Adam on the sum over tasks of a batch's mean entropy.

    `learning` holds the steps that have been taken, and `batches` yields the batches of the remaining steps. Raises
    InputError if steps is not a whole number from 0, or learning_rate is not above 0.
    """

    def set_gradients() -> None:
        gates.zero_grad()
        for task, inputs in next(batches).items():
            entropy_loss(twin, task, inputs, {}).backward()

    gates.requires_grad_(True)
    (learning or Learning()).descend(
        dict(gates.named_parameters()), set_gradients, method="wemoe", steps=steps, learning_rate=learning_rate
    )
    gates.requires_grad_(False)


class _Mask:
    """Keeps the attention mask of the current batch. Blocks get it in other shapes, or not at all."""

    current: Tensor | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        self.current = given.get("attention_mask")


class _Follow:
    """Sets the weights of a block from the block's input, before the block's first linear layer runs."""

    def __init__(self, gate: nn.Module, fusion: Fusion, mask: _Mask) -> None:
        self.gate, self.fusion, self.mask = gate, fusion, mask

    def __call__(self, layer: nn.Module, args: tuple[Tensor]) -> None:
        self.fusion.follow(self.gate(args[0], self.mask.current))
