"""RegMean (Jin et al., 2023): each linear layer's weights from a least-squares regression to all experts' outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.registry import Statistics, merge_method, require_fraction
from twin_bench.merging.statistics import statistics_of
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(
    title="RegMean",
    paper="arXiv:2212.09849",
    track="calibration",
    needs=("training inputs", "seed"),
    statistics="gram",
)
def regmean(vectors: TaskVectors, *, statistics: Statistics, alpha: float = 0.9) -> Mapping[str, Tensor]:
    """(sum_t G_t)^-1 sum_t G_t W_t for the weights W (in, out) of a linear layer; the mean of all other parameters.

    `statistics[t][name]` is G_t (in, in), the Gram matrix X^T X of the inputs X of expert t's layer with weights
    `name`, if they are stored (out, in). For weights stored (in, out), as in GPT-2's Conv1D, it is `statistics[t][name
    + ".T"]`, because a square weight does not show how it is stored. See
    `twin_bench.merging.calibration.gram_matrices`. Off-diagonal entries of G_t are multiplied by `alpha`. With alpha 1
    the result is the joint least-squares solution. Parameters without a Gram matrix (embeddings, norms, biases) are
    averaged.

    There is no one alpha of the authors. Of the eleven configurations in their repository that set it, nine say 0.1;
    those for GLUE do not set it, which is 1. FusionBench has 0.6 for GPT-2. The default is 0.9.

    It is computed as mean tau + (sum_t G_t)^+ sum_t G_t (tau_t - mean tau), which is the same if the sum is regular.
    The sum is singular if features are always 0 or, with alpha 1, if there are fewer inputs than features. The
    pseudo-inverse then leaves the mean in the directions that no input reaches. It is taken with features scaled to
    unit variance, so that a small feature counts like a large one. The authors' code and FusionBench invert the sum
    directly and fail there.

    Raises InputError unless alpha is in (0, 1], and for Gram matrices that are missing for some experts, have another
    shape or are not finite.
    """
    require_fraction("regmean", "alpha", alpha)
    known = {name for task in vectors.experts for name in statistics[task]}

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        mean = taus.mean(dim=0)
        if name in known:
            grams = _grams(vectors, statistics, name, base.shape[-1], alpha, base.device)
            return base + mean + _regressed(name, grams, taus - mean)
        if f"{name}.T" in known:
            grams = _grams(vectors, statistics, f"{name}.T", base.shape[0], alpha, base.device)
            return base + mean + _regressed(name, grams, (taus - mean).mT).T
        return base + mean

    return vectors.merged(merge)


def _grams(
    vectors: TaskVectors, statistics: Statistics, name: str, width: int, alpha: float, device: torch.device
) -> Tensor:
    """Return the experts' Gram matrices (T, in, in) in float64, with off-diagonal entries multiplied by alpha."""
    shape = torch.Size((width, width))
    own = [statistics_of("regmean", statistics, t, name, shape, device).double() for t in vectors.experts]
    grams = torch.stack(own)
    return torch.where(torch.eye(width, dtype=torch.bool, device=device), grams, alpha * grams)


def _regressed(name: str, grams: Tensor, taus: Tensor) -> Tensor:
    """Return (sum_t tau_t G_t) (sum_t G_t)^+ of taus (T, out, in) and Gram matrices (T, in, in)."""
    total = grams.sum(dim=0)
    variance = total.diagonal()
    scale = torch.where(variance > 0, variance, torch.inf).rsqrt()
    # The statistics are in single precision: a direction below its rounding error holds no input.
    rounding = len(total) * torch.finfo(torch.float32).eps
    try:
        inverse = torch.linalg.pinv(scale[:, None] * total * scale, rtol=rounding, hermitian=True)
    except RuntimeError as error:
        raise InputError(f"regmean: the Gram matrices of {name} can't be inverted ({error}); take other rows") from None
    right = torch.einsum("toi,tij->oj", taus.double(), grams)
    return ((right * scale) @ inverse * scale).to(taus.dtype)
