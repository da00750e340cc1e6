"""What truncated SVDs leave out is measured and logged with -v, and nothing of a full checkpoint of low rank."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch

from twin_bench.twin.exclusive import exclusive_vector


def logged(
    caplog: pytest.LogCaptureFixture, deltas: dict[str, torch.Tensor], **options: int
) -> tuple[float, float, str]:
    """Return the error of all matrices, the largest one of a matrix, and that matrix's name."""
    generator = torch.Generator().manual_seed(9)
    shared = {name: torch.randn(delta.shape, generator=generator) for name, delta in deltas.items()}
    expert = {name: shared[name] + delta for name, delta in deltas.items()}
    with caplog.at_level(logging.INFO, logger="twin_bench"):
        exclusive_vector(expert, shared, name="one", **options)
    found = re.search(r"expert one: .* out (\S+) of the norm .* at most (\S+) of a matrix's \((.*)\)", caplog.text)
    assert found is not None
    return float(found[1]), float(found[2]), found[3]


def test_the_error_is_that_of_the_best_approximation(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = {"flat": torch.randn(40, 30, generator=generator), "steep": torch.randn(50, 20, generator=generator)}
    deltas["steep"] *= torch.logspace(0, -3, 20)
    tails = {name: np.square(np.linalg.svd(delta.numpy())[1][5:]).sum() for name, delta in deltas.items()}
    sizes = {name: float(delta.double().square().sum()) for name, delta in deltas.items()}
    share, most, worst = logged(caplog, deltas, rank=5)
    assert share == pytest.approx((sum(tails.values()) / sum(sizes.values())) ** 0.5, rel=0.06)  # two digits are told
    assert most == pytest.approx((tails["flat"] / sizes["flat"]) ** 0.5, rel=0.06)
    assert worst == "flat"


def test_a_full_checkpoint_of_low_rank_loses_rounding_error_alone(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(200, 4, generator=generator) @ torch.randn(4, 150, generator=generator)
    share, most, _ = logged(caplog, {"low": low}, rank=16)
    assert share == most < 1e-6
