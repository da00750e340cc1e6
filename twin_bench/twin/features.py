"""The router's features: pooled hidden states of the shared expert. Blocks that no feature needs are not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from twin_bench.errors import InputError

Pooling = Literal["mean", "first", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
"""How the hidden states of a text's tokens become one vector: their mean, or that of its first or last token."""


class Read(NamedTuple):
    """What a router reads: a layer (see `hidden_states`), and how its hidden states are pooled."""

    layer: int
    pooling: Pooling = "mean"


def reads_of(layers: Sequence[int | Read]) -> list[Read]:
    """Return what is read on each of `layers`. A layer alone stands for the mean over its tokens."""
    return [layer if isinstance(layer, Read) else Read(layer) for layer in layers]


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


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: Pooling = "mean") -> Tensor:
    """Return h(x), (batch, width): the mean of hidden states over the tokens that are not padding, or one of them.

    The result is in float32, or in float64 where the hidden states are. A sum over a long text overflows half
    precision.

    Args:
        hidden: (batch, length, width).
        attention_mask: (batch, length), 0 on padding, which may be on either side; None where there is no padding.
        pooling: mean, or the first or last token that is not padding.
    """
    if pooling != "mean":
        hidden = _token(hidden, attention_mask, last=pooling == "last")
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if pooling != "mean":
        return hidden
    if attention_mask is None:
        return hidden.mean(dim=1)
    mask = attention_mask.to(hidden)[..., None]
    return hidden.masked_fill(mask == 0, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def pool_after(
    before: Tensor | None, length: int, hidden: Tensor, attention_mask: Tensor, pooling: Pooling = "mean"
) -> Tensor:
    """Return `pool` of texts that begin with the same tokens, (batch, width).

    Args:
        before: (1, length, width), the hidden states of those tokens; None if there are none.
        length: how many they are.
        hidden: (batch, rest, width), the hidden states of the texts' other tokens, at least one each.
        attention_mask: (batch, rest), 0 on padding.
        pooling: as for `pool`.
    """
    if pooling == "last" or (pooling == "first" and before is None):
        return pool(hidden, attention_mask, pooling)
    if pooling == "first":
        assert before is not None
        return pool(before, None, pooling).expand(len(hidden), -1)
    count = attention_mask.to(hidden.device).sum(dim=1, keepdim=True)
    begun = 0.0 if before is None else pool(before, None).to(hidden.device) * length
    return (begun + pool(hidden, attention_mask) * count) / (length + count)


def _token(hidden: Tensor, attention_mask: Tensor | None, *, last: bool) -> Tensor:
    """Return each row's first or last hidden state that is not padding, (batch, width)."""
    if attention_mask is None:
        return hidden[:, -1 if last else 0]
    attention_mask = attention_mask.to(hidden.device)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    real = attention_mask != 0
    place = torch.where(real, places, -1).amax(dim=1) if last else real.int().argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place.clamp(min=0)]


def in_order(
    batches: Iterable[tuple[Sequence[int], list[Tensor]]], progress: Callable[[int], None] | None
) -> list[Tensor]:
    """Return the features of batches as (rows, width) tensors on the CPU, in the order of the rows.

    Each batch is the rows' indices and their features, one tensor for each read. `progress` is called with
    their number.
    """
    order: list[int] = []
    found: list[list[Tensor]] = []
    for rows, features in batches:
        order += rows
        found.append([own.cpu() for own in features])
        if progress:
            progress(len(rows))
    place = torch.argsort(torch.tensor(order))
    return [torch.cat(parts)[place] for parts in zip(*found, strict=True)]


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
