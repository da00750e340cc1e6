"""The paper's router: w(x) = softmax(MLP(h(x))), trained to classify training inputs by their task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

from twin_bench.errors import InputError
from twin_bench.twin.routers.base import Examples, Router, RouterConfig
from twin_bench.twin.routers.registry import router_kind

BATCH = 1024
"""The largest batch of training rows, as in the authors' code."""

STEPS = 40
"""The number of steps in an epoch that smaller batches preserve.

The paper's 5,500 rows for each of eight tasks make 43 batches of 1,024. With fewer rows the batches are smaller, but
of at least 32 rows, so that an epoch has about as many steps.
"""
LEARNING_RATE = 5e-4
"""Adam's rate in every step of a training of so many epochs, as in the authors' code."""

SHORT_EPOCHS, SHORT_STEPS = 5, 200
"""The least epochs and steps of a training whose number of epochs nobody gave."""
LONGEST = 50
"""The most epochs of it, and the authors' number."""
SHORT_RATE = 2e-3
"""The largest rate of its steps. The rate rises to it in the first RISE of the steps, and then falls to almost 0."""
RISE = 0.2
FLAT = 1e-3
"""A feature's smallest deviation, in units of the mean deviation: what varies less is not made large."""
RESOLVED = 2**-7
"""A feature's smallest deviation, in units of its mean: bfloat16 rounds a feature by up to half of that."""
DROPOUT = 0.5
CPU = torch.device("cpu")


@router_kind("mlp", title="The paper's MLP", paper="arXiv:2406.15479", needs=("task ids of training inputs", "seed"))
class MlpRouter(Router):
    """softmax(MLP(h(x))): layers of width d, 2d, 2d and T with BatchNorm, LeakyReLU and dropout, on task ids.

    The epoch with the best accuracy on the held-out rows is taken. A recipe's `epochs` are trained at the authors'
    constant rate. Without them the training is a short one: on standardised features, at a rate that rises and falls.
    """

    trains = True

    def __init__(self, config: RouterConfig) -> None:
        super().__init__(config)
        wide = 2 * config.width
        self.mlp = nn.Sequential(
            *(nn.Linear(config.width, wide), nn.BatchNorm1d(wide), nn.LeakyReLU(), nn.Dropout(DROPOUT)),
            *(nn.Linear(wide, wide), nn.BatchNorm1d(wide), nn.LeakyReLU(), nn.Dropout(DROPOUT)),
            nn.Linear(wide, len(config.experts)),
        )

    @classmethod
    def fit(cls, config: RouterConfig, examples: Examples) -> MlpRouter:
        """Train the MLP for `examples.epochs`, or for a short time."""
        rows = (examples.features, examples.owners, examples.held_out, examples.held_out_owners)
        given: Any = {"epochs": examples.epochs, "seed": examples.seed, "advance": examples.advance}
        trained = train_router(config, *rows, **given, device=examples.device)
        trained.router.notes = {"epoch": trained.epoch}
        return trained.router

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, T) for features (N, width)."""
        logits: Tensor = self.mlp(features)
        return logits


@dataclass(frozen=True)
class Trained:
    """A trained router with its accuracy on the selection rows.

    `epoch` is the epoch that was selected. `rows` counts the training rows.
    """

    router: MlpRouter
    epoch: int
    accuracy: float
    rows: int


def train_router(
    config: RouterConfig,
    features: Tensor,
    tasks: Tensor,
    selection_features: Tensor,
    selection_tasks: Tensor,
    *,
    epochs: int | None = None,
    seed: int = 0,
    advance: Callable[[int], None] = lambda epochs: None,
    device: torch.device = CPU,
) -> Trained:
    """Return a trained router as it was after the epoch with the best accuracy, then lowest loss, on selection rows.

    Args:
        config: The router's config.
        features: (N, width) features of the training rows.
        tasks: (N,) indices of the rows' experts.
        selection_features: (M, width) features of held-out training rows or, as in the authors' code, of the test rows.
        selection_tasks: (M,) indices of the rows' experts.
        epochs: The number of passes over the training rows, at the authors' constant rate. None is a short training
            of `short_epochs` passes, on features that are standardised once, at a rate that rises and falls.
        seed: The seed of initialisation, order and dropout. The global random state is not changed.
        advance: Called after each epoch with the number of all epochs.
        device: Where it is trained. The router that is returned is on the CPU.

    Raises:
        InputError: There are fewer than two training rows, or the loss is not finite after any epoch.
    """
    if len(features) < 2:
        raise InputError(f"router: {len(features)} training rows are too few to train on")
    mean, deviation = _standard(features) if epochs is None else (torch.zeros(()), torch.ones(()))
    given = ((features - mean) / deviation, tasks, (selection_features - mean) / deviation, selection_tasks)
    features, tasks, selection_features, selection_tasks = (tensor.to(device) for tensor in given)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        router = MlpRouter(config).to(device)  # first on the CPU: every device begins with the same numbers
        passes = epochs or short_epochs(len(features))
        optimizer, rates = _steps(router, passes * len(_batches(torch.arange(len(features)))), short=epochs is None)
        best: tuple[float, float] | None = None
        chosen, state = 0, router.state_dict()
        for epoch in range(1, passes + 1):
            _pass(router, optimizer, rates, features, tasks)
            quality = _quality(router, selection_features, selection_tasks)
            if best is None or quality > best:
                best, chosen = quality, epoch
                state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
            advance(passes)
        router.load_state_dict(state)
    router.cpu().requires_grad_(False)
    if epochs is None:
        _read_unscaled(router, mean, deviation)
    if best is None or not math.isfinite(best[1]):
        raise InputError("router: the loss on the selection rows is not finite; check the training rows and the model")
    return Trained(router, chosen, best[0], len(features))


def _pass(
    router: MlpRouter, optimizer: torch.optim.Optimizer, rates: LRScheduler, features: Tensor, tasks: Tensor
) -> None:
    """Train a router on each row once, in an order that is drawn."""
    router.train()
    for rows in _batches(torch.randperm(len(features))):
        loss = F.cross_entropy(router(features[rows]), tasks[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()


@torch.no_grad()
def _quality(router: MlpRouter, features: Tensor, tasks: Tensor) -> tuple[float, float]:
    """Return the accuracy and the mean log-likelihood of the rows' experts."""
    router.eval()
    logits = router(features)
    accuracy = (logits.argmax(dim=1) == tasks).float().mean().item()
    return accuracy, -F.cross_entropy(logits, tasks).item()


