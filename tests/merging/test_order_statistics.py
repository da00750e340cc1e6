"""Order statistics over a whole model against a sort of one flat vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.merges import models
from twin_bench.merging.elections import trim_thresholds
from twin_bench.merging.order_statistics import kth_largest
from twin_bench.merging.task_vectors import TaskVectors


@pytest.mark.parametrize("density", [1e-9, 0.013, 0.5, 0.999])
def test_trim_threshold_is_the_exact_order_statistic(density: float) -> None:
    base, tuned = models(seed=3)
    thresholds = trim_thresholds(TaskVectors(base, tuned), density)
    for threshold, expert in zip(thresholds, tuned.values(), strict=True):
        magnitudes = torch.cat([(expert[name] - base[name]).abs().flatten() for name in base])
        keep = max(1, int(density * magnitudes.numel()))
        assert threshold == magnitudes.topk(keep).values[-1]


def test_kth_largest_is_exact_for_signed_numbers() -> None:
    base, tuned = models(seed=4)
    tuned["task1"]["square"] = base["square"].clone()
    ranks = (1, 2, 300, 700, 785)
    flat = [torch.cat([(expert[name] - base[name]).flatten() for name in base]) for expert in tuned.values()]
    descending = [vector.sort(descending=True).values.numpy() for vector in flat]
    for rank, found in zip(ranks, kth_largest(TaskVectors(base, tuned), *ranks), strict=True):
        np.testing.assert_array_equal(found.numpy(), [entries[rank - 1] for entries in descending])
