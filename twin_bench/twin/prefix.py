"""Shared prefixes: rows that begin with the same tokens run those tokens once.

Few-shot prompts begin with the same few-shot examples, and the choices of a question begin with the question. Rows
with equal fusion weights can share the keys and values of the tokens that they have in common.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from twin_bench.twin.encoded import packed
from twin_bench.twin.memory import Budget
from twin_bench.twin.plan import Group

WORTHWHILE_TOKENS = 16
"""The length of the shortest prefix that is run separately, because the extra pass costs some tokens' worth too."""


class Sharing(NamedTuple):
    """Rows whose first `length` tokens are equal. Rows that share no prefix have length 0."""

    rows: tuple[int, ...]
    length: int


class Prefix(NamedTuple):
    """The number of tokens that some rows begin with, and the keys and values of those tokens (None for no tokens)."""

    length: int
    cache: DynamicCache | None

    def for_rows(self, rows: int) -> DynamicCache:
        """Return a cache that holds the prefix for each row of a batch, for one forward.

        It copies nothing. A layer joins the prefix and the rows' own tokens while it runs, and keeps nothing of it. So
        the memory holds one layer's keys and values for each row, and not those of all layers.
        """
        shared: Any = copy.copy(self.cache)
        shared.layers = [_for_rows(layer, rows) for layer in shared.layers]
        return shared

    def to_generate(self, padding: Sequence[int]) -> DynamicCache:
        """Return a cache from which `generate` continues rows that are padded on the left.

        A row's padding comes first, before the prefix, as it does in a batch that shares nothing. So the cache of a row
        with n tokens of padding lacks the last n tokens of the prefix, and the model runs these again.

        Args:
            padding: the number of each row's tokens of padding. What the cache holds for them is not to be attended to.
        """
        own: Any = copy.copy(self.cache)
        own.layers = [copy.copy(layer) for layer in own.layers]
        places = (torch.arange(self.length) - torch.tensor(padding)[:, None]).clamp(min=0)
        for layer in own.layers:
            for name in ("keys", "values"):
                shared = getattr(layer, name)
                each = shared.expand(len(padding), *shared.shape[1:])
                if any(padding):
                    each = shared[0][:, places.to(shared.device)].transpose(0, 1)
                setattr(layer, name, each)
        return own


def _for_rows(layer: Any, rows: int) -> Any:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):  # it keeps more than keys and values
        own = copy.deepcopy(layer)
        own.batch_repeat_interleave(rows)
        return own
    shared = copy.copy(layer)
    if layer.keys is not None:  # a router on the embeddings leaves the cache empty
        shared.keys, shared.values = (one.expand(rows, *one.shape[1:]) for one in (layer.keys, layer.values))
        shared.update = functools.partial(_joined, copy.copy(shared))  # itself would be a cycle, freed late
    return shared


