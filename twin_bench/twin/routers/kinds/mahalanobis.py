"""The expert whose training rows' mean is nearest in the metric of the rows' own covariance."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from twin_bench.twin.routers.base import Examples, RouterConfig, StoredRouter
from twin_bench.twin.routers.registry import router_kind

FLAT = 1e-6
"""The smallest shrinkage: a covariance of fewer rows than features has no inverse without any."""


@router_kind("mahalanobis", title="Mahalanobis distance", paper="")
class MahalanobisRouter(StoredRouter):
    """softmax(-(x - mu_t)^T S^-1 (x - mu_t) / 2): linear discriminant analysis of `rows` rows of each task.

    S = (1 - s) C + s tr(C)/d I, C the covariance within tasks. `shrinkage` is s, by default Ledoit and Wolf's estimate.
    Nothing is trained.
    """

    confidence_of = "logit"
    means: Tensor
    inverse: Tensor
    floor: Tensor

    @classmethod
    def fit(
        cls,
        config: RouterConfig,
        examples: Examples,
        *,
        rows: Annotated[int, Field(ge=1)] = 32,
        shrinkage: Annotated[float, Field(gt=0, le=1)] | None = None,
    ) -> MahalanobisRouter:
        """Compute S^-1 = (I - P^T P) / floor from the rows, with P (rows of all tasks or fewer, width)."""
        few = examples.few(len(config.experts), rows)
        means = torch.stack([own.mean(dim=0) for own in few])
        within = torch.cat([own - mean for own, mean in zip(few, means, strict=True)])
        if shrinkage is None:
            shrinkage = max(FLAT, float(ledoit_wolf_shrinkage(within.numpy(), assume_centered=True)))
        spread = within.square().sum() / len(within) / config.width
        floor = shrinkage * (spread if spread > 0 else torch.ones_like(spread))
        _, singular, directions = torch.linalg.svd(within, full_matrices=False)
        variances = (1 - shrinkage) * singular.square() / len(within)
        inverse = (variances / (variances + floor)).sqrt()[:, None] * directions
        return cls(config, means=means, inverse=inverse, floor=floor)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, T) for features (N, width)."""
        offsets = features[:, None] - self.means
        along = offsets @ self.inverse.T
        return (along.square().sum(dim=-1) - offsets.square().sum(dim=-1)) / (2 * self.floor)
