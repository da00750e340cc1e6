"""Merge recipes: the YAML that describes a merged checkpoint."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from twin_bench.config import Dtype, Seed
from twin_bench.errors import InputError, nearest
from twin_bench.merging.plugins import WithPlugins
from twin_bench.merging.registry import find_method


class Shared(BaseModel):
    """A static merge method and its options: those of a twin's shared expert, or those of a whole merge."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str = "task_arithmetic"

    @property
    def options(self) -> dict[str, Any]:
        """The method's options that were given."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> Shared:
        header = find_method(self.method).given(self.options)
        header.require_weights_alone()
        header.checked(self.options)
        return self


class MergeRecipe(WithPlugins):
    """A merged checkpoint: base model, experts and a static merge method.

    `head` names the expert whose head a merged classifier gets. Without it the backbone alone is written. `as_adapter`
    writes one PEFT LoRA adapter on the base model; it needs experts that are adapters and a method that sums task
    vectors. `dtype` is the dtype that is written, by default the base model's. Sums are taken in float32 or better.
    `plugins` are Python files that register methods or metrics; they are imported.
    """

    base_model: str
    experts: dict[str, str] = Field(min_length=1)
    merge: Shared
    head: str | None = None
    as_adapter: bool = False
    seed: Seed = 0
    dtype: Dtype | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _known_head(self) -> MergeRecipe:
        if self.head is not None and self.head not in self.experts:
            raise InputError(f"head: no expert {self.head!r}{nearest(self.head, self.experts)}")
        return self