def short_epochs(rows: int) -> int:
    """Return the number of epochs of a short training on so many rows: few rows make few steps an epoch."""
    return min(LONGEST, max(SHORT_EPOCHS, math.ceil(SHORT_STEPS / len(_batches(torch.arange(rows))))))


def _steps(router: MlpRouter, steps: int, *, short: bool) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Return Adam and the rates of all its steps: constant ones, or in a short training those of one cycle."""
    if not short:
        adam = torch.optim.Adam(router.parameters(), lr=LEARNING_RATE)
        return adam, ConstantLR(adam, factor=1.0)
    adam = torch.optim.Adam(router.parameters(), lr=SHORT_RATE, fused=True)
    return adam, OneCycleLR(adam, SHORT_RATE, total_steps=max(2, steps), pct_start=RISE, cycle_momentum=False)


def _standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return each feature's mean and standard deviation, at least by FLAT and RESOLVED, or 1 if that is still 0."""
    mean, deviation = features.double().mean(dim=0), features.double().std(dim=0)
    deviation = deviation.clamp(min=FLAT * deviation.mean()).maximum(RESOLVED * mean.abs())
    return mean.float(), deviation.where(deviation > 0, 1).float()


def _read_unscaled(router: MlpRouter, mean: Tensor, deviation: Tensor) -> None:
    """Fold the standardisation of the features into the first layer, which then reads the features as they are."""
    first = router.mlp[0]
    assert isinstance(first, nn.Linear)
    folded = first.weight.double() / deviation.double()
    first.bias.copy_(first.bias.double() - folded @ mean.double())
    first.weight.copy_(folded)


def _batches(order: Tensor) -> Sequence[Tensor]:
    """Split an order of rows into batches. A last batch of one row is joined to its neighbour: BatchNorm needs two."""
    size = min(BATCH, max(32, len(order) // STEPS))
    chunks = list(order.split(size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    return chunks
