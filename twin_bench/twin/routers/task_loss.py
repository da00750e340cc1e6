"""A router trained on what it decides: the loss of the fused model's answers to labelled training rows.

The exclusive vectors, the shared expert and the heads stay as they are. The router's parameters alone are trained.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twin_bench.data.task import TaskInput
from twin_bench.errors import InputError
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.encoded import Encoded
from twin_bench.twin.heads import heads_in_use
from twin_bench.twin.routers.base import Router, fusion_weights

ROWS, CHOOSING_ROWS = 300, 100
"""The largest numbers of an expert's rows that the router is trained on, and that choose the epoch."""
EPOCHS = 3
BATCH = 16
LEARNING_RATE = 1e-4
Answer = int | float


@dataclass(frozen=True)
class Answered:
    """Rows with their features (rows, width) for the router, their tasks, and the answers that are expected.

    An answer is the id of a label, or a number where the task's head has one output. A row has several where rows of
    one text are labelled in several ways. Its loss is their mean.
    """

    encoded: Sequence[Encoded]
    features: Tensor
    tasks: Sequence[str]
    answers: Sequence[Sequence[Answer]]


def require_answers(answers: Mapping[TaskInput, Sequence[Answer]], experts: Sequence[str]) -> None:
    """Raise an InputError for an expert none of whose training rows has a label."""
    having = {row.task for row in answers}
    for name in experts:
        if name not in having:
            raise InputError(
                f"router.objective task_loss: no labelled training row of expert {name!r}; router.data must be a "
                "directory of {task}/train.jsonl in the tasks' own schemas"
            )


def answered(
    twin: TwinClassifier,
    rows: Sequence[TaskInput],
    features: Tensor,
    of: Tensor,
    answers: Mapping[TaskInput, Sequence[Answer]],
    limit: int,
) -> Answered:
    """Return the first `limit` rows of each task that have an answer and are in the mask `of` (rows,)."""
    kept: list[int] = []
    for name in twin.expert_names:
        own = [i for i, row in enumerate(rows) if row.task == name and of[i] and row in answers]
        kept += own[:limit]
    chosen = [rows[i] for i in kept]
    encoded = twin.encode([(row.text, row.text_pair) for row in chosen])
    return Answered(encoded, features[kept], [row.task for row in chosen], [answers[row] for row in chosen])


def losses(twin: TwinClassifier, router: Router, rows: Answered, batch: Sequence[int]) -> Tensor:
    """Return the loss of each row of a batch under the router's own weights, (batch,), with gradients.

    It is the cross-entropy, or for a head of one output the squared error. The rows run one by one where rows with
    weights of their own can't share a batch.
    """
    if not twin.fusion.mixes and len(batch) > 1:
        return torch.cat([losses(twin, router, rows, [row]) for row in batch])
    softmax = dataclasses.replace(router.config, top_k=0)
    weights = fusion_weights(router(rows.features[list(batch)].to(twin.device)), softmax)
    tasks = [rows.tasks[row] for row in batch]
    inputs = twin.collate([rows.encoded[row] for row in batch])
    with twin.fusion.per_row(weights), heads_in_use(twin.heads, tasks, twin.device):
        logits = twin.model(**inputs).logits.float()
    found = []
    for place, (row, task) in enumerate(zip(batch, tasks, strict=True)):
        own, answers = logits[place, : twin.num_labels[task]], torch.tensor(rows.answers[row], device=logits.device)
        if len(own) == 1:
            found.append((own[0] - answers.float()).square().mean())
        else:
            found.append(F.cross_entropy(own.expand(len(answers), -1), answers.long()))
    return torch.stack(found)


def trained_on_task_loss(
    router: Router,
    twin: TwinClassifier,
    rows: Answered,
    choosing: Answered,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    advance: Callable[[int], None] = lambda epochs: None,
) -> Router:
    """Return a router whose parameters were trained on the task loss, from those of `router` on.

    The epoch with the lowest mean loss on `choosing` is taken, which may be none. A task's losses are divided by their
    mean before the training, so that no task outweighs the others. The global random state is not changed.

    Args:
        router: Where the training begins. It is not changed.
        twin: The twin, under the protocol standard.
        rows: The rows that are trained on.
        choosing: Rows that choose the epoch.
        epochs: The number of passes.
        seed: Decides the order of the rows.
        advance: Called after each epoch with the number of all epochs.
    """
    trained = copy.deepcopy(router).to(twin.device).eval().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(trained.parameters(), lr=LEARNING_RATE)
    scale = _mean_losses(twin, trained, rows)
    before = best = _relative(_mean_losses(twin, trained, choosing), scale)
    chosen, state = 0, copy.deepcopy(trained.state_dict())
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(rows.tasks), generator=generator).split(BATCH):
            loss = losses(twin, trained, rows, batch.tolist())
            scales = torch.tensor([scale[rows.tasks[row]] for row in batch.tolist()], device=loss.device)
            optimizer.zero_grad()
            (loss / scales).mean().backward()
            optimizer.step()
        found = _relative(_mean_losses(twin, trained, choosing), scale)
        if found < best:
            best, chosen, state = found, epoch, copy.deepcopy(trained.state_dict())
        advance(epochs)
    trained.load_state_dict(state)
    trained.notes = {**router.notes, "task_loss": {"before": before, "after": best, "epoch": chosen}}
    return trained.cpu().requires_grad_(False)


@torch.no_grad()
def _mean_losses(twin: TwinClassifier, router: Router, rows: Answered) -> dict[str, float]:
    """Return the mean loss of each task."""
    found = [losses(twin, router, rows, batch.tolist()) for batch in torch.arange(len(rows.tasks)).split(BATCH)]
    every = torch.cat(found)
    masks = {task: torch.tensor([other == task for other in rows.tasks]) for task in dict.fromkeys(rows.tasks)}
    return {task: max(every[mask.to(every.device)].mean().item(), 1e-6) for task, mask in masks.items()}


def _relative(found: Mapping[str, float], scale: Mapping[str, float]) -> float:
    return sum(loss / scale[task] for task, loss in found.items()) / len(found)
