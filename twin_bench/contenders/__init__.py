"""Contenders: the models that answer for a method in a leaderboard, and how each kind of method makes them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch

from twin_bench.contenders.context import Contender, Context
from twin_bench.contenders.merged import merged_contenders
from twin_bench.merging.registry import MergeMethod, Method, ServedMethod

__all__ = ["Contender", "Context", "contenders"]


@singledispatch
def contenders(method: Method, context: Context) -> Iterator[Contender]:
    """Yield the models that answer for a method: one for all tasks, or one for each task.

    Raises:
        UnsuitedError: the method cannot run with the suite's kind of models, or lacks an input.
    """
    raise TypeError(f"{type(method).__name__} does not say how its contenders are made")


@contenders.register
def _(method: MergeMethod, context: Context) -> Iterator[Contender]:
    yield from merged_contenders(method, context)


@contenders.register
def _(method: ServedMethod, context: Context) -> Iterator[Contender]:
    yield from method.serve(context, **context.settings)
