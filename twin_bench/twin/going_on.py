"""Going on from the routing pass: blocks that no expert changes are not run a second time.

The router reads a hidden state of the shared expert. If no expert changes anything below that state, it is the fused
model's own state as well, whatever the fusion weights. The scoring pass then goes on from it: its blocks below are not
run. `exclusive: {from_layer: k}` builds such a twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twin_bench.twin.encoded import Encoded, identity
from twin_bench.twin.features import blocks_of, hidden_states
from twin_bench.twin.layers import TiedEmbedding, TwinLayer
from twin_bench.twin.placement import input_device

KEPT_BYTES = 2**30
"""The largest size of the hidden states that are kept of a list of rows. Rows beyond it are run from the beginning."""


def parameters_below(model: nn.Module, backbone: Any, layer: int) -> frozenset[str]:
    """Return the names of the parameters of `model` that hidden state `layer` of its `backbone` depends on.

    They are those of all modules that run before block `layer`: embeddings, blocks below, biases of relative positions.
    A forward of two tokens finds them. Raises InputError for a layer that the backbone lacks.
    """
    ran: set[int] = set()
    blocks = blocks_of(backbone, backbone.config.num_hidden_layers)

    def run(module: nn.Module, _: Any) -> None:
        if not any(module is block for block in blocks[layer:]):  # its own children don't run
            ran.update(map(id, module._parameters.values()))

    with ExitStack() as stack:
        for module in backbone.modules():
            stack.callback(module.register_forward_pre_hook(run).remove)
        hidden_states(backbone, _two_tokens(backbone), [layer])
    return frozenset(name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in ran)


class Start(NamedTuple):
    """Where a scoring pass can begin: at the latest before block `layer`.

    `outputs` holds for each block how many values it returns beside its hidden states, or None for the states alone.
    """

    layer: int
    outputs: tuple[int | None, ...]


def latest_start(backbone: Any) -> Start:
    """Return where a twin's scoring pass can begin. A forward of two tokens finds out what runs before each block.

    The layer is 0 if an expert changes what runs before block 1, and also if block 0 returns more than hidden states.
    """
    blocks = blocks_of(backbone, backbone.config.num_hidden_layers)
    changed: list[bool] = []
    untouched: list[bool] = []
    outputs: list[int | None] = []

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(len(output) - 1 if isinstance(output, tuple) else None)
        if isinstance(output, tuple) and any(value is not None for value in output[1:]):
            changed.append(True)

    with ExitStack() as stack:
        for module in backbone.modules():
            if isinstance(module, TwinLayer | TiedEmbedding):
                stack.callback(module.register_forward_pre_hook(lambda *_: changed.append(True)).remove)
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(lambda *_: untouched.append(not changed)).remove)
            stack.callback(block.register_forward_hook(returned).remove)
        with torch.no_grad():
            backbone(**_two_tokens(backbone))
    return Start(max((k for k, free in enumerate(untouched) if free), default=0), tuple(outputs))


class Begun(NamedTuple):
    """What the routing pass has computed of a batch: `hidden` (batch, length, width), the input of block `layer`."""

    layer: int
    hidden: Tensor


class States:
    """The hidden states of one layer that a routing pass of this thread has computed, by row."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.last: Tensor | None = None
        self._rows: dict[bytes, Tensor] = {}
        self._left = KEPT_BYTES

    @classmethod
    def current(cls) -> States | None:
        """Return the states that this thread remembers at the moment, if any."""
        return _REMEMBERED.get()

    @contextmanager
    def remembered(self) -> Iterator[Self]:
        """Make these states the current ones of this thread."""
        token = _REMEMBERED.set(self)
        try:
            yield self
        finally:
            _REMEMBERED.reset(token)

    @contextmanager
    def seen(self, backbone: Any) -> Iterator[None]:
        """Remember the state of every forward of `backbone` in this context as `last`, (batch, length, width)."""

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.last = args[0] if args else kwargs["hidden_states"]

        block = blocks_of(backbone, backbone.config.num_hidden_layers)[self.layer]
        handle = block.register_forward_pre_hook(see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def keep(self, rows: Sequence[Encoded]) -> None:
        """Keep `last` of a batch of rows, padded on the right, as far as there is room."""
        if self.last is None or self._left < self.last.nbytes:
            return
        self._left -= self.last.nbytes
        for row, state in zip(rows, self.last, strict=True):
            self._rows[identity(row)] = state[: len(row["input_ids"])]

    def of_batch(self, rows: Tensor) -> Begun | None:
        """Return the states of some rows of the last batch, by their indices, or None if no pass has run."""
        return None if self.last is None else Begun(self.layer, self.last[rows.to(self.last.device)])

    def of(self, rows: Sequence[Encoded]) -> Begun | None:
        """Return the states of a batch of rows, padded with zeros on the right, or None if one is lacking."""
        found = [self._rows.get(identity(row)) for row in rows]
        states = [state for state in found if state is not None]
        if len(states) < len(found):
            return None
        length = max(map(len, states))
        return Begun(self.layer, torch.stack([F.pad(state, (0, 0, 0, length - len(state))) for state in states]))


_REMEMBERED: ContextVar[States | None] = ContextVar("remembered", default=None)


@contextmanager
def going_on(backbone: Any, start: Start, begun: Begun) -> Iterator[None]:
    """Run forwards of `backbone` in this context from what the routing pass has begun. Blocks below are not run."""
    blocks = blocks_of(backbone, backbone.config.num_hidden_layers)
    layer, hidden = begun

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = blocks[layer].register_forward_pre_hook(begin, with_kwargs=True)
    skipped = list(zip(blocks[:layer], start.outputs, strict=False))
    own = [block.__dict__.get("forward") for block, _ in skipped]  # accelerate's, where it moves what a block reads
    for block, further in skipped:
        block.forward = _unchanged(further)
    try:
        yield
    finally:
        handle.remove()
        for (block, _), forward in zip(skipped, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _unchanged(further: int | None) -> Callable[..., Any]:
    """Return a block's forward that returns its input, in the form in which the block returns its output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if further is None else (hidden, *[None] * further)

    return forward


def _two_tokens(backbone: Any) -> dict[str, Tensor]:
    ids = torch.tensor([[0, 1]], device=input_device(backbone))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
