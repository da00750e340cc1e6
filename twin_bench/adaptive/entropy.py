"""Learning from the entropy of a merged model's predictions on test inputs: what AdaMerging and AdaRank share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twin_bench.adaptive.learning import Learning
from twin_bench.adaptive.unlabelled import (
    Batches,
    earlier_learning,
    entropy_loss,
    learning_batches,
    unlabelled_inputs,
)
from twin_bench.contenders import Context
from twin_bench.contenders.context import static_contender
from twin_bench.data.task import TaskInput
from twin_bench.merging.device import OnDevice, exact_device
from twin_bench.merging.task_vectors import TaskVectors
from twin_bench.twin.classifier import TwinClassifier

Gradient = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""A function from parameters to the gradient of the loss at these parameters."""


class AtTestTime(NamedTuple):
    """What a merge is learned from: unlabelled inputs, earlier steps, the task vectors, and the loss's gradient.

    Each call of `gradient` draws the next batch.
    """

    inputs: Sequence[TaskInput]
    learning: Learning
    vectors: TaskVectors
    gradient: Gradient


def at_test_time(context: Context, *, batch_size: int, seed: int, steps: int) -> AtTestTime:
    """Return what a context's method learns from, on the context's device and in float32.

    Raises UnsuitedError if the suite compares language models.
    """
    inputs = unlabelled_inputs(context)
    learning = earlier_learning(context, inputs)
    sources, device = context.sources, exact_device(context.device)
    twin = static_contender(sources.base, context.names, context, dtype="float32").twin.to(device)
    assert isinstance(twin, TwinClassifier)
    vectors = TaskVectors(OnDevice(sources.base, device), sources.experts)
    batches = learning_batches(
        context, twin, inputs, batch_size=batch_size, seed=seed, steps=steps, after=learning.steps
    )
    return AtTestTime(inputs, learning, vectors, entropy_gradient(twin, batches))


def entropy_gradient(twin: TwinClassifier, batches: Iterator[Batches]) -> Gradient:
    """Return the function from parameters of `twin` to the gradient of the next batches' loss at them.

    The loss is the sum over tasks of the mean entropy over a batch. All other parameters keep the twin's values.
    """

    def gradient(parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        for task, inputs in next(batches).items():
            entropy_loss(twin, task, inputs, leaves).backward()
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}

    return gradient
