"""The router's features: pooled hidden states of the shared expert. Blocks that no feature needs are not run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from twin_bench.errors import InputError


@torch.no_grad()
def hidden_states(
    backbone: Any,
    inputs: Mapping[str, Any],
    layers: Sequence[int],
    *,
    overrides: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[Tensor]:
    """Return a backbone's hidden states at each of `layers`, (batch, length, width) each, in the model's dtype.

    Args:
        backbone: a transformers model without a head.
        inputs: the arguments of its forward.
        layers: 0 is the output of the embeddings, k that of block k, and -1 the last one with the final norm, if the
            model has one. Blocks above the highest of `layers` are not run.
        overrides: tensors to use in place of the backbone's parameters of the same names.

    Raises:
        InputError: a layer that the model does not have.
    """
    blocks = blocks_of(backbone, backbone.config.num_hidden_layers)
    if any(not -1 <= layer <= len(blocks) for layer in layers):
        raise InputError(f"router: layer must be -1 to {len(blocks)}, not {sorted(layers)}")
    seen: dict[int, Tensor] = {}
    top = -1 if -1 in layers or len(blocks) in layers else max(layers)
    taps = [
        blocks[layer].register_forward_pre_hook(_tap(seen, layer, stop=layer == top), with_kwargs=True)
        for layer in set(layers)
        if 0 <= layer < len(blocks)
    ]
    try:
        seen[-1] = seen[len(blocks)] = functional_call(backbone, {**overrides}, (), {**inputs}).last_hidden_state
    except _Stop:
        pass
    finally:
        for tap in taps:
            tap.remove()
    return [seen[layer] for layer in layers]


def pool(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return h(x), the mean of hidden states over the tokens that are not padding: (batch, width).

    The result is in float32, or in float64 where the hidden states are. A sum over a long text overflows half
    precision.

    Args:
        hidden: (batch, length, width).
        attention_mask: (batch, length), 0 on padding; None where there is no padding.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if attention_mask is None:
        return hidden.mean(dim=1)
    mask = attention_mask.to(hidden)[..., None]
    return hidden.masked_fill(mask == 0, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class _Stop(Exception):  # noqa: N818 (a signal, not an error)
    """Stops a forward as soon as the last requested hidden state is known."""


def _tap(seen: dict[int, Tensor], layer: int, *, stop: bool) -> Callable[..., None]:
    """Return a forward hook that stores a block's input in `seen[layer]`, and then stops the forward if `stop`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[layer] = args[0] if args else kwargs["hidden_states"]
        if stop:
            raise _Stop

    return hook


def blocks_of(backbone: nn.Module, count: int) -> nn.ModuleList:
    """Return a backbone's list of `count` transformer blocks. Raise an InputError if it has no such list."""
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(backbone).__name__} has no list of {count} blocks to read hidden states from")
