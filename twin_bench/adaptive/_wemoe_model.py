"""WEMoE's blocks: the linear layers of an MLP fused row by row, with weights from the block's own gate."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from twin_bench.adaptive.entropy import Batches, entropy_loss
from twin_bench.adaptive.learning import Learning
from twin_bench.adaptive.wemoe import Gate
from twin_bench.compat import Conv1D
from twin_bench.errors import UnsuitedError
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.features import blocks_of
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers import install


def mlp_layers(model: Any) -> list[list[str]]:
    """Return the paths of the linear layers of each block that are not attention's, in the order they run."""
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
    """Let the MLP blocks of `model` mix task vectors; return the gates that decide how, one a block.

    Args:
        model: holds theta_0 in its MLP blocks' linear layers; changed in place, the gates become part of it.
        vectors: expert to its whole task vector, of which only those layers' part is used.
        scaling: what every gate's weights start at.
        seed: of the gates' initial matrices.

    Raises:
        UnsuitedError: no expert changes a linear layer of an MLP block.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = _Mask()
    model.register_forward_pre_hook(masks, with_kwargs=True)
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

    `learning` are the steps that have been taken, `batches` those of the steps that follow. Raises InputError where
    steps is no whole number from 0, or learning_rate not above 0.
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


def part_of(vector: Exclusive, names: Container[str]) -> Exclusive:
    """Return a task vector's part in the parameters `names`."""
    return Exclusive(
        {name: pair for name, pair in vector.factors.items() if name in names},
        {name: tensor for name, tensor in vector.vectors.items() if name in names},
    )


class _Mask:
    """Keeps the attention mask of the batch that runs, which blocks see in other shapes, or not at all."""

    current: Tensor | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.current = kwargs.get("attention_mask")


class _Follow:
    """Before a block's first linear layer runs, sets the block's weights from what enters it."""

    def __init__(self, gate: nn.Module, fusion: Fusion, mask: _Mask) -> None:
        self.gate, self.fusion, self.mask = gate, fusion, mask

    def __call__(self, layer: nn.Module, args: tuple[Tensor]) -> None:
        self.fusion.follow(self.gate(args[0], self.mask.current))
