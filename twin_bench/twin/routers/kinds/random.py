"""An expert by chance for each input: a bound."""

from __future__ import annotations

import torch
from torch import Tensor

from twin_bench.twin.routers.base import Examples, RouterConfig, StoredRouter
from twin_bench.twin.routers.registry import router_kind

TURNS = 50.0
"""The phase, in radians, by which an input that is one standard deviation away turns. It is far from similar inputs'
agreement, and far from rounding errors."""
SHARPNESS = 20.0
"""The largest logit: nearly all weight is one expert's."""


@router_kind("random", title="An expert by chance", paper="", needs=("seed",))
class RandomRouter(StoredRouter):
    """One expert for each input, drawn by a hash of its features: what routing is worth that knows nothing. A bound."""

    confidence_of = None
    hashes: Tensor
    phases: Tensor
    mean: Tensor

    @classmethod
    def fit(cls, config: RouterConfig, examples: Examples) -> RandomRouter:
        """Draw the hash, whose scale is that of the features."""
        generator = torch.Generator().manual_seed(examples.seed)
        experts = len(config.experts)
        mean = examples.features.double().mean(dim=0)
        size = (examples.features - mean).norm(dim=1).square().mean().sqrt().clamp(min=1e-12)
        drawn = torch.randn(config.width, experts, generator=generator, dtype=torch.float64)
        phases = 2 * torch.pi * torch.rand(experts, generator=generator, dtype=torch.float64)
        return cls(config, hashes=TURNS * drawn / size, phases=phases, mean=mean)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, T) for features (N, width)."""
        return SHARPNESS * torch.sin((features - self.mean) @ self.hashes + self.phases)
