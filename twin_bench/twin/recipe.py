"""Recipes: the YAML files that describe how a twin is built."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from twin_bench.config import Dtype, Seed, Settings, locate, parse, read_yaml, with_models_located
from twin_bench.merging.plugins import WithPlugins
from twin_bench.merging.recipe import Shared
from twin_bench.twin.exclusive.settings import ExclusiveSettings

__all__ = ["ExclusiveSettings", "Recipe", "RouterSettings", "read_recipe"]


class RouterSettings(Settings):
    """The router's training data, its input and its training.

    `data` is a directory of {task}/train.jsonl in the tasks' own schemas, or a file of rows {"text", "task"}.
    `layer` is the hidden state that the router reads: 0 for the embeddings, k for block k, -1 for the last. With auto
    it is the layer with the best accuracy on the held-out rows.
    `top_k` keeps only the largest weights (0 keeps all), and `temperature` divides the logits.
    `max_rows` limits each task's rows. `held_out` is the fraction of them on which epoch and layer are chosen.
    `epochs` counts the passes over the training rows.
    With `paper`, the authors' router for the protocol paper is trained too if `data` holds each task's validation
    rows, on which the authors select it.
    """

    data: str
    layer: int | Literal["auto"] = -1
    top_k: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    max_rows: int = Field(default=5500, ge=2)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    epochs: int = Field(default=50, ge=1)
    paper: bool = True


class Recipe(WithPlugins):
    """How a twin is built: its base model, experts, shared expert, exclusive vectors and router.

    `base_model` and `experts` are directories or hub ids. Without `router` the twin has none.
    `max_length` is the length in tokens to which an input is truncated. The default is 128 for classifiers, as in the
    paper, and the model's window for language models.
    `dtype` is the dtype in which the router's features are computed, by default the base model's. It should be the
    dtype in which the twin will run.
    `plugins` are Python files that register methods or metrics; they are imported.
    `allow_pickle` also reads weights from pickles. `trust_remote_code` lets transformers run code that comes with a
    model.
    """

    base_model: str
    experts: dict[str, str] = Field(min_length=1)
    shared: Shared = Field(default_factory=Shared)
    exclusive: ExclusiveSettings = ExclusiveSettings(density=0.1)
    router: RouterSettings | None = None
    seed: Seed = 0
    max_length: int | None = Field(default=None, ge=2)
    dtype: Dtype | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False


def read_recipe(file: Path) -> Recipe:
    """Read and check a recipe. Environment variables in it are expanded.

    A relative path is looked up in the recipe's folder first, then in the working directory. Raises InputError that
    names the file and the key.
    """
    raw = with_models_located(read_yaml(file), file)
    if isinstance(raw.get("router"), dict) and "data" in raw["router"]:
        raw["router"]["data"] = locate(raw["router"]["data"], file)
    return parse(Recipe, raw, str(file))
