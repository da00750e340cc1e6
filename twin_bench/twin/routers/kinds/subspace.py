"""The expert whose training rows span the features best: SiM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.twin.routers.base import Examples, RouterConfig, StoredRouter
from twin_bench.twin.routers.registry import router_kind

SPANNED = 1e-6
"""The smallest singular value of a direction that rows span, in units of the largest. Features are float32."""


@router_kind("subspace", title="SiM's projection residual", paper="arXiv:2606.22589")
class SubspaceRouter(StoredRouter):
    """softmax(-|z - U_t U_t^T z|), z = x / |x|: the residual of the features on the span of `rows` rows of each task.

    SiM reads the pretrained model, and this router what every router reads: the shared expert. `rank` keeps the
    directions with the largest singular values; 0 keeps all. Nothing is trained.
    """

    confidence_of = "logit"
    bases: Tensor

    @classmethod
    def fit(
        cls,
        config: RouterConfig,
        examples: Examples,
        *,
        rows: Annotated[int, Field(ge=1)] = 32,
        rank: Annotated[int, Field(ge=0)] = 0,
    ) -> SubspaceRouter:
        """Find an orthonormal basis of each task's rows. InputError if a task's rows span the whole space."""
        counts = examples.counts(len(config.experts))
        cls.check(counts, config.width, {"rows": rows, "rank": rank})
        kept = min(rank or rows, rows, *counts)
        few = [own / own.norm(dim=1, keepdim=True) for own in examples.few(len(config.experts), rows)]
        return cls(config, bases=torch.stack([_directions(own)[:kept] for own in few]))

    @classmethod
    def check(cls, counts: Sequence[int], width: int, options: Mapping[str, Any]) -> None:
        """Raise an InputError if the rows span all features."""
        if min(options["rank"] or options["rows"], options["rows"], *counts) >= width:
            raise InputError(
                f"router.options.rows {options['rows']}: they span all {width} features, so that no residual is left; "
                "give fewer, or a rank"
            )

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, T) for features (N, width)."""
        return -residuals(torch.nn.functional.normalize(features, dim=1), self.bases)


def _directions(rows: Tensor) -> Tensor:
    """Return the orthonormal directions that rows (N, width) span, and zeros beyond their rank: rows may repeat."""
    _, singular, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions * (singular > SPANNED * singular[0])[:, None]


def residuals(features: Tensor, bases: Tensor) -> Tensor:
    """Return |z - U_t^T U_t z| (N, T) for features z (N, width) and orthonormal rows U_t, (T, rank, width)."""
    along = torch.einsum("nd,trd->ntr", features, bases)
    return (features.square().sum(dim=1, keepdim=True) - along.square().sum(dim=2)).clamp(min=0).sqrt()
