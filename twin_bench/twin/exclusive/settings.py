"""The settings of exclusive vectors, in a recipe, a suite and twin.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from twin_bench.config import Settings
from twin_bench.errors import InputError
from twin_bench.twin.exclusive.registry import find_kind

EVER_DUMPED = ("density", "rank")
"""The keys that have always been in dumps, None included. Others are left out at their defaults."""


class Energy(Settings):
    """For each matrix, the smallest rank that holds this share of its squared singular values."""

    energy: float = Field(gt=0, le=1)


class Bytes(Settings):
    """A number of bytes for each expert."""

    bytes: int = Field(ge=1)


class ExclusiveSettings(Settings):
    """The kind of the exclusive vectors and how much of a matrix is kept.

    `kind` is svd, magnitude, bernoulli or sign_mask. For svd give one of these: `density`, a fraction of each matrix's
    rank; `rank`, a number or {energy: SHARE}; `budget`, a share of an expert's bytes or {bytes: N}. `bits` 8 or 4
    quantises its factors. For the other kinds `density` is the fraction of each matrix's entries that is kept.
    `from_layer` k leaves out the embeddings and the blocks below k, so that hidden state k is the shared expert's.
    `random` puts random vectors of the same sizes in their place, as a control.
    """

    kind: str = "svd"
    density: float | None = Field(default=None, gt=0, le=1)
    rank: Annotated[int, Field(ge=1)] | Energy | None = None
    budget: Annotated[float, Field(gt=0, le=1)] | Bytes | None = None
    bits: Literal[8, 4] | None = None
    from_layer: int | None = Field(default=None, ge=0)
    random: bool = False

    @model_validator(mode="after")
    def _one(self) -> ExclusiveSettings:
        options = self.options()
        find_kind(self.kind).require(options)
        if self.kind == "svd" and len(options.keys() - {"bits"}) != 1:
            raise InputError("give either density or rank, or a budget: exactly one of them")
        if isinstance(self.rank, int) and self.rank < 1:
            raise InputError(f"rank must be at least 1, not {self.rank}")
        if isinstance(self.budget, float) and not 0 < self.budget <= 1:
            raise InputError(
                f"budget must be in (0, 1], a share of an expert's bytes, or bytes: N; not {self.budget:g}"
            )
        if self.random and not (self.kind == "svd" and self.bits is None):
            raise InputError("random replaces factors that are not quantised; leave out kind and bits")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not set: digests of settings that lack a key stay what they were."""
        dumped: dict[str, Any] = serialise(self)
        fields = type(self).model_fields
        return {key: value for key, value in dumped.items() if key in EVER_DUMPED or value != fields[key].default}

    def options(self) -> dict[str, Any]:
        """Return the options of the kind that are given, as its function takes them."""
        energy, budget_bytes = isinstance(self.rank, Energy), isinstance(self.budget, Bytes)
        given = {
            "density": self.density,
            "energy" if energy else "rank": self.rank.energy if isinstance(self.rank, Energy) else self.rank,
            "budget_bytes" if budget_bytes else "budget": (
                self.budget.bytes if isinstance(self.budget, Bytes) else self.budget
            ),
            "bits": self.bits,
        }
        return {option: value for option, value in given.items() if value is not None}

    @property
    def truncation(self) -> tuple[float | None, int | None]:
        """The density and the rank of truncated SVDs, at most one of them given: neither where a kind has none."""
        if self.kind != "svd":
            return None, None
        return self.density, self.rank if isinstance(self.rank, int) else None
