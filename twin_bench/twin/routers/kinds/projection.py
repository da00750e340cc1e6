"""The expert whose own directions hold the hidden state best: MASS."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from twin_bench.twin.routers.base import Examples, RouterConfig, StoredRouter
from twin_bench.twin.routers.kinds.subspace import residuals
from twin_bench.twin.routers.registry import router_kind


@router_kind("projection", title="MASS's projection residual", paper="arXiv:2504.05342", needs=())
class ProjectionRouter(StoredRouter):
    """softmax(-|z - V_t V_t^T z|): the residual of z on the right singular directions of an expert's exclusive vector.

    The matrices are those that read the hidden state z first, in the block above it. `rank` is how many directions are
    kept, by default width / T. Nothing is trained, and no data is read.
    """

    reads_experts = True
    confidence_of = "logit"
    bases: Tensor

    @classmethod
    def fit(
        cls, config: RouterConfig, examples: Examples, *, rank: Annotated[int, Field(ge=0)] = 0
    ) -> ProjectionRouter:
        """Keep the first directions of each expert; of one that has fewer, all. Missing ones are zeros."""
        found = examples.directions()
        kept = min(rank or max(1, config.width // len(config.experts)), config.width)
        bases = torch.zeros(len(found), kept, config.width, dtype=torch.float64)
        for basis, own in zip(bases, found, strict=True):
            basis[: len(own[:kept])] = own[:kept]
        return cls(config, bases=bases)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, T) for features (N, width)."""
        return -residuals(features, self.bases)
