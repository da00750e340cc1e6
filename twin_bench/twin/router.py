"""The router: w(x) = softmax(MLP(h(x))), trained to classify training inputs by their task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twin_bench.checkpoints.finite import all_finite
from twin_bench.errors import InputError, shown
from twin_bench.twin.finite import require_finite

BATCH = 1024
"""The largest batch of training rows, as in the authors' code."""

STEPS = 40
"""The number of steps in an epoch that smaller batches preserve.

The paper's 5,500 rows for each of eight tasks make 43 batches of 1,024. With fewer rows the batches are smaller, but
of at least 32 rows, so that an epoch has about as many steps.
"""
LEARNING_RATE = 5e-4
DROPOUT = 0.5


@dataclass(frozen=True)
class RouterConfig:
    """A router's input, and how its logits become weights.

    `layer` is the hidden state that the router reads: 0 for the embeddings, k for the output of block k, -1 for the
    last. `width` is the number of its features. `top_k` keeps only the largest weights and renormalises them; 0 keeps
    all. `temperature` divides the logits.
    """

    experts: tuple[str, ...]
    width: int
    layer: int = -1
    top_k: int = 0
    temperature: float = 1.0


class Router(nn.Module):
    """The paper's MLP with layers of width d, 2d, 2d and T, BatchNorm, LeakyReLU, dropout, and a softmax.

    InputError if a number of the config is out of its range.
    """

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        wide = 2 * config.width
        self.mlp = nn.Sequential(
            *(nn.Linear(config.width, wide), nn.BatchNorm1d(wide), nn.LeakyReLU(), nn.Dropout(DROPOUT)),
            *(nn.Linear(wide, wide), nn.BatchNorm1d(wide), nn.LeakyReLU(), nn.Dropout(DROPOUT)),
            nn.Linear(wide, len(config.experts)),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, T) for features (N, width)."""
        logits: Tensor = self.mlp(features)
        return logits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move to the twin's device, but keep float32 when the twin is cast to half precision."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    @torch.no_grad()
    def weights(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return fusion weights (N, T) in float32 for features (N, width). Each row sums to 1.

        InputError if a weight is not finite, because a feature or a logit is not. It names the row by its number in
        `rows`, by default 0 to N - 1.
        """
        weights = fusion_weights(self(features.to(next(self.parameters()))), self.config)
        if not all_finite(weights):
            read = f"the features that the router reads on layer {self.config.layer}"
            require_finite(features, read, "the model overflows: try float32 or bfloat16, or check its weights", rows)
            require_finite(weights, "the router's weights", "its logits overflow: build the twin again", rows)
        return weights


def _check(config: RouterConfig) -> None:
    """Raise an InputError that names a number of a router's config, which comes from a file, and what it must be."""
    experts, temperature = len(config.experts), config.temperature
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or not 0 < temperature < math.inf:
        raise InputError(f"router: temperature must be above 0, not {shown(temperature)}")
    for name, low, high in (("width", 1, math.inf), ("layer", -1, math.inf), ("top_k", 0, experts)):
        value = getattr(config, name)
        if type(value) is not int or not low <= value <= high:
            upper = f"to {experts}" if name == "top_k" else "or more"
            raise InputError(f"router: {name} must be a whole number, {low} {upper}, not {shown(value)}")


def fusion_weights(logits: Tensor, config: RouterConfig) -> Tensor:
    """Return softmax(logits / temperature), (N, T). Weights beyond the `top_k` largest are set to 0."""
    weights = torch.softmax(logits.float() / config.temperature, dim=-1)
    if config.top_k:
        kept = torch.zeros_like(weights).scatter_(1, weights.topk(config.top_k).indices, 1.0)
        weights = weights * kept
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights


@dataclass(frozen=True)
class Trained:
    """A trained router with its accuracy on the selection rows, overall and for each task.

    `epoch` is the epoch that was selected. `rows` and `selection_rows` are counts.
    """

    router: Router
    epoch: int
    accuracy: float
    task_accuracy: dict[str, float]
    rows: int
    selection_rows: int


def train_router(
    config: RouterConfig,
    features: Tensor,
    tasks: Tensor,
    selection_features: Tensor,
    selection_tasks: Tensor,
    *,
    epochs: int = 50,
    seed: int = 0,
) -> Trained:
    """Train a router and return its state after the epoch with the best accuracy on the selection rows.

    Of epochs with equal accuracy, the one with the lowest loss on the selection rows is taken.

    Args:
        config: The router's config.
        features: (N, width) features of the training rows.
        tasks: (N,) indices of the rows' experts.
        selection_features: (M, width) features of the selection rows. They are held-out training rows, or, as in the
            authors' code, the test rows.
        selection_tasks: (M,) indices of the rows' experts.
        epochs: The number of passes over the training rows.
        seed: The seed of initialisation, order and dropout. The global random state is not changed.

    Raises:
        InputError: There are fewer than two training rows, or the loss is not finite after any epoch.
    """
    if len(features) < 2:
        raise InputError(f"router: {len(features)} training rows are too few to train on")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = Router(config)
        optimizer = torch.optim.Adam(router.parameters(), lr=LEARNING_RATE)
        best: tuple[float, float] | None = None
        chosen, state = 0, router.state_dict()
        for epoch in range(1, epochs + 1):
            router.train()
            for rows in _batches(torch.randperm(len(features))):
                loss = F.cross_entropy(router(features[rows]), tasks[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            router.eval()
            with torch.no_grad():
                logits = router(selection_features)
                accuracy = (logits.argmax(dim=1) == selection_tasks).float().mean().item()
                quality = (accuracy, -F.cross_entropy(logits, selection_tasks).item())
            if best is None or quality > best:
                best, chosen = quality, epoch
                state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
        router.load_state_dict(state)
    router.requires_grad_(False)
    predicted = router(selection_features).argmax(dim=1)
    by_task = {
        task: (predicted[selection_tasks == index] == index).float().mean().item()
        for index, task in enumerate(config.experts)
    }
    if best is None or not math.isfinite(best[1]):
        raise InputError("router: the loss on the selection rows is not finite; check the training rows and the model")
    return Trained(router, chosen, best[0], by_task, len(features), len(selection_features))


def _batches(order: Tensor) -> Sequence[Tensor]:
    """Split an order of rows into batches. A last batch of one row is joined to its neighbour: BatchNorm needs two."""
    size = min(BATCH, max(32, len(order) // STEPS))
    chunks = list(order.split(size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    return chunks
