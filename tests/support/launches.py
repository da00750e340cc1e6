"""Operations that a device would be given one by one, and those that make a caller wait for it."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

VIEWS = frozenset(
    (
        *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select"),
        *("detach", "alias", "split", "split_with_sizes", "unbind", "as_strided", "unfold", "reshape", "lift_fresh"),
        *("_reshape_alias", "empty", "empty_like", "new_empty", "empty_strided", "chunk", "view_as", "expand_as"),
        *("diagonal", "narrow", "unsafe_split", "_conj"),
    )
)
"""Operations that compute nothing."""
READS = frozenset(("_local_scalar_dense", "equal", "nonzero", "unique_dim", "_unique2", "masked_select", "bincount"))
"""Operations whose result the caller reads, or whose result's size depends on values."""


class Launches(TorchDispatchMode):
    """Counts the operations in a block: `launched`, and of those the ones that `read` values."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: collections.Counter[str] = collections.Counter()

    @property
    def launched(self) -> int:
        return sum(count for name, count in self.operations.items() if name not in VIEWS)

    @property
    def read(self) -> int:
        return sum(count for name, count in self.operations.items() if name in READS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def multiplications(run: Callable[[], object]) -> int:
    """Return the multiplications of matrix products that `run` makes, those that are added in place as well."""

    def added(_: Any, left: tuple[int, ...], right: tuple[int, ...], **rest: Any) -> int:
        return 2 * math.prod(left) * right[-1]

    in_place = {torch.ops.aten.addmm_: added, torch.ops.aten.baddbmm_: added}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return counter.get_total_flops() // 2
