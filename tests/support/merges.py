"""Random models of a few tensors, and how many experts each method takes."""

from __future__ import annotations

from typing import Any

import torch

import twin_bench
from twin_bench.merging.registry import MergeMethod

STATIC = sorted(
    name for name, method in twin_bench.methods().items() if isinstance(method, MergeMethod) and not method.inputs
)
TOLD = sorted(
    name for name, method in twin_bench.methods().items() if isinstance(method, MergeMethod) and "task" in method.inputs
)
"""Methods with one set of parameters for each task."""
SHAPES = {"tall": (40, 7), "wide": (5, 33), "vector": (19,), "square": (16, 16), "layers.1.norm": (11,)}
EXPERTS = {name: 4 for name in STATIC} | {"slerp": 2, "nuslerp": 2}


def models(dtype: torch.dtype = torch.float32, experts: int = 4, seed: int = 0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    base["deficient"] = torch.outer(torch.arange(6.0), torch.ones(9)).to(dtype)
    tuned = {
        f"task{index}": {
            name: (tensor.float() + 0.1 * torch.randn(tensor.shape, generator=generator)).to(dtype)
            for name, tensor in base.items()
        }
        for index in range(experts)
    }
    return base, tuned
