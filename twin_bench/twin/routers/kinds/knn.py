"""The experts of the nearest training rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.twin.routers.base import Examples, RouterConfig, StoredRouter
from twin_bench.twin.routers.kinds.nearest_centroid import distances
from twin_bench.twin.routers.registry import router_kind

DOUBT = 0.01
"""The votes that an expert without a neighbour has. A weight of 0 has no logarithm."""


@router_kind("knn", title="k nearest neighbours", paper="")
class KnnRouter(StoredRouter):
    """w_t = the share of task t among the `neighbours` nearest of all tasks' `rows` stored rows. Nothing is trained."""

    examples: Tensor
    owners: Tensor
    neighbours: Tensor

    @classmethod
    def fit(
        cls,
        config: RouterConfig,
        examples: Examples,
        *,
        rows: Annotated[int, Field(ge=1)] = 32,
        neighbours: Annotated[int, Field(ge=1)] = 5,
    ) -> KnnRouter:
        """Store the first rows of each task. InputError if they are fewer than the neighbours."""
        cls.check(examples.counts(len(config.experts)), config.width, {"rows": rows, "neighbours": neighbours})
        few = examples.few(len(config.experts), rows)
        owners = torch.repeat_interleave(torch.arange(len(few)), torch.tensor([len(own) for own in few]))
        return cls(config, examples=torch.cat(few), owners=owners, neighbours=torch.tensor(neighbours))

    @classmethod
    def check(cls, counts: Sequence[int], width: int, options: Mapping[str, Any]) -> None:
        """Raise an InputError if fewer rows are stored than there are neighbours."""
        stored, neighbours = sum(min(own, options["rows"]) for own in counts), options["neighbours"]
        if neighbours > stored:
            raise InputError(f"router.options.neighbours {neighbours}: only {stored} rows are stored; give fewer")

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, T) for features (N, width): the logarithms of the votes."""
        nearest = distances(features, self.examples).topk(int(self.neighbours), largest=False).indices
        votes = F.one_hot(self.owners[nearest], len(self.config.experts)).sum(dim=1)
        return torch.log(votes + DOUBT)