def _joined(layer: Any, *states: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the keys and values that `update` returns, and keep the layer's own as they are."""
    kept = layer.keys, layer.values
    joined: tuple[Tensor, Tensor] = type(layer).update(layer, *states, **options)
    layer.keys, layer.values = kept
    return joined


NO_PREFIX = Prefix(0, None)


def shared_prefixes(inputs: Mapping[int, Sequence[int]], limits: Mapping[int, int]) -> list[Sharing]:
    """Divide rows into sets that share a prefix. The rows that share none form one set of length 0, the last.

    The rows are sorted by their tokens, so rows with a long common prefix are neighbours. Each row is compared with the
    set before it. The row is added if the saved tokens, which are the prefix length times the number of rows after the
    first, do not decrease when the prefix is shortened to fit the row.

    Args:
        inputs: each row's tokens.
        limits: the number of each row's tokens that a prefix may contain, at most all.
    """
    sets: list[Sharing] = []
    alone: list[int] = []

    def close(rows: list[int], length: int) -> None:
        if len(rows) > 1:
            sets.append(Sharing(tuple(rows), length))
        else:
            alone.extend(rows)

    rows: list[int] = []
    length = 0
    for row in sorted(inputs, key=lambda row: (packed(inputs[row]), row)):
        if rows:
            common = _common(inputs[rows[0]], inputs[row], min(length, limits[row]))
            if common >= WORTHWHILE_TOKENS and len(rows) * common >= (len(rows) - 1) * length:
                rows.append(row)
                length = common
                continue
        close(rows, length)
        rows, length = [row], limits[row]
    close(rows, length)
    return sets + ([Sharing(tuple(sorted(alone)), 0)] if alone else [])


def shared_in_group(
    group: Group, weights: Tensor, inputs: Sequence[Sequence[int]], limits: Mapping[int, int]
) -> list[Sharing]:
    """Divide the rows of a group as `shared_prefixes` does. Only rows with equal weights can share a prefix.

    Args:
        group: a group of a plan over `weights`.
        weights: (N, K) fusion weights. Keys and values depend on them.
        inputs: the tokens of all N rows.
        limits: the number of each row's tokens that a prefix may contain.
    """
    if group.weights is not None:  # all rows of a fused group have its weights
        return shared_prefixes({row: inputs[row] for row in group.rows}, limits)
    alike: dict[tuple[float, ...], list[int]] = {}
    for row, own in zip(group.rows, weights[list(group.rows)].tolist(), strict=True):
        alike.setdefault(tuple(own), []).append(row)
    found = [one for rows in alike.values() for one in shared_prefixes({row: inputs[row] for row in rows}, limits)]
    return _sharing(found, lambda one: one.length > 0)


def worth_their_batches(found: Sequence[Sharing], batch: float, batch_size: int) -> list[Sharing]:
    """Return the sets whose prefix saves more than their batches cost. The rows of the others share nothing.

    The rows of a set run in batches of their own, and the last of these may have room left. Where a batch generates
    texts, its steps can cost more than a prefix saves.

    Args:
        found: the sets.
        batch: what one more batch costs, in tokens.
        batch_size: the largest number of rows in a batch.
    """

    def worth(one: Sharing) -> bool:
        empty = -len(one.rows) % batch_size / batch_size
        return one.length > 0 and (len(one.rows) - 1) * one.length >= empty * batch

    return _sharing(found, worth)


def _sharing(found: Sequence[Sharing], shares: Callable[[Sharing], bool]) -> list[Sharing]:
    """Return the sets that share a prefix, and behind them one of the others' rows."""
    alone = tuple(sorted(row for one in found if not shares(one) for row in one.rows))
    return [one for one in found if shares(one)] + ([Sharing(alone, 0)] if alone else [])


def affordable(
    found: Iterable[Sharing],
    inputs: Mapping[int, Sequence[int]] | Sequence[Sequence[int]],
    budget: Budget | None,
    weights: Tensor | None = None,
) -> Iterator[Sharing]:
    """Yield sets of rows that share a prefix, with length 0 where memory does not hold the prefix beside a row.

    Args:
        found: the sets.
        inputs: each row's tokens.
        budget: what fits into memory; None for everything.
        weights: the weights that are fused for the rows, if any are.
    """
    for one in found:
        if one.length and budget is not None:
            longest = max(one.rows, key=lambda row: len(inputs[row]))
            rest, asked = len(inputs[longest]) - one.length, budget.positions(longest)
            one = one if budget.shares(one.length, rest, asked, fused=weights is not None) else one._replace(length=0)
        yield one


def first_of(shared: Sharing, budget: Budget | None, weights: Tensor | None = None) -> Group:
    """Return the batch of one row that runs the prefix of a set. The arguments are those of `affordable`."""
    needless = weights is None or (budget is not None and budget.use.shared)
    crowded = budget is not None and needless and budget.before().crowded(1, shared.length, 0)
    return Group(shared.rows[:1], weights, crowded)


def _common(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    """Return the number of tokens that two rows have in common at their beginning, `limit` at most."""
    begin, other = first[:limit], second[:limit]
    if begin == other:  # most rows of a set: much faster than token by token
        return limit
    return sum(1 for _ in itertools.takewhile(bool, map(operator.eq, begin, other)))
