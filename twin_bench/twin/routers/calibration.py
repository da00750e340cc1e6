"""What held-out rows say of a router: its accuracy and calibration, its temperature and its threshold."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from twin_bench.twin.routers.base import Router

BINS = 15
"""The number of bins of equal width of the expected calibration error."""
LARGEST_TEMPERATURE = 1e4


def likeliest_temperature(logits: Tensor, owners: Tensor) -> float:
    """Return the temperature from 1e-4 to 1e4 under which rows' owners (N,) are most likely, for logits (N, T).

    The targets are smoothed by 1 / (N + 2), as Platt does: rows that are all right would want a temperature of 0.
    """
    logits, smoothing = logits.double(), 1 / (len(logits) + 2)
    limit = math.log(LARGEST_TEMPERATURE)

    def loss(logarithm: float) -> float:
        return F.cross_entropy(logits / math.exp(logarithm), owners, label_smoothing=smoothing).item()

    found = minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-4})
    return float(f"{math.exp(found.x):.6g}")


def threshold_that_keeps(confidence: Tensor, keep: float) -> float:
    """Return the largest threshold that at least a fraction `keep` of the rows' confidences (N,) reach."""
    ordered = confidence.double().sort(descending=True).values
    return float(ordered[math.ceil(keep * len(ordered) - 1e-9) - 1])


@torch.no_grad()
def report(router: Router, features: Tensor, owners: Tensor) -> dict[str, Any]:
    """Return what a router does to rows, as plain data.

    `accuracy` is of the largest weight, overall and as `task_accuracy`; `top_2` of the two largest. `confusion` counts
    a task's rows by the expert with the largest weight. `calibration_error` is the expected calibration error of the
    largest weight before `top_k`, in BINS bins. With a threshold, `kept` is the fraction of rows over it, overall, and
    `kept_accuracy` the accuracy on them.

    Args:
        router: The router.
        features: (N, width).
        owners: (N,), the indices of the rows' experts.
    """
    experts, logits = router.config.experts, router(features)
    predicted = logits.argmax(dim=1)
    right = predicted == owners
    second = logits.topk(min(2, len(experts)), dim=1).indices
    sure = torch.softmax(logits.double() / router.config.temperature, dim=1).amax(dim=1)
    found: dict[str, Any] = {
        "accuracy": right.float().mean().item(),
        "task_accuracy": {
            task: (predicted[owners == index] == index).float().mean().item() for index, task in enumerate(experts)
        },
        "top_2": (second == owners[:, None]).any(dim=1).float().mean().item(),
        "confusion": {
            task: {other: int((predicted[owners == row] == column).sum()) for column, other in enumerate(experts)}
            for row, task in enumerate(experts)
        },
        "calibration_error": calibration_error(sure.numpy(), right.numpy()),
    }
    if router.config.threshold is not None:
        kept = router.confidence(logits) >= router.config.threshold
        found["kept"] = kept.float().mean().item()
        found["kept_accuracy"] = right[kept].float().mean().item()
    return found


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error: the mean of |accuracy - confidence| over bins, weighted by their rows."""
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    total = 0.0
    for place in np.unique(bins):
        own = bins == place
        total += own.mean() * abs(right[own].mean() - confidence[own].mean())
    return float(total)


@torch.no_grad()
def calibrate(router: Router, features: Tensor, owners: Tensor) -> None:
    """Set a router's temperature by the likelihood of held-out rows' owners (N,), for their features (N, width)."""
    router.config = dataclasses.replace(router.config, temperature=likeliest_temperature(router(features), owners))


@torch.no_grad()
def set_threshold(router: Router, features: Tensor, *, keep: float) -> None:
    """Set a router's threshold so that a fraction `keep` of held-out rows is over it, for their features (N, width)."""
    threshold = threshold_that_keeps(router.confidence(router(features)), keep)
    router.config = dataclasses.replace(router.config, threshold=threshold)
