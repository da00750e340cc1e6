"""Shared prefixes: which rows begin with the same tokens, so that one pass over those serves them all.

Few-shot prompts begin with the same few-shot examples, and the choices of one question with the same question. Rows
that are fused with the same weights can share the keys and values of what they have in common.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache

from twin_bench.twin.plan import Group

WORTHWHILE_TOKENS = 16
"""The shortest prefix that is run apart: a pass of its own costs some tokens' worth as well."""


class Sharing(NamedTuple):
    """Rows whose first `length` tokens are the same."""

    rows: tuple[int, ...]
    length: int


class Prefix(NamedTuple):
    """The first `length` tokens of some rows, and their keys and values (None of no tokens)."""

    length: int
    cache: DynamicCache | None

    def of(self, rows: int) -> DynamicCache:
        """Return a cache of one's own, for so many rows."""
        copied: Any = copy.deepcopy(self.cache)
        copied.batch_repeat_interleave(rows)
        return copied


def shared_prefixes(inputs: Mapping[int, Sequence[int]], limits: Mapping[int, int]) -> list[Sharing]:
    """Cut rows into sets that share a prefix worth running once; rows that share none are one set, of length 0.

    Rows are taken in the order of their tokens, in which those with a long common prefix are neighbours; a row
    joins a set as long as no token less is shared in all (length x rows besides the first) for the set's prefix
    having become shorter.

    Args:
        inputs: row to its tokens.
        limits: row to the number of its tokens that may belong to a prefix.
    """
    sets: list[Sharing] = []
    for row in sorted(inputs, key=lambda row: (tuple(inputs[row]), row)):
        if sets:
            rows, length = sets[-1]
            common = min(_common(inputs[rows[0]], inputs[row]), length, limits[row])
            if common >= WORTHWHILE_TOKENS and len(rows) * common >= (len(rows) - 1) * length:
                sets[-1] = Sharing((*rows, row), common)
                continue
        sets.append(Sharing((row,), limits[row]))
    alone = tuple(sorted(shared.rows[0] for shared in sets if len(shared.rows) == 1))
    return [shared for shared in sets if len(shared.rows) > 1] + ([Sharing(alone, 0)] if alone else [])


def shared_in_group(
    group: Group, weights: Tensor, inputs: Sequence[Sequence[int]], limits: Mapping[int, int]
) -> list[Sharing]:
    """Return which rows of a group share a prefix: of those with equal weights, whose keys and values agree."""
    alike: dict[tuple[float, ...], list[int]] = {}
    for row in group.rows:
        alike.setdefault(tuple(weights[row].tolist()), []).append(row)
    found = [
        one
        for rows in alike.values()
        for one in shared_prefixes({row: inputs[row] for row in rows}, {row: limits[row] for row in rows})
    ]
    alone = tuple(sorted(row for one in found if not one.length for row in one.rows))
    return [one for one in found if one.length] + ([Sharing(alone, 0)] if alone else [])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(bool, map(operator.eq, first, second)))
