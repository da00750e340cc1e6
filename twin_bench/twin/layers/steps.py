"""The steps of a generation: one token of each row, many times with the same weights.

A step's products are small, and a CPU takes longer to start them than to multiply. So a layer starts few operations
in a step, on what it has laid out before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from twin_bench.twin.layers.runs import by_run
from twin_bench.twin.layers.together import TogetherLayer, apart


class Step(NamedTuple):
    """The factors of the columns in use, (in, r) and (r, out), and each row's weights over them, (batch, r)."""

    down: Tensor
    up: Tensor
    scale: Tensor


def by_step(layer: TogetherLayer, x: Tensor) -> Step | None:
    """Return what a layer multiplies x (batch, 1, in) with in a generation's step on a CPU, else None.

    Rows that use few experts are multiplied run by run, and a joint basis in its own way.
    """
    fusion = layer.fusion
    if not fusion.in_steps or x.shape[:-1].numel() != len(x) or layer.basis is not None:
        return None
    if torch.compiler.is_compiling() or not apart(x):
        return None

    def make() -> Step | None:
        if by_run(layer, x) is not None:
            return None
        down, up = layer.alone.factors()
        return Step(down, up[0], fusion.columns(layer).scale)

    return fusion.kept(layer, "step", make)


def add_step(y: Tensor, x: Tensor, step: Step) -> None:
    """Add the outputs of the rows' exclusive vectors to y (batch, 1, out) in place, for x (batch, 1, in)."""
    z = (x.reshape(len(x), -1) @ step.down).mul_(step.scale)
    y.view(len(y), -1).addmm_(z, step.up)
