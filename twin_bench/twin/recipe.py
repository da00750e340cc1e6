"""Recipes: the YAML that says what a twin is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from twin_bench.config import Dtype, Settings, locate, parse, read_yaml, with_models_located
from twin_bench.errors import InputError
from twin_bench.merging.recipe import Shared


class ExclusiveSettings(Settings):
    """How much of each matrix's difference is kept: a fraction of its rank, or a rank."""

    density: float | None = Field(default=None, gt=0, le=1)
    rank: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one(self) -> ExclusiveSettings:
        if (self.density is None) == (self.rank is None):
            raise InputError("give either density or rank")
        return self


class RouterSettings(Settings):
    """Where the router's rows come from, what it reads and how it is chosen.

    `data`: {task}/train.jsonl in the task's own schema, or rows {"text", "task"}. `layer`: the hidden state it reads
    (0 the embeddings, -1 the last), or auto: the one with the best accuracy on the held-out rows.
    `held_out`: the fraction of those rows that chooses epoch and layer. `max_rows`: of each task. `paper`:
    train the authors' router as well, for the paper protocol, where `data` holds each task's validation rows
    to select it on.
    """

    data: str
    layer: int | Literal["auto"] = -1
    top_k: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    max_rows: int = Field(default=5500, ge=2)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    epochs: int = Field(default=50, ge=1)
    paper: bool = True


class Recipe(Settings):
    """A twin: base model, experts, shared expert, exclusive vectors and router.

    `max_length`: tokens an input is truncated to; by default 128 for classifiers, as in the paper, and the
    model's window for language models. `dtype`: what the router's features are taken in, which is best what the
    twin will run in; by default the base model's.
    """

    base_model: str
    experts: dict[str, str] = Field(min_length=1)
    shared: Shared = Field(default_factory=Shared)
    exclusive: ExclusiveSettings = ExclusiveSettings(density=0.1)
    router: RouterSettings | None = None
    seed: int = 0
    max_length: int | None = Field(default=None, ge=2)
    dtype: Dtype | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False


def read_recipe(file: Path) -> Recipe:
    """Read and check a recipe; environment variables in it are expanded.

    Relative paths are taken from the recipe's own folder where they exist there, else from the working
    directory. Raises InputError that names the file and the key.
    """
    raw = with_models_located(read_yaml(file), file)
    if isinstance(raw.get("router"), dict) and "data" in raw["router"]:
        raw["router"]["data"] = locate(raw["router"]["data"], file)
    return parse(Recipe, raw, str(file))
