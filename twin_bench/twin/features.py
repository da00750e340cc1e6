"""What the router reads: pooled hidden states of the shared expert, and no more of its blocks than needed."""

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
    model: Any,
    inputs: Mapping[str, Any],
    layers: Sequence[int],
    *,
    overrides: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[Tensor]:
    """Return the backbone's hidden states (batch, length, width) at `layers`.

    0 is the embeddings' output, k that of block k, -1 the last with the final norm, if any. Blocks above the
    highest layer asked for are not run. `overrides` stand in for the backbone's parameters of their names.
    """
    backbone = model.base_model
    blocks = blocks_of(backbone, model.config.num_hidden_layers)
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
    """Return h(x) (batch, width): the mean of hidden states over the tokens that are no padding.

    In float32 at least: a sum over a long text overflows half precision.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if attention_mask is None:
        return hidden.mean(dim=1)
    mask = attention_mask.to(hidden)[..., None]
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class _Stop(Exception):  # noqa: N818 (a signal, not an error)
    """Leaves a forward once the last hidden state that was asked for is there."""


def _tap(seen: dict[int, Tensor], layer: int, *, stop: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[layer] = args[0] if args else kwargs["hidden_states"]
        if stop:
            raise _Stop

    return hook


def blocks_of(backbone: nn.Module, count: int) -> nn.ModuleList:
    """Return a backbone's list of `count` transformer blocks; InputError where it has none."""
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(backbone).__name__} has no list of {count} blocks to read hidden states from")
