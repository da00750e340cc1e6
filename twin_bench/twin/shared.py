"""The shared expert theta_s: the static merge of all experts that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from twin_bench.checkpoints.sources import Sources
from twin_bench.merging.by_name import merge_lazily
from twin_bench.merging.registry import find_method
from twin_bench.twin.recipe import Recipe


def merge_options(recipe: Recipe) -> dict[str, Any]:
    """Return the options of the static merge that makes the shared expert, with the recipe's seed if it needs one."""
    header = find_method(recipe.shared.method).given(recipe.shared.options)
    return {**header.seeded(recipe.seed), **recipe.shared.options}


def merged_parameters(recipe: Recipe, sources: Sources, device: torch.device) -> Mapping[str, Tensor]:
    """Return the shared expert's parameters by name. Each is computed when it is read, on `device`."""
    return merge_lazily(
        recipe.shared.method,
        sources.base,
        sources.experts,
        transposed=sources.skeleton.transposed,
        device=device,
        **merge_options(recipe),
    )
