"""The upper bound: every task is answered by its own fine-tuned model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from twin_bench.contenders.context import Contender, Context, static_contender
from twin_bench.contenders.storage import head_bytes, model_bytes
from twin_bench.measured import Meter
from twin_bench.merging.registry import PROTOCOLS, served_method


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
