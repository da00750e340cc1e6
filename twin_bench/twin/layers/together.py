"""Linear layers that read the same input: the products of their exclusive vectors run once for all of them.

The queries, keys and values of an attention are made of one input, and so are the gate and the projection of a
feed-forward layer. Where such layers have the same shapes and ranks, their factors are stored side by side. The first
layer that is called computes what the experts add to each layer's output, and the others take theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers.factored import FactoredLayer
from twin_bench.twin.placement import device_of, is_offloaded

ALONE = ("cpu",)
"""The types of devices on which each layer computes its own products.

A CPU gains little from fewer starts, and is slower at batches of products. Besides, the forward that finds which layers
read one input computes alone, and its last bits would not be those of the next ones.
"""


def apart(x: Tensor) -> bool:
    """Return whether each layer is to compute its own products of x (batch, ..., in).

    A compiled graph keeps nothing from one layer to the next.
    """
    return torch.compiler.is_compiling() or x.device.type in ALONE


class Input(NamedTuple):
    """A tensor that layers have read, and how often it had been written to. That is not known of inference tensors."""

    x: Tensor
    version: int | None

    @classmethod
    def of(cls, x: Tensor) -> Input:
        """Return the input as it is now."""
        return cls(x, None if x.is_inference() else x._version)

    def is_still(self, x: Tensor) -> bool:
        """Return whether x is this tensor, and it has not been written to."""
        return x is self.x and Input.of(x).version == self.version


class TogetherLayer(FactoredLayer):
    """A layer that computes together with others, or `alone`. `called` says whether it was watched when it ran."""

    together: Together
    alone: Together
    called = False


class Together:
    """k linear layers that read the same input and have the same shapes, in the order in which they are called.

    A layer's buffers are parts of the tensors in which those of all k layers lie one after the other.
    """

    def __init__(self, layers: Sequence[FactoredLayer]) -> None:
        self.layers = tuple(layers)
        self._stacked: dict[str, Tensor] = {}

    def added(self, layer: FactoredLayer, x: Tensor) -> Tensor:
        """Return what rows of their own weights add to a layer's output, (tokens, out), for x (batch, ..., in).

        The bias is part of it. The result is the caller's to write to.
        """
        fusion = layer.fusion
        if len(self.layers) == 1:
            return self._products(x)[0]
        of, left = fusion.waiting.get(self, (None, {}))
        if of is None or not of.is_still(x) or layer not in left:
            whole = self._products(x)
            left = {one: whole[place] for place, one in enumerate(self.layers)}
            fusion.waiting[self] = Input.of(x), left
        own = left.pop(layer)
        if not left:
            del fusion.waiting[self]
        return own

    def forget(self) -> None:
        """Lay the layers' buffers together anew next time. They have changed."""
        self._stacked = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the tensors: those of a copied layer are no parts of them."""
        return {"layers": self.layers, "_stacked": {}}

    def _buffer(self, name: str) -> Tensor:
        """Return all layers' buffers of a name, (k, ...)."""
        if len(self.layers) == 1:
            return self.layers[0].get_buffer(name)[None]
        if name not in self._stacked:
            with torch.inference_mode(False):  # what is kept is used outside it as well
                whole = torch.stack([layer.get_buffer(name) for layer in self.layers])
                for place, layer in enumerate(self.layers):
                    layer._buffers[name] = whole[place]
            self._stacked[name] = whole
        return self._stacked[name]

    def _products(self, x: Tensor) -> Tensor:
        """Return what is added to the outputs of all layers, (k, tokens, out)."""
        first, rows = self.layers[0], x.shape[0]
        z, up = self._inner(x)
        k, tokens, out = len(self.layers), z.shape[1], up.shape[2]
        if first.bias is None:
            return _multiplied(z, up)
        bias = first.fusion.kept(self, "bias", self._biases)
        if bias.shape[1] == 1 or tokens == rows:
            return torch.addmm(bias[0], z[0], up[0])[None] if k == 1 else torch.baddbmm(bias, z, up)
        spread = bias[:, :, None].expand(k, rows, tokens // rows, out).reshape(k, tokens, out)
        return spread[0].addmm_(z[0], up[0])[None] if k == 1 else spread.baddbmm_(z, up)

    def _biases(self) -> Tensor:
        """Return the layers' biases, (k, batch, out), or (k, 1, out) if all rows share them."""
        found = [bias for bias in [layer.row_bias(2) for layer in self.layers] if bias is not None]
        whole = found[0][None] if len(found) == 1 else torch.stack(found)
        return whole if whole.ndim == 3 else whole[:, None]

    def _inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (k, tokens, r) and `up` (k, r, out). Their products are the outputs of the exclusive vectors.

        The cheaper of two computations is used: the columns of the experts in use, or the joint bases.
        """
        first, k = self.layers[0], len(self.layers)
        fusion = first.fusion
        scale = fusion.columns(first).scale
        tokens, rows = x.shape[:-1].numel(), x.shape[0]
        if (basis := first.basis) is not None:
            columns = scale.shape[-1] * sum(first.weight.shape) * (1 + basis.down.shape[1] / tokens)
            if first.joint_cost() + basis.cores.numel() * rows / tokens < columns:
                mixed = fusion.kept(self, "mixed", self._mixed)
                z = _multiplied(x.reshape(1, tokens, -1).expand(k, -1, -1), self._buffer("basis_down"))
                z = torch.bmm(z.view(k * rows, -1, mixed.shape[1]), mixed)
                return z.view(k, tokens, -1), self._buffer("basis_up")
        down, up = self.factors()
        z = (x @ down).view(rows, tokens // rows, k, up.shape[1]) * scale[:, None, None]
        return z.view(tokens, k, up.shape[1]).transpose(0, 1), up

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the columns in use: (in, k * r), all layers' side by side, and (k, r, out)."""
        fusion = self.layers[0].fusion
        return fusion.kept(self, "factors", lambda: self._factors(fusion.columns(self.layers[0]).used))

    def _factors(self, used: Tensor | None) -> tuple[Tensor, Tensor]:
        first = self.layers[0]
        if first.basis is None:
            B, A = self._buffer("B"), self._buffer("A")
            down, up = first.input_first(*((B, A) if used is None else (B[..., used], A[:, used])))
        else:
            inner, outer = self._buffer("basis_inner"), self._buffer("basis_outer")
            inner, outer = (inner, outer) if used is None else (inner[..., used], outer[:, used])
            down, up = self._buffer("basis_down") @ inner, outer @ self._buffer("basis_up")
        return down.transpose(0, 1).flatten(1), up

    def _mixed(self) -> Tensor:
        """Return each row's weighted sum of the basis's cores, (k * batch, J, K)."""
        cores = self._buffer("basis_cores")
        mixed = self.layers[0].fusion.cast(cores) @ cores.flatten(2)
        return mixed.view(-1, *cores.shape[2:])


def _multiplied(left: Tensor, right: Tensor) -> Tensor:
    """Return k products, (k, m, n). One alone is no batch: a CPU is slower at batches in half precision."""
    return (left[0] @ right[0])[None] if len(left) == 1 else torch.bmm(left, right)


@contextmanager
def find_together(fusion: Fusion) -> Iterator[None]:
    """Run the block, and put layers together that read the same input in it, one after the other.

    They compute together from their next calls on. Blocks are watched until each layer has been called.
    """
    readers = Readers(fusion)
    with fusion.watched(readers):
        yield
        readers.put_together()
        layers = (layer for layer in fusion.layers if isinstance(layer, TogetherLayer) and any(layer.ranks))
        fusion.together_known = all(layer.called for layer in layers)


class Readers:
    """The layers of a model that have read the last input, as the model calls them."""

    def __init__(self, fusion: Fusion) -> None:
        self._fusion = fusion
        self._input: Input | None = None
        self._layers: list[TogetherLayer] = []

    def __call__(self, layer: TogetherLayer, x: Tensor) -> None:
        """Take note of a call. Where it is that of another input, put those of the one before together."""
        if self._fusion.together_known:
            return
        layer.called = True
        if self._input is None or not self._input.is_still(x):
            self.put_together()
            self._input = Input.of(x)
        self._layers.append(layer)

    def put_together(self) -> None:
        """Put the layers of the last input together that are alike and stand alone."""
        layers, self._layers = [layer for layer in self._layers if layer.together is layer.alone], []
        alike: dict[object, list[TogetherLayer]] = {}
        for layer in layers if len(layers) > 1 else ():
            alike.setdefault(_signature(layer), []).append(layer)
        for found in alike.values():
            if len(set(found)) == len(found) > 1:
                together = Together(found)
                self._fusion.together.append(together)
                for layer in found:
                    layer.together = together


def _signature(layer: FactoredLayer) -> object:
    """Return what is the same of layers that can be put together. An offloaded layer stands alone."""
    sizes = None if layer.basis is None else tuple(part.shape for part in layer.basis)
    bias = layer.bias is None, layer.bias_vectors is None
    where = id(layer) if is_offloaded(layer) else device_of(layer)
    return type(layer), layer.weight.shape, layer.weight.dtype, layer.ranks, sizes, bias, where
