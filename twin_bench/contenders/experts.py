"""The upper bound, every task answered by its own fine-tuned model; and one expert that answers every task."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from twin_bench.contenders.context import Contender, Context, static_contender
from twin_bench.contenders.storage import head_bytes, model_bytes
from twin_bench.errors import InputError, nearest
from twin_bench.measured import Meter
from twin_bench.merging.registry import served_method
from twin_bench.protocols import PROTOCOLS


@served_method(title="Individual experts", paper="", track="bound", sees=("task",), protocols=PROTOCOLS)
def experts(context: Context) -> Iterator[Contender]:
    """theta_t for each task t: every task is answered by its own expert, the upper bound.

    T whole models are stored. An expert that is a LoRA adapter counts as the whole model that it makes.
    """
    sources = context.sources
    stored = sum(model_bytes(sources, expert) for expert in sources.experts.values()) + head_bytes(sources)
    for name, expert in sources.experts.items():
        if tasks := context.names_of(name):
            with Meter(context.device) as meter:
                contender = static_contender(expert, tasks, context)
            parameters = len(sources.experts) * contender.parameters
            yield dataclasses.replace(contender, build=meter.taken, parameters=parameters, stored_bytes=stored)


def _known_expert(context: Context, *, expert: str) -> None:
    """Raise an InputError unless an expert has this name."""
    if expert not in context.sources.experts:
        raise InputError(f"one_expert: no expert is named {expert!r}{nearest(expert, context.sources.experts)}")


@served_method(title="One expert", paper="", track="bound", protocols=PROTOCOLS, check_options=_known_expert)
def one_expert(context: Context, *, expert: str = "") -> Iterator[Contender]:
    """theta_e for every task: one expert answers all tasks, a classifier under each task's own head.

    `expert` is its name. --matrix of a leaderboard has a line for each expert.
    """
    sources = context.sources
    with Meter(context.device) as meter:
        contender = static_contender(sources.experts[expert], context.names, context)
    stored = model_bytes(sources, sources.experts[expert]) + head_bytes(sources)
    yield dataclasses.replace(contender, build=meter.taken, stored_bytes=stored)
