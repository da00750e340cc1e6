"""Linear layers: y = W_s x + B (w * (A x)) for each row's weights w, or the fused weight for a whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from twin_bench.compat import Conv1D
from twin_bench.errors import InputError
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers.base import by_row
from twin_bench.twin.layers.runs import add_runs, by_run
from twin_bench.twin.layers.steps import add_step, by_step
from twin_bench.twin.layers.together import Together, TogetherLayer, apart


class TwinLinear(TogetherLayer):
    """nn.Linear with exclusive vectors, weight (out, in)."""

    replaces: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def __init__(self, layer: nn.Module, fusion: Fusion, name: str, exclusive: Mapping[str, Exclusive]) -> None:
        super().__init__(layer, fusion, name, exclusive)
        self.name = name
        self.together = self.alone = Together((self,))

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output without exclusive vectors, (batch, ..., out), for x (batch, ..., in)."""
        return F.linear(x, weight, bias)

    def shared(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output of the shared expert's weight, (batch, ..., out), for x (batch, ..., in)."""
        return self.plain(x, self.weight, bias)

    def onto(self, added: Tensor, x: Tensor) -> Tensor:
        """Return the output of the shared expert's weight, (batch, ..., out), plus `added` (tokens, out).

        `added` is overwritten.
        """
        return added.addmm_(x.reshape(-1, x.shape[-1]), self.weight.T).view(*x.shape[:-1], -1)

    @by_row
    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, ..., out) for x (batch, ..., in).

        Raises:
            InputError: rows have their own weights, and x is not of these rows.
        """
        if self.fusion.mode == "fused":
            return self.plain(x, *self.current())
        if self.fusion.mode == "shared":
            return self.shared(x, self.bias)
        self._require_rows(x)
        factored = sum(self.ranks) > 0
        if factored:
            self.fusion.seen(self, x)
        step = by_step(self, x) if factored else None
        runs = by_run(self, x) if factored and step is None else None
        if factored and runs is None and step is None:
            together = self.alone if apart(x) else self.together
            y = self.onto(together.added(self, x), x)
        else:
            same = self.bias_vectors is None
            y = self.shared(x, self.bias if same else None)
            y = y if same or (bias := self.row_bias(x.ndim)) is None else y.add_(bias)
            if runs is not None:
                add_runs(y, x, self, runs)
            if step is not None:
                add_step(y, x, step)
        if self.entries is not None:
            self.entries.add_products(y, x, self.fusion, lambda x, matrix: self.plain(x, matrix, None))
        return y

    def _require_rows(self, x: Tensor) -> None:
        weights = self.fusion.weights
        assert weights is not None
        if len(x) != len(weights):
            raise InputError(
                f"{self.name}: the model gives this layer {len(x)} rows in a batch of {len(weights)}, as DeBERTa does "
                "with positions that all rows share; they can't have weights of their own: use batch_size=1"
            )


class TwinConv1D(TwinLinear):
    """transformers' Conv1D (GPT-2) with exclusive vectors, weight (in, out): y = x W + b with W = B A."""

    replaces: ClassVar[tuple[type[nn.Module], ...]] = (Conv1D,)

    def input_first(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors in the order in which they multiply an input: (in, R) and (R, out)."""
        return B, A

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output without exclusive vectors, (batch, ..., out), for x (batch, ..., in)."""
        y = x @ weight
        return y if bias is None else y.add_(bias)

    def onto(self, added: Tensor, x: Tensor) -> Tensor:
        """Return the output of the shared expert's weight, (batch, ..., out), plus `added` (tokens, out)."""
        return added.addmm_(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
