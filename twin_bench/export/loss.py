"""What a twin's answers change by where something of its exclusive vectors is left out, measured on given rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twin_bench.data.rows import read_router_rows
from twin_bench.data.task import TaskInput
from twin_bench.export.adapters import Refused, lost_of, without
from twin_bench.export.stored import StoredTwin
from twin_bench.twin.directory import load_twin
from twin_bench.twin.model import TwinModel, twin_class
from twin_bench.twin.parts import Parts


class Loss(NamedTuple):
    """How far a model's answers to `rows` rows are from the twin's, in nats (a regression's logit: in its units).

    `largest` and `mean` are of the absolute differences of log-probabilities, over all rows and answers. `changed`
    counts the rows whose most probable answer is another one.
    """

    largest: float
    mean: float
    changed: int
    rows: int

    def __str__(self) -> str:
        return (
            f"log-probabilities differ by {self.largest:.3g} at most and {self.mean:.3g} on average, and "
            f"{self.changed} of {self.rows} most probable answers change"
        )


def measured_loss(twin: StoredTwin, models: Mapping[str, Tensor], refused: Refused, rows: Path) -> dict[str, Loss]:
    """Return for each model what changes where parameters that `refused` names are left out, with 1-D ones.

    The answers are the next token's log-probabilities, or a classifier's. An expert answers the rows of its own task,
    and a mixture all rows. The twin is loaded twice, one after the other.

    Args:
        twin: the twin.
        models: fusion weights (experts,) by name.
        refused: the reason why a matrix is left out, or None.
        rows: a file or a folder of rows, as a router's are.

    Raises:
        InputError: what is wrong with the rows.
    """
    asked = read_router_rows(rows, twin.experts).train
    chosen = {name: [row for row in asked if name not in twin.experts or row.task == name] for name in models}
    whole = _answers(twin, twin.parts, models, chosen)
    left = {name: without(own, lost_of(own, refused)) for name, own in twin.parts.exclusive.items()}
    cut = _answers(twin, dataclasses.replace(twin.parts, exclusive=left), models, chosen)
    return {name: _loss(whole[name], cut[name]) for name in models}


def _answers(
    twin: StoredTwin, parts: Parts, models: Mapping[str, Tensor], rows: Mapping[str, Sequence[TaskInput]]
) -> dict[str, list[Tensor]]:
    """Return each model's log-probabilities of its rows' answers."""
    loaded = load_twin(twin.directory)
    kind: Any = twin_class(loaded.task_type)
    served: TwinModel = kind(loaded.model, loaded.tokenizer, parts, tolerance=0)
    found = {}
    for name, weights in models.items():
        encoded = served.encode([(row.text, row.text_pair) for row in rows[name]])
        logits = served.probe(encoded, [row.task for row in rows[name]], weights.expand(len(encoded), -1))
        found[name] = [one.double().log_softmax(dim=0) if len(one) > 1 else one.double() for one in logits]
    return found


def _loss(whole: Sequence[Tensor], cut: Sequence[Tensor]) -> Loss:
    differences = torch.cat([(a - b).abs() for a, b in zip(whole, cut, strict=True)])
    changed = sum(int(a.argmax() != b.argmax()) for a, b in zip(whole, cut, strict=True))
    return Loss(float(differences.max()), float(differences.mean()), changed, len(whole))
