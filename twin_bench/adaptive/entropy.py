"""The entropy of a classifier's predictions on unlabelled inputs: what test-time methods minimise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from twin_bench.adaptive.adamerging import Gradient, entropy
from twin_bench.data.task import TaskInput
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.heads import heads_in_use
from twin_bench.twin.model import Encoded

Batches = Mapping[str, Mapping[str, Tensor]]


def unlabelled_batches(
    twin: TwinClassifier, rows: Sequence[TaskInput], *, batch_size: int, seed: int, max_length: int | None = None
) -> Iterator[Batches]:
    """Return, without end, one batch after another of inputs of every task that has labels to be unsure of.

    A task's rows are taken in an order drawn by the seed, and drawn again when they are used up: a batch does not
    go round the end, so a task of fewer rows has smaller batches.

    Raises InputError for a batch size below 1, UnsuitedError where all tasks are regressions or one has no rows.
    """
    if batch_size < 1 or batch_size != int(batch_size):
        raise InputError(f"batch_size must be a whole number from 1, not {batch_size}")
    classes = [task for task, labels in twin.num_labels.items() if labels > 1]
    if not classes:
        raise UnsuitedError("all tasks are regressions, whose predictions have no entropy to minimise")
    texts = {task: [(row.text, row.text_pair) for row in rows if row.task == task] for task in classes}
    for task, own in texts.items():
        if not own:
            raise UnsuitedError(f"there are no test inputs of {task}")
    encoded = {task: twin.encode(own, max_length=max_length) for task, own in texts.items()}
    orders = {
        task: _orders(len(own), int(batch_size), torch.Generator().manual_seed(seed)) for task, own in encoded.items()
    }
    return _batches(twin, encoded, orders)


def entropy_gradient(twin: TwinClassifier, batches: Iterator[Batches]) -> Gradient:
    """Return the function from parameters of `twin` to the gradient of the next batches' loss at them.

    The loss is the sum over tasks of the mean entropy over a batch; the other parameters stay the twin's.
    """

    def gradient(parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        for task, inputs in next(batches).items():
            entropy_loss(twin, task, inputs, leaves).backward()
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}

    return gradient


def entropy_loss(
    twin: TwinClassifier, task: str, inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> Tensor:
    """Return the mean entropy of a batch's predictions under a task's head, `parameters` in place of the model's."""
    size = len(inputs["input_ids"])
    with heads_in_use(twin.heads, [task] * size):
        logits = functional_call(twin.model, dict(parameters), (), dict(inputs)).logits
    return entropy(logits).mean()


def _batches(
    twin: TwinClassifier, encoded: Mapping[str, Sequence[Encoded]], orders: Mapping[str, Iterator[list[int]]]
) -> Iterator[Batches]:
    while True:
        yield {task: twin.collate([encoded[task][row] for row in next(order)]) for task, order in orders.items()}


def _orders(rows: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    while True:
        for chunk in torch.randperm(rows, generator=generator).split(size):
            yield chunk.tolist()
