"""The same weight for every expert: a bound."""

from __future__ import annotations

import torch
from torch import Tensor

from twin_bench.twin.routers.base import Examples, Router, RouterConfig
from twin_bench.twin.routers.registry import router_kind


@router_kind("uniform", title="Equal weights", paper="", needs=())
class UniformRouter(Router):
    """w_t = 1 / T for every input: what a fusion is worth without routing. A bound."""

    confidence_of = None

    @classmethod
    def fit(cls, config: RouterConfig, examples: Examples) -> UniformRouter:
        """Read nothing."""
        return cls(config)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, T), all 0, for features (N, width)."""
        return torch.zeros(len(features), len(self.config.experts), device=features.device)
