"""FREE-Merging's backbone, FR-Merging (Zheng and Wang, 2025): the sum of task vectors without low frequencies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.registry import SCALINGS, merge_method
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="FR-Merging (FREE)", paper="arXiv:2411.16815", track="data-free", tune=SCALINGS)
def free(vectors: TaskVectors, *, scaling: float = 0.3, cutoff: float = 0.1) -> Mapping[str, Tensor]:
    """theta_0 + scaling * sum_t F^-1(H F(tau_t)), F the 2-D Fourier transform of a matrix, H an ideal high-pass filter.

    H is 0 at the frequencies (p, q) with sqrt(p^2 + q^2) < cutoff min(m, n), and 1 at all others. p and q are whole
    periods over the m rows and the n columns. Since the filter is linear, it is applied to the sum. Other tensors are
    added as they are. With cutoff 0 this is task arithmetic.

    This is the paper's filter, as the formula is read here: it names no cutoff and no lambda. A cutoff of 0.1 removes
    3% of the frequencies of a square matrix. The authors' code does not shift the spectrum. It keeps what is within
    ratio min(m, n) of the middle of the array, which is the highest frequency. At the ratio of its script for RoBERTa,
    0.7, it removes 0.02% of the frequencies of a square matrix, and 68% of a matrix of 768 x 3072: all but the highest
    along the long side. It leaves whatever is no matrix pretrained. The paper weights the experts by the mean of their
    task vectors, the code does not.

    FREE-Merging adds a small part of each expert, chosen by a router. That is what a twin does: the combination is a
    twin with `shared: {method: free}`.

    Raises InputError unless 0 <= cutoff < 1.
    """
    if not 0 <= cutoff < 1:
        raise InputError(f"free: cutoff must be in [0, 1), not {cutoff}")

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        total = taus.sum(dim=0)
        if base.ndim == 2 and cutoff and total.any():
            total = high_pass(total, cutoff * min(total.shape))
        return base + scaling * total

    return vectors.merged(merge)


def high_pass(matrix: Tensor, radius: float) -> Tensor:
    """Return an (m, n) matrix without the frequencies of fewer than `radius` periods over its sides."""
    m, n = matrix.shape
    spectrum = torch.fft.rfft2(matrix)
    down, across = (torch.arange(length, device=matrix.device) for length in (m, n // 2 + 1))
    down = torch.minimum(down, m - down)
    spectrum[down[:, None].square() + across.square() < radius**2] = 0
    return torch.fft.irfft2(spectrum, s=(m, n))
