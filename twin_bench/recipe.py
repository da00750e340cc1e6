"""Recipes: the YAML that says what a twin or a merged checkpoint is made of, checked key by key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twin_bench.errors import InputError, nearest
from twin_bench.methods import find_method

Dtype = Literal["float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """A block of a YAML file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SettingsType = TypeVar("SettingsType", bound=Settings)


class Shared(BaseModel):
    """A static merge method and its options: a twin's shared expert, or the whole of a merge."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str = "task_arithmetic"

    @property
    def options(self) -> dict[str, Any]:
        """The method's options that were given."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> Shared:
        header = find_method(self.method).given(self.options)
        if header.function is None:
            raise InputError(f"{self.method} is no static merge; known: task_arithmetic, average, ties, ...")
        if header.inputs:
            raise InputError(f"{self.method} needs {header.inputs[0]}, and a shared expert is made of weights alone")
        for option, value in self.options.items():
            header.check(option, value)
        return self


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
    shared: Shared = Shared()
    exclusive: ExclusiveSettings = ExclusiveSettings(density=0.1)
    router: RouterSettings | None = None
    seed: int = 0
    max_length: int | None = Field(default=None, ge=2)
    dtype: Dtype | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False


class MergeRecipe(Settings):
    """A merged checkpoint: base model, experts and a static merge method.

    `head`: the expert whose head a merged classifier gets; without it the backbone alone is written. `as_adapter`:
    write one PEFT LoRA adapter on the base model, which experts that are adapters allow under a method that sums
    task vectors. `dtype`: of what is written; by default the base model's. Sums are taken in float32 or better.
    """

    base_model: str
    experts: dict[str, str] = Field(min_length=1)
    merge: Shared
    head: str | None = None
    as_adapter: bool = False
    seed: int = 0
    dtype: Dtype | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _known_head(self) -> MergeRecipe:
        if self.head is not None and self.head not in self.experts:
            raise InputError(f"head: no expert {self.head!r}{nearest(self.head, self.experts)}")
        return self


def read_recipe(file: Path) -> Recipe:
    """Read and check a recipe; environment variables in it are expanded.

    Relative paths are taken from the recipe's own folder where they exist there, else from the working
    directory. Raises InputError that names the file and the key.
    """
    raw = _with_models_located(read_yaml(file), file)
    if isinstance(raw.get("router"), dict) and "data" in raw["router"]:
        raw["router"]["data"] = locate(raw["router"]["data"], file)
    return parse(Recipe, raw, str(file))


def read_merge_recipe(file: Path) -> tuple[MergeRecipe, str]:
    """Read and check a merge recipe, or a mergekit file (one with `merge_method`), as `read_recipe` does.

    Returns the recipe, and what a mergekit file makes otherwise here than there: one line, or "".
    """
    from twin_bench.mergekit import from_mergekit

    raw = read_yaml(file)
    if "merge_method" in raw:
        return from_mergekit(raw, file)
    return parse(MergeRecipe, _with_models_located(raw, file), str(file)), ""


def parse(kind: type[SettingsType], raw: Any, source: str) -> SettingsType:
    """Return `raw` checked as `kind`; what is wrong first becomes one line led by `source` and the key."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            fields: Any = kind
            for part in (part for part in problem["loc"][:-1] if not isinstance(part, int)):
                annotation = fields.model_fields[part].annotation
                candidates = [annotation, *getattr(annotation, "__args__", ())]
                fields = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
            message = f"unknown key{nearest(str(problem['loc'][-1]), fields.model_fields)}"
        elif "input" in problem and not isinstance(problem["input"], dict):
            message += f" (found {problem['input']!r})"
        raise InputError(f"{source}: {key}: {message}" if key else f"{source}: {message}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """Return a YAML file's mapping, environment variables expanded; InputError names file and line."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: can't be read ({error})") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}: expected a mapping of keys, found {type(raw).__name__}")
    return {str(key): _expanded(value, file) for key, value in raw.items()}


def locate(path: Any, file: Path) -> Any:
    """Return `path` as it lies beside `file` when it exists there, else as it was given."""
    beside = file.parent / path if isinstance(path, str) else None
    return str(beside) if beside is not None and beside.exists() else path


def _with_models_located(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    if isinstance(raw.get("experts"), dict):
        raw["experts"] = {name: locate(path, file) for name, path in raw["experts"].items()}
    if "base_model" in raw:
        raw["base_model"] = locate(raw["base_model"], file)
    return raw


def _expanded(value: Any, file: Path) -> Any:
    if isinstance(value, dict):
        return {key: _expanded(item, file) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, file) for item in value]
    if not isinstance(value, str):
        return value
    expanded = os.path.expandvars(value)
    if "$" in expanded:
        name = expanded[expanded.index("$") :].split("/")[0]
        raise InputError(f"{file}: {value!r} needs the environment variable {name.strip('${}')}; set it")
    return expanded
