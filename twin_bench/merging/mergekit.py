"""mergekit's YAML, read where twin-bench has a method of the same meaning; all else is an error that says so.

What is the same, up to rounding (sums are taken in float32 here, in `dtype` there):

- `linear` with equal weights is `average`; `task_arithmetic` with equal weights is `task_arithmetic`, scaling being
  lambda times the weight (lambda / T under `normalize: true`); `slerp` is `slerp`; `model_stock` is `model_stock`.

What is the same method by another arithmetic, which `from_mergekit` says in a line:

- `ties` trims each tensor to `density` by itself there, the whole model at once here, as the paper does. With
  `normalize: true`, its default, the rest is the same: the mean of the entries that agree. Entries whose sum is
  exactly 0 keep the positive ones there and are dropped here.
- `dare_linear` and `dare_ties` draw other entries for want of a common generator, and rescale what is kept by
  1 / density here, as the paper does; recent mergekit rescales each tensor to the L1 norm that it had.
- `breadcrumbs` and `della` as their own pages in leaderboards/METHODS.md say.

`dare_ties`, like any election without `normalize: true`, takes the *sum* of the entries that agree there: no method
here does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from twin_bench.config import Dtype, Settings, locate, parse
from twin_bench.errors import InputError, nearest
from twin_bench.merging.recipe import MergeRecipe
from twin_bench.merging.registry import methods


@dataclass(frozen=True)
class Counterpart:
    """What a mergekit method is called here.

    `mixes`: how it puts task vectors together: their weighted sum; an election and the mean or sum of the entries
    that agree; or a way of its own. `of_each` are the parameters that mergekit reads for each model (beside the
    weight), `of_all` those it reads once, with mergekit's defaults; `normalize` is mergekit's default.
    """

    method: str
    mixes: Literal["sum", "election", "own"]
    normalize: bool = False
    of_each: Mapping[str, float] = field(default_factory=dict)
    of_all: tuple[str, ...] = ()
    difference: str = ""


_DRAWS = "draws other entries than mergekit and rescales them by 1 / density, recent mergekit to the tensor's L1 norm"
COUNTERPARTS = {
    "linear": Counterpart("average", "own", normalize=True),
    "task_arithmetic": Counterpart("task_arithmetic", "sum"),
    "ties": Counterpart(
        "ties",
        "election",
        normalize=True,
        of_each={"density": 1.0},
        difference="trims over the whole model, as the paper does, mergekit each tensor by itself",
    ),
    "dare_linear": Counterpart("dare_task_arithmetic", "sum", of_each={"density": 1.0}, difference=_DRAWS),
    "dare_ties": Counterpart("dare_ties", "election", of_each={"density": 1.0}, difference=_DRAWS),
    "breadcrumbs": Counterpart(
        "breadcrumbs", "sum", of_each={"density": 1.0, "gamma": 0.01}, difference="may mask other entries than mergekit"
    ),
    "della": Counterpart(
        "della",
        "election",
        normalize=True,
        of_each={"density": 1.0, "epsilon": 0.15},
        difference="draws other entries than mergekit",
    ),
    "slerp": Counterpart("slerp", "own", of_all=("t",)),
    "model_stock": Counterpart("model_stock", "own"),
}

_REFUSED = {
    "slices": "layers of several models can't be stacked here; give whole models under models, or use mergekit",
    "modules": "parts of a model can't be merged apart here; give whole models under models, or use mergekit",
    "tokenizer": "the result has the base model's tokenizer; remove the key, or use mergekit",
    "chat_template": "the result has the base model's; remove the key and set the template afterwards",
    "int8_mask": "masks take no lasting memory here and change no result; remove the key",
    "rescale": "whether a method rescales is part of the method here; remove the key",
    "filter_wise": "angles are taken over whole tensors here; remove the key, or use mergekit",
}


class _Model(Settings):
    model: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class _Configuration(Settings):
    merge_method: str
    models: list[_Model] = Field(min_length=1)
    base_model: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: Literal["base"] | None = None


def from_mergekit(raw: Mapping[str, Any], file: Path) -> tuple[MergeRecipe, str]:
    """Return the merge recipe that a mergekit configuration stands for, and what is computed otherwise here.

    Raises:
        InputError: a method or key that has no counterpart, weights or other parameters that differ between models,
            layer-wise lists, LoRA notation (MODEL+LORA). Nothing is ignored.
    """
    for key in raw.keys() & _REFUSED.keys():
        raise InputError(f"{file}: {key}: {_REFUSED[key]}")
    config = parse(_Configuration, raw, str(file))
    name = config.merge_method
    known = [theirs for theirs, ours in COUNTERPARTS.items() if ours.method in methods()]
    if name not in known:
        raise InputError(f"{file}: merge_method: {name!r} has no counterpart here{nearest(name, known)}")
    counterpart = COUNTERPARTS[name]
    reader = _Parameters(config, counterpart, file)
    base, experts = reader.base, [entry.model for entry in reader.experts]
    recipe = {
        "base_model": locate(base, file),
        "experts": dict(zip(_names(experts), (locate(model, file) for model in experts), strict=True)),
        "merge": {"method": counterpart.method, **reader.options()},
        "dtype": config.out_dtype or config.dtype,
    }
    differences = [counterpart.difference] if counterpart.difference else []
    if (config.dtype or "float32") != "float32":
        differences.append(f"takes sums in float32, mergekit in {config.dtype}")
    said = f"{file}: {counterpart.method} here {' and '.join(differences)}" if differences else ""
    return parse(MergeRecipe, recipe, str(file)), said


class _Parameters:
    """The models and parameters of a mergekit file, checked one by one."""

    def __init__(self, config: _Configuration, counterpart: Counterpart, file: Path) -> None:
        self._config = config
        self._counterpart = counterpart
        self._file = file
        name = config.merge_method
        if config.base_model is None and name != "linear":
            raise InputError(f"{file}: base_model: {name} needs one; name it")
        self.base = config.base_model or config.models[0].model
        # Under linear a base model that is listed is averaged like any other; slerp lists both its ends.
        with_base = name in ("linear", "slerp")
        self.experts = [entry for entry in config.models if with_base or entry.model != self.base]
        if name == "slerp":
            self.experts.sort(key=lambda entry: entry.model != self.base)
            if len(self.experts) != 2 or self.experts[0].model != self.base:
                raise InputError(f"{file}: models: slerp takes two, one of them the base_model")
        if not self.experts:
            raise InputError(f"{file}: models: none but the base model; name what is to be merged")
        weighted = {"weight"} if name not in ("slerp", "model_stock") else set()
        self._of_each = weighted | counterpart.of_each.keys()
        summed = {"lambda"} if counterpart.mixes != "own" else set()
        normalised = {"normalize"} if weighted else set()
        self._check_keys("parameters", config.parameters, self._of_each | summed | normalised | {*counterpart.of_all})
        for index, entry in enumerate(config.models):
            if "+" in entry.model:
                raise InputError(
                    f"{file}: models.{index}.model: {entry.model}: name the adapter alone, without the base"
                )
            if entry.parameters and entry not in self.experts:
                raise InputError(f"{file}: models.{index}.parameters: the base model's have no effect; remove them")
            self._check_keys(f"models.{index}.parameters", entry.parameters, self._of_each)

    def options(self) -> dict[str, float]:
        """Return the options of our method."""
        counterpart, name = self._counterpart, self._config.merge_method
        options = {key: self._of_every_expert(key, default) for key, default in counterpart.of_each.items()}
        options |= {key: self._of_all(key) for key in counterpart.of_all}
        if "weight" not in self._of_each:
            return options
        weight = self._of_every_expert("weight")
        normalize = self._normalize()
        count = len(self.experts)
        if counterpart.mixes == "sum":
            return {**options, "scaling": self._of_all("lambda", 1.0) * (1 / count if normalize else weight)}
        if counterpart.mixes == "election" and not normalize:
            raise InputError(
                f"{self._file}: normalize: {name} without it takes the sum of the entries that agree, twin-bench their "
                "mean; set normalize: true, or use mergekit"
            )
        if name == "linear" and not normalize and abs(weight * count - 1) > 1e-6:
            raise InputError(
                f"{self._file}: normalize: the weights don't sum to 1; set normalize: true, or use mergekit"
            )
        if weight <= 0:
            raise InputError(f"{self._file}: weight: {weight} leaves nothing to average; give a positive one")
        return options if name == "linear" else {**options, "scaling": self._of_all("lambda", 1.0)}

    def _check_keys(self, where: str, given: Mapping[str, Any], known: set[str]) -> None:
        for key, value in given.items():
            if key in _REFUSED:
                raise InputError(f"{self._file}: {where}.{key}: {_REFUSED[key]}")
            if key not in known:
                raise InputError(f"{self._file}: {where}.{key}: has no counterpart here{nearest(key, known)}")
            if isinstance(value, list | dict):
                raise InputError(f"{self._file}: {where}.{key}: differs between layers or tensors; give one number")
            boolean = key == "normalize"
            if isinstance(value, bool) != boolean or not isinstance(value, int | float):
                wanted = "true or false" if boolean else "a number"
                raise InputError(f"{self._file}: {where}.{key}: must be {wanted}, not {value!r}")

    def _of_every_expert(self, key: str, default: float | None = None) -> float:
        """Return a parameter that all experts have the same value of: a model's own, the file's, or mergekit's."""
        fallback = self._config.parameters.get(key, default)
        values: list[Any] = [entry.parameters.get(key, fallback) for entry in self.experts]
        if None in values:
            raise InputError(f"{self._file}: {key}: missing for {self.experts[values.index(None)].model}; give it")
        if len(set(values)) > 1:
            raise InputError(
                f"{self._file}: {key}: {', '.join(map(str, values))} differ; twin-bench has one for all experts: give "
                "one value, or use mergekit"
            )
        return values[0]

    def _of_all(self, key: str, default: float | None = None) -> float:
        value: float | None = self._config.parameters.get(key, default)
        if value is None:
            raise InputError(f"{self._file}: parameters.{key}: {self._config.merge_method} needs it; give it")
        return value

    def _normalize(self) -> bool:
        return bool(self._config.parameters.get("normalize", self._counterpart.normalize))


def _names(models: Sequence[str]) -> list[str]:
    """Return a name for each expert: the last part of its path, told apart by a number where two are the same."""
    names: list[str] = []
    for model in models:
        name = re.sub(r"[^A-Za-z0-9_-]", "-", model.rstrip("/").rpartition("/")[2]).lstrip("-") or "expert"
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names
