"""What each expert reads of a hidden state: the right singular directions of its exclusive vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from twin_bench.compat import Conv1D
from twin_bench.errors import InputError
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.features import blocks_of, hidden_states
from twin_bench.twin.layers.linear import TwinLinear
from twin_bench.twin.model import TwinModel


def reading_directions(twin: TwinModel, exclusive: Mapping[str, Exclusive], layer: int) -> list[Tensor]:
    """Return each expert's directions, (rank, width) orthonormal rows in float64, the largest singular value first.

    They are the right singular vectors of the exclusive vector's matrices that read the hidden state `layer` first,
    put on top of each other: in most models those of queries, keys and values in the block above.

    Args:
        twin: The twin.
        exclusive: The exclusive vectors of its experts.
        layer: 0 to the number of blocks, less one.

    Raises:
        InputError: An expert's exclusive vector has no factors of these matrices.
    """
    layers = _first_readers(twin, layer)
    found = []
    for task, own in exclusive.items():
        pairs = [
            reader.input_first(*own.factors[f"{name}.weight"])
            for name, reader in layers.items()
            if f"{name}.weight" in own.factors
        ]
        if not pairs:
            raise InputError(
                f"router: kind projection reads low-rank exclusive vectors of the block above layer {layer}; expert "
                f"{task!r} has none there; give another layer, or another kind of router"
            )
        down = torch.cat([pair[0] for pair in pairs], dim=1).double()
        inner = torch.block_diag(*(up.double() @ up.double().T for _, up in pairs))
        Q, R = torch.linalg.qr(down)
        values, vectors = torch.linalg.eigh(R @ inner @ R.T)
        real = values > values.amax().clamp(min=1e-30) * 1e-10
        found.append((Q @ vectors[:, real]).flip(1).T)
    return found


def _first_readers(twin: TwinModel, layer: int) -> dict[str, TwinLinear]:
    """Return the twin's layers, by name, that read the input of the first matrix that block `layer` runs."""
    block = blocks_of(twin.backbone, twin.backbone.config.num_hidden_layers)[layer]
    names = {module: name for name, module in twin.model.named_modules()}
    inputs: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.append((module, given[0]))

    matrices = [module for module in block.modules() if isinstance(module, nn.Linear | Conv1D | TwinLinear)]
    hooks = [module.register_forward_pre_hook(note) for module in matrices]
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=twin.device)
        with twin.fusion.shared():
            hidden_states(twin.backbone, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [layer + 1])
    finally:
        for hook in hooks:
            hook.remove()
    return {
        names[module]: module for module, read in inputs if isinstance(module, TwinLinear) and _same(read, inputs[0][1])
    }


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.data_ptr() == other.data_ptr()
