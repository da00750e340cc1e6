"""The upper bound: every task is answered by its own fine-tuned model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from twin_bench.contenders.context import Contender, Context, static_contender
from twin_bench.merging.registry import PROTOCOLS, served_method


@served_method(title="Individual experts", paper="", track="bound", sees=("task",), protocols=PROTOCOLS)
def experts(context: Context) -> Iterator[Contender]:
    """theta_t for each task t: every task is answered by its own expert, the upper bound."""
    for name, expert in context.sources.experts.items():
        if tasks := context.names_of(name):
            contender = static_contender(expert, tasks, context, started=time.perf_counter())
            yield dataclasses.replace(contender, parameters=len(context.sources.experts) * contender.parameters)
