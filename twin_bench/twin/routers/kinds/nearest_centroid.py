"""The expert whose training rows' mean is nearest."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from twin_bench.twin.routers.base import Examples, RouterConfig, StoredRouter
from twin_bench.twin.routers.registry import router_kind


@router_kind("nearest_centroid", title="Nearest centroid", paper="")
class NearestCentroidRouter(StoredRouter):
    """softmax(-d(x, mu_t)^2 / 2v): the distance to the mean of `rows` rows of each task. Nothing is trained.

    v is the variance within tasks, the mean over features.
    """

    confidence_of = "logit"
    means: Tensor
    variance: Tensor

    @classmethod
    def fit(
        cls, config: RouterConfig, examples: Examples, *, rows: Annotated[int, Field(ge=1)] = 32
    ) -> NearestCentroidRouter:
        """Take the means of the first rows of each task."""
        few = examples.few(len(config.experts), rows)
        means = torch.stack([own.mean(dim=0) for own in few])
        within = torch.cat([own - mean for own, mean in zip(few, means, strict=True)])
        variance = within.square().mean()
        return cls(config, means=means, variance=variance if variance > 0 else torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, T) for features (N, width)."""
        return -distances(features, self.means).square() / (2 * self.variance)


def distances(features: Tensor, others: Tensor) -> Tensor:
    """Return Euclidean distances (N, M) between (N, width) and (M, width), without the loss of |a|^2 - 2ab + |b|^2."""
    return torch.cdist(features, others, compute_mode="donot_use_mm_for_euclid_dist")
