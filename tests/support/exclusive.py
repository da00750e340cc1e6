"""What each kind of exclusive vectors keeps of a matrix, written out in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from twin_bench.merging.drawing import draws


def kept_of(options: Mapping[str, Any], task: str, name: str, delta: Tensor, *, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return what a kind with its options keeps of an expert's difference (m, n) from the shared expert."""
    matrix, density = delta.numpy(), options.get("density", 1.0)
    if options["kind"] == "bernoulli":
        return np.where(draws(seed, task, name, delta.shape).numpy() < density, matrix / density, 0)
    order = np.argsort(-np.abs(matrix).ravel(), kind="stable")[: int(density * matrix.size)]
    largest = np.zeros(matrix.size, dtype=bool)
    largest[order] = True
    largest = largest.reshape(matrix.shape) & (matrix != 0)
    if options["kind"] == "magnitude":
        return np.where(largest, matrix, 0)
    return np.where(largest, np.sign(matrix) * np.abs(matrix[largest]).mean(), 0)
