"""Recipes: the YAML files that describe how a twin is built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from twin_bench.config import Dtype, Seed, Settings, locate, parse, read_yaml, with_models_located
from twin_bench.errors import InputError
from twin_bench.merging.plugins import WithPlugins
from twin_bench.merging.recipe import Shared
from twin_bench.twin.exclusive.settings import ExclusiveSettings
from twin_bench.twin.features import Pooling
from twin_bench.twin.routers.registry import find_kind

__all__ = ["ExclusiveSettings", "Recipe", "RouterSettings", "read_recipe"]


LATER = ("kind", "options", "layers", "pooling", "fallback", "keep", "objective")
"""The keys of a router that recipes once did not have."""


class RouterSettings(Settings):
    """The router's training data, its input and its training.

    `data` is a directory of {task}/train.jsonl in the tasks' own schemas, or a file of rows {"text", "task"}.
    `kind` names the kind of router, by default the paper's MLP, and `options` are that kind's.
    `layer` is the hidden state that the router reads: 0 for the embeddings, k for block k, -1 for the last. `layers` in
    its place are several, one behind the other. With auto it is the lowest layer whose accuracy on the held-out rows is
    within one standard error of the best one's.
    `pooling` says how hidden states become one vector: mean, first, last, or auto, which is chosen with the layer.
    `top_k` keeps only the largest weights (0 keeps all), and `temperature` divides the logits; with auto it makes the
    held-out rows most likely.
    With `fallback` shared, the shared expert answers rows of which the router is less sure than of a fraction `keep`
    of the held-out rows.
    With `objective` task_loss, the parameters of a classifier's router are trained on: on the loss of the fused model's
    answers to labelled training rows.
    `max_rows` limits each task's rows. `held_out` is the fraction of them that the router is not fitted on. One half
    of them chooses all that is chosen, and twin.json tells what the router does to the other half.
    `epochs` counts the passes over the training rows, at the authors' rate; theirs are 50. With auto a router that has
    epochs is trained for a short time, as its kind says.
    With `paper`, the authors' router for the protocol paper is trained too if `data` holds each task's validation
    rows, on which the authors select it.
    """

    data: str
    kind: str = "mlp"
    options: dict[str, Any] = Field(default_factory=dict)
    layer: int | Literal["auto"] = -1
    layers: tuple[int, ...] = ()
    pooling: Pooling | Literal["auto"] = "mean"
    top_k: int = Field(default=0, ge=0)
    temperature: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    fallback: Literal["shared"] | None = None
    keep: float = Field(default=0.95, gt=0, le=1)
    objective: Literal["task_id", "task_loss"] = "task_id"
    max_rows: int = Field(default=5500, ge=2)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    epochs: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    paper: bool = True

    @property
    def passes(self) -> int | None:
        """The number of passes over the training rows, or None if the kind chooses it."""
        return None if self.epochs == "auto" else self.epochs

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        find_kind(kind)
        return kind

    @field_validator("options")
    @classmethod
    def _of_the_kind(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "kind" in info.data:  # not if it is unknown
            find_kind(info.data["kind"]).checked(options)
        return options

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not layers:
            raise InputError("no layer; name one, or leave layers out")
        for layer in layers:
            if layers.count(layer) > 1:
                raise InputError(f"{layer} stands twice; remove one")
        return layers

    @model_validator(mode="after")
    def _in_effect(self) -> RouterSettings:
        """Refuse keys that would change nothing beside the others."""
        if self.layers and "layer" in self.model_fields_set:
            raise InputError("give either layer or layers")
        if self.fallback is None and "keep" in self.model_fields_set:
            raise InputError("keep: without fallback: shared it changes nothing; give both, or neither")
        if self.fallback and find_kind(self.kind).router.confidence_of is None:
            raise InputError(
                f"fallback: kind {self.kind} is as sure of one input as of any other; give another kind, or leave "
                "fallback out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out keys that came after the first format, unless they are set: digests of settings stay the same."""
        dumped: dict[str, Any] = serialise(self)
        plain = {name: RouterSettings.model_fields[name].get_default(call_default_factory=True) for name in LATER}
        return {key: value for key, value in dumped.items() if key not in LATER or getattr(self, key) != plain[key]}


class Recipe(WithPlugins):
    """How a twin is built: its base model, experts, shared expert, exclusive vectors and router.

    `base_model` and `experts` are directories or hub ids. Without `router` the twin has none.
    `max_length` is the length in tokens to which an input is truncated. The default is 128 for classifiers, as in the
    paper, and the model's window for language models.
    `dtype` is the dtype in which the router's features are computed, by default the base model's. It should be the
    dtype in which the twin will run.
    `quantization` keeps the shared expert in few bits: 4bit, 8bit, or keys of transformers' BitsAndBytesConfig. The
    exclusive vectors stay as they are.
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
    quantization: Literal["4bit", "8bit"] | dict[str, Any] | None = None
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
