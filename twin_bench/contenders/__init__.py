"""Contenders: the models that answer for a method in a leaderboard, and how each kind of method makes them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch

from twin_bench.contenders.context import Contender, Context
from twin_bench.contenders.merged import merged_contenders
from twin_bench.contenders.storage import base_bytes
from twin_bench.merging.registry import MergeMethod, Method, ServedMethod
from twin_bench.merging.rehearsal import rehearse_merge

__all__ = ["Contender", "Context", "base_bytes", "contenders", "rehearse"]


@singledispatch
def contenders(method: Method, context: Context) -> Iterator[Contender]:
    """Yield the models that answer for a method: one for all tasks, or one for each expert's tasks.

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


@singledispatch
def rehearse(method: Method, context: Context) -> None:
    """Raise an InputError for an option out of its range, in no time: no model is loaded and nothing is merged.

    Raises:
        UnsuitedError: as `contenders`, where it can be known.
    """


@rehearse.register
def _(method: MergeMethod, context: Context) -> None:
    rehearse_merge(method, context.settings, tuple(context.experts))


@rehearse.register
def _(method: ServedMethod, context: Context) -> None:
    if method.check_options is not None:
        method.check_options(context, **context.settings)
