"""How fast a device is: what a launch takes, what memory moves, and how many multiplications a product makes.

A GPU is measured when a twin first plans on it, in a few milliseconds. A CPU is not: its figures are constants, so that
the same rows are grouped in the same way on every CPU, and their answers stay the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

LAUNCHES = 200
"""The number of small kernels whose launches are timed together."""
COPIED = 1 << 26
"""The bytes of a copy that is timed: more than a GPU's cache holds."""
SIDE = 4096
"""The side of the square matrices whose product is timed."""


CPU_RATE = 5e10
"""The multiplications that a CPU makes in a second: two cores, float32. Plans depend on ratios to it alone."""
CPU_BATCH_TOKENS = 32.0
"""The fixed cost of a batch on a CPU, in tokens. It was measured on two cores for a 6-layer, 384-wide encoder."""
CPU_STEP_TOKENS = 16.0
"""The least cost of one step of generation on a CPU, in tokens: every step reads all weights once."""
CPU_REBUILD_TOKENS = 16.0
"""The cost of writing every fused weight once on a CPU, in tokens.

The cost is bound by memory, not by multiplications. It was measured on two cores for a 6-layer, 384-wide encoder.
"""


@dataclass(frozen=True)
class DeviceSpeed:
    """What a device does in a second, and what it takes to start.

    `launch` is the time between the starts of two operations, in seconds, as Python starts them. `bandwidth` is in
    bytes a second, read and written bytes counted both. `rate` is in multiplications (with their additions) a second.
    `plain` and `by_row` are the seconds of the smallest forward of a twin's model: plain, and on the low-rank path.
    """

    launch: float
    bandwidth: float
    rate: float
    plain: float = 0.0
    by_row: float = 0.0


@torch.no_grad()
def measured_speed(device: torch.device, dtype: torch.dtype) -> DeviceSpeed:
    """Measure a device in a few milliseconds, for products of `dtype`. Everything is run once before."""
    small = torch.zeros(16, device=device)
    large = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    other = torch.empty_like(large)
    matrix = torch.randn(SIDE, SIDE, device=device).to(dtype) if device.type != "cpu" else _small(dtype)

    def launches() -> None:
        for _ in range(LAUNCHES):
            small.add_(1)

    def copy() -> None:
        other.copy_(large)

    def product() -> None:
        torch.mm(matrix, matrix)

    side = len(matrix)
    return DeviceSpeed(
        launch=seconds(launches, device) / LAUNCHES,
        bandwidth=2 * COPIED / seconds(copy, device),
        rate=side**3 / seconds(product, device),
    )


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Return the least time of `repeats` runs after one that warms up. The device has finished at both ends."""
    run()
    taken = []
    for _ in range(repeats):
        wait_for(device)
        begun = time.perf_counter()
        run()
        wait_for(device)
        taken.append(time.perf_counter() - begun)
    return min(taken)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was asked to. A CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _small(dtype: torch.dtype) -> torch.Tensor:
    """Return a matrix whose product takes a CPU a few milliseconds."""
    return torch.randn(SIDE // 8, SIDE // 8).to(dtype)
