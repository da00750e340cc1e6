"""The choice of what a router reads: a closed-form probe of each layer, with the cost of the layer in view."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from twin_bench.twin.features import POOLINGS, Read
from twin_bench.twin.routers.base import Examples

PROBE_ROWS = 1000
"""The largest number of an expert's rows on which a probe is fitted."""
RIDGE = 1e-2
"""The penalty of the probe, as a part of the features' mean variance."""


def ridge_accuracy(examples: Examples, experts: int) -> float:
    """Return the accuracy on the held-out rows of ridge regression onto one-hot task ids, in closed form."""
    kept = torch.cat([(examples.owners == expert).nonzero().flatten()[:PROBE_ROWS] for expert in range(experts)])
    features, owners = examples.features[kept], examples.owners[kept]
    mean, deviation = features.mean(dim=0), features.std(dim=0)
    deviation = deviation.where(deviation > 0, 1)
    scaled = ((features - mean) / deviation).double()
    targets = F.one_hot(owners, experts).double()
    targets = targets - targets.mean(dim=0)
    gram = scaled.T @ scaled
    gram.diagonal().add_(RIDGE * len(scaled))
    weights = torch.linalg.solve(gram, scaled.T @ targets)
    logits = ((examples.held_out - mean) / deviation).double() @ weights + F.one_hot(owners, experts).double().mean(0)
    return (logits.argmax(dim=1) == examples.held_out_owners).double().mean().item()


def cheapest(accuracy: Mapping[Read, float], rows: int, depth: int) -> Read:
    """Return the read with the lowest layer, of those within one standard error of the best accuracy.

    Of several poolings of that layer, the most accurate one is returned, and of equal ones the first of `POOLINGS`.

    Args:
        accuracy: The accuracy of each read on the held-out rows.
        rows: How many these are.
        depth: The number of blocks, which is what layer -1 stands for.
    """
    best = max(accuracy.values())
    error = math.sqrt(best * (1 - best) / rows)
    good = [read for read, found in accuracy.items() if found >= best - error]
    return min(good, key=lambda r: (r.layer if r.layer >= 0 else depth, -accuracy[r], POOLINGS.index(r.pooling)))


def as_text(read: Read) -> str:
    """Return a read as a key of plain data: its layer, and its pooling if that is not the mean."""
    return str(read.layer) if read.pooling == "mean" else f"{read.layer} {read.pooling}"
