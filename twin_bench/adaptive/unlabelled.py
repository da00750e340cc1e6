"""The unlabelled test inputs that test-time methods learn from, and the entropy that they minimise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from twin_bench.adaptive.learning import Learning, require_batch_size
from twin_bench.contenders import Context
from twin_bench.data.task import TaskInput
from twin_bench.errors import UnsuitedError
from twin_bench.files import digest
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.encoded import Encoded
from twin_bench.twin.heads import heads_in_use

Batches = Mapping[str, Mapping[str, Tensor]]
"""Task to one batch of its inputs."""


def require_classifiers(context: Context) -> None:
    """Raise UnsuitedError if the suite compares language models."""
    if context.task_type != "sequence_classification":
        raise UnsuitedError(f"{context.name} needs a classifier's entropy; the suite has language models")


def unlabelled_inputs(context: Context) -> list[TaskInput]:
    """Return the inputs that are scored, without their labels and without regressions, which have no entropy.

    Raises UnsuitedError if the suite compares language models.
    """
    require_classifiers(context)
    return [row for rows in context.tasks if not rows.task.is_regression for row in rows.scored_inputs(context.rows)]


def earlier_learning(context: Context, inputs: Sequence[TaskInput]) -> Learning:
    """Return the learning of earlier runs with these settings and inputs."""
    decisive = digest([dict(context.settings), list(context.names), context.max_length, inputs])
    return Learning(context.workspace / f"{context.name}-{decisive[:16]}.safetensors")


def adapted_note(inputs: Sequence[TaskInput]) -> dict[str, Any]:
    """Return the note for a model that has learned from the inputs on which it is scored."""
    return {"adapted_on": {"inputs": "unlabelled test inputs", "rows": dict(Counter(row.task for row in inputs))}}


def learning_batches(
    context: Context,
    twin: TwinClassifier,
    inputs: Sequence[TaskInput],
    *,
    batch_size: int,
    seed: int,
    steps: int,
    after: int,
) -> Iterator[Batches]:
    """Return the batches for learning, one for each of `steps`. Those of the first `after` steps are skipped."""
    batches = unlabelled_batches(twin, inputs, batch_size=batch_size, seed=seed, max_length=context.max_length)
    return islice(context.progress.track(batches, total=steps, description=context.name), after, None)


def unlabelled_batches(
    twin: TwinClassifier, rows: Sequence[TaskInput], *, batch_size: int, seed: int, max_length: int | None = None
) -> Iterator[Batches]:
    """Return endless batches, each with inputs of every classification task.

    The order of a task's rows is drawn by the seed, and drawn again when the rows are used up. A batch ends with its
    order, so a task with few rows has smaller batches.

    Raises:
        InputError: a batch size below 1.
        UnsuitedError: all tasks are regressions, or one has no rows.
    """
    require_batch_size(batch_size)
    classes = [task for task, labels in twin.num_labels.items() if labels > 1]
    if not classes:
        raise UnsuitedError("all tasks are regressions, whose predictions have no entropy to minimise")
    texts = {task: [(row.text, row.text_pair) for row in rows if row.task == task] for task in classes}
    for task, own in texts.items():
        if not own:
            raise UnsuitedError(f"there are no test inputs of {task}")
    encoded = {task: twin.encode(own, max_length=max_length) for task, own in texts.items()}
    orders = {task: _orders(len(own), batch_size, torch.Generator().manual_seed(seed)) for task, own in encoded.items()}
    return _batches(twin, encoded, orders)


def entropy_loss(
    twin: TwinClassifier, task: str, inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> Tensor:
    """Return the mean entropy of a batch's predictions under a task's head.

    `parameters` take the place of the model's own parameters of the same names.
    """
    size = len(inputs["input_ids"])
    with heads_in_use(twin.heads, [task] * size, twin.device):
        logits = functional_call(twin.model, dict(parameters), (), dict(inputs)).logits
    return entropy(logits).mean()


def entropy(logits: Tensor) -> Tensor:
    """Return H(softmax(logits)) in nats over the last dimension.

    A logit of -inf stands for a label that the head lacks and adds nothing.
    """
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


def _batches(
    twin: TwinClassifier, encoded: Mapping[str, Sequence[Encoded]], orders: Mapping[str, Iterator[list[int]]]
) -> Iterator[Batches]:
    while True:
        yield {task: twin.collate([encoded[task][row] for row in next(order)]) for task, order in orders.items()}


def _orders(rows: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    while True:
        for chunk in torch.randperm(rows, generator=generator).split(size):
            yield chunk.tolist()
