"""Linear layers whose weight is quantised: they add the experts' factors to the output alone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from twin_bench.compat import Conv1D
from twin_bench.twin.layers.linear import TwinLinear


class TwinQuantised(TwinLinear):
    """bitsandbytes' Linear4bit or Linear8bitLt with exclusive vectors: y = W_q x + B (w * (A x)).

    The layer itself computes W_q x. There is no fused weight. `weight` has the shape, dtype and device of the weight
    that was quantised, and no values. Factors have the model's dtype.
    """

    fusible: ClassVar[bool] = False
    transposed = False
    like: Tensor

    @classmethod
    def stands_for(cls, layer: nn.Module, parent: nn.Module) -> bool:
        """Return whether `layer` is one of bitsandbytes' linear layers."""
        return isinstance(layer, nn.Linear) and type(layer).__module__.startswith("bitsandbytes.")

    def _take(self, layer: Any) -> None:
        """Take the layer whole, but for its bias, which rows may have of their own."""
        self.transposed = getattr(layer, "source_cls", None) is Conv1D  # transformers turns GPT-2's matrices
        out, into = layer.out_features, layer.in_features
        self._shape = (into, out) if self.transposed else (out, into)
        like = torch.zeros((), dtype=self.fusion.dtype, device=layer.weight.device)
        self.register_buffer("like", like, persistent=False)
        self.register_parameter("bias", layer._parameters.get("bias"))
        layer._parameters["bias"] = None
        self.layer = layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A tensor without values of its own that stands for the weight: (out, in), of GPT-2's layers (in, out)."""
        return self.like.expand(self._shape)

    def input_first(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors in the order in which they multiply an input: (in, R) and (R, out)."""
        return (B, A) if self.transposed else (A.mT, B.mT)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output of a whole matrix, (batch, ..., out), for x (batch, ..., in)."""
        return super().plain(x, weight.T if self.transposed else weight, bias)

    def shared(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the quantised layer's output, (batch, ..., out), for x (batch, ..., in)."""
        y: Tensor = self.layer(x)
        return y if bias is None else y + bias.to(y)

    def onto(self, added: Tensor, x: Tensor) -> Tensor:
        """Return the quantised layer's output, (batch, ..., out), plus `added` (tokens, out)."""
        y: Tensor = self.layer(x)
        return y + added.view(y.shape)
