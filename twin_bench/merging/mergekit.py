"""mergekit's YAML, read if twin-bench has a method of the same meaning. Anything else is an error that says so.

These methods give the same result up to rounding (sums are taken in float32 here, in `dtype` in mergekit):

- `linear` with equal weights is `average`.
- `task_arithmetic` with equal weights is `task_arithmetic`. Its scaling is lambda times the weight, or lambda / T under
  `normalize: true`.
- `slerp` is `slerp`, and `model_stock` is `model_stock`.
- `nuslerp` is `nuslerp`, `multislerp` with equal weights is `multislerp`, `karcher` is `karcher`, `sce` is `sce` and
  `ram` is `ram`. The first two take the experts' weights in the place of their task vectors if no base model is named.

These are the same method with other arithmetic. `from_mergekit` describes the difference in one line:

- `ties`: mergekit trims each tensor separately to `density`. Here the trimming is over the whole model, as in the
  paper. With `normalize: true`, mergekit's default, the rest is the same: the mean of the entries that agree. If the
  sum of an entry is exactly 0, mergekit keeps its positive values; here the entry is dropped.
- `dare_linear` and `dare_ties`: other entries are drawn, because the random generators differ. Kept entries are
  rescaled by 1 / density here, as in the paper. Recent versions of mergekit rescale each tensor to its former L1 norm.
- `breadcrumbs`: mergekit drops all entries of a tensor of fewer than 1 / gamma entries, and drops fewer outliers if
  gamma + density is more than 1. Here the largest entries are kept, and outliers are always dropped.
- `della`: other entries are drawn. Kept entries are divided by their probability here, as in the paper. mergekit
  restores each tensor's norm.

mergekit's `dare_ties`, like every election without `normalize: true`, takes the *sum* of the entries that agree. No
method here does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from twin_bench.config import Dtype, Settings, locate, parse
from twin_bench.errors import InputError, nearest, shown
from twin_bench.merging.recipe import MergeRecipe
from twin_bench.merging.registry import methods


@dataclass(frozen=True)
class Counterpart:
    """The method that a mergekit method corresponds to here.

    `mixes` is how mergekit combines the models: by their weighted sum; by an election and the mean or sum of the
    entries that agree; by their weighted mean; at a point of the arc between two that their weights give; or without
    weights of models. `base` is the part of the base model: the origin of the task vectors, which must be named, or
    may be left out and is 0 then; one end of an arc; a model like the others, which may be left out, or must be.
    `of_each` holds the parameters that mergekit reads for each model (beside the weight), with mergekit's defaults.
    `of_all` holds those that it reads once; None is no default. `normalize` is mergekit's default of `normalize_key`.
    `difference` says what is computed differently here.
    """

    method: str
    mixes: Literal["sum", "election", "mean", "arc", "unweighted"]
    base: Literal["origin", "optional origin", "end", "alike", "refused"] = "origin"
    normalize: bool = False
    normalize_key: str = "normalize"
    of_each: Mapping[str, float] = field(default_factory=dict)
    of_all: Mapping[str, float | None] = field(default_factory=dict)
    difference: str = ""


_DRAWS = (
    "draws other entries than mergekit and rescales them by 1 / density, while recent mergekit restores each tensor's "
    "L1 norm"
)
COUNTERPARTS = {
    "linear": Counterpart("average", "mean", base="alike", normalize=True),
    "task_arithmetic": Counterpart("task_arithmetic", "sum"),
    "ties": Counterpart(
        "ties",
        "election",
        normalize=True,
        of_each={"density": 1.0},
        difference="trims over the whole model, as the paper does, while mergekit trims each tensor separately",
    ),
    "dare_linear": Counterpart("dare_task_arithmetic", "sum", of_each={"density": 1.0}, difference=_DRAWS),
    "dare_ties": Counterpart("dare_ties", "election", of_each={"density": 1.0}, difference=_DRAWS),
    "breadcrumbs": Counterpart(
        "breadcrumbs",
        "sum",
        of_each={"density": 1.0, "gamma": 0.01},
        difference="keeps the largest entries of small tensors, which mergekit empties",
    ),
    "della": Counterpart(
        "della",
        "election",
        normalize=True,
        of_each={"density": 1.0, "epsilon": 0.15},
        difference="draws other entries than mergekit",
    ),
    "slerp": Counterpart("slerp", "unweighted", base="end", of_all={"t": None}),
    "nuslerp": Counterpart("nuslerp", "arc", base="optional origin"),
    "multislerp": Counterpart(
        "multislerp", "mean", base="optional origin", normalize=True, normalize_key="normalize_weights"
    ),
    "karcher": Counterpart("karcher", "unweighted", base="refused", of_all={"max_iter": 10, "tol": 1e-5}),
    "model_stock": Counterpart("model_stock", "unweighted"),
    "sce": Counterpart("sce", "unweighted", of_all={"select_topk": 1.0}),
    "ram": Counterpart("ram", "unweighted", of_all={"epsilon": 1e-5}),
}

_REFUSED = {
    "slices": "layers of several models can't be stacked here; give whole models under models, or use mergekit",
    "modules": "parts of a model can't be merged separately here; give whole models under models, or use mergekit",
    "tokenizer": "the result has the base model's tokenizer; remove the key, or use mergekit",
    "chat_template": "the result has the base model's template; remove the key and set the template afterwards",
    "int8_mask": "masks are not kept in memory here, so the key has no effect; remove it",
    "rescale": "each method here determines whether it rescales; remove the key",
    "filter_wise": "angles are taken over whole tensors here; remove the key, or use mergekit",
    "nuslerp_flatten": "angles are taken over whole tensors here; remove the key, or use mergekit",
    "nuslerp_row_wise": "angles are taken over whole tensors here; remove the key, or use mergekit",
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
    """Return the merge recipe that a mergekit configuration corresponds to, and what is computed differently here.

    Raises:
        InputError: a method or key without a counterpart, weights or other parameters that differ between models,
            layer-wise lists, LoRA notation (MODEL+LORA). No key is ignored.
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
        differences.append(f"takes sums in float32, while mergekit takes them in {config.dtype}")
    said = f"{file}: {counterpart.method} here {' and '.join(differences)}" if differences else ""
    return parse(MergeRecipe, recipe, str(file)), said


class _Parameters:
    """The models and parameters of a mergekit file, checked one by one."""

    def __init__(self, config: _Configuration, counterpart: Counterpart, file: Path) -> None:
        self._config = config
        self._counterpart = counterpart
        self._file = file
        name = config.merge_method
        if config.base_model is None and counterpart.base in ("origin", "end"):
            raise InputError(f"{file}: base_model: {name} needs one; name it")
        if config.base_model is not None and counterpart.base == "refused":
            raise InputError(
                f"{file}: base_model: {name} takes all models alike, and this one with them in some versions of "
                "mergekit; remove the key, and list the model under models to merge it"
            )
        self.base = config.base_model or config.models[0].model
        # One that is alike is merged like any other model; slerp lists both ends of its arc.
        with_base = counterpart.base in ("alike", "end") or config.base_model is None
        self.experts = [entry for entry in config.models if with_base or entry.model != self.base]
        if counterpart.base == "end":
            self.experts.sort(key=lambda entry: entry.model != self.base)
            if len(self.experts) != 2 or self.experts[0].model != self.base:
                raise InputError(f"{file}: models: {name} takes two, one of them the base_model")
        if not self.experts:
            raise InputError(f"{file}: models: only the base model is listed; add the models to merge")
        weighted = {"weight"} if counterpart.mixes != "unweighted" else set()
        self._of_each = weighted | counterpart.of_each.keys()
        summed = {"lambda"} if counterpart.mixes in ("sum", "election") else set()
        normalised = {counterpart.normalize_key} if weighted and counterpart.mixes != "arc" else set()
        self._check_keys("parameters", config.parameters, self._of_each | summed | normalised | {*counterpart.of_all})
        if counterpart.mixes == "arc" and len(self.experts) != 2:
            raise InputError(f"{file}: models: {name} takes two beside the base_model, not {len(self.experts)}")
        for index, entry in enumerate(config.models):
            if "+" in entry.model:
                raise InputError(
                    f"{file}: models.{index}.model: {entry.model}: name the adapter alone, without the base"
                )
            if entry.parameters and entry not in self.experts:
                raise InputError(f"{file}: models.{index}.parameters: the base model's have no effect; remove them")
            self._check_keys(f"models.{index}.parameters", entry.parameters, self._of_each)

    def options(self) -> dict[str, Any]:
        """Return the options of our method."""
        counterpart, name = self._counterpart, self._config.merge_method
        options: dict[str, Any] = {}
        for key, default in counterpart.of_each.items():
            options[key] = self._of_every_expert(key, default)
        for key, otherwise in counterpart.of_all.items():
            options[key] = self._of_all(key, otherwise)
        if counterpart.base == "optional origin":
            options["origin"] = "base" if self._config.base_model else "zero"
        if counterpart.mixes == "unweighted":
            return options
        if counterpart.mixes == "arc":
            first, second = self._of_experts("weight")
            return {**options, "t": second / (first + second) if abs(first + second) >= 1e-6 else 0.5}
        weight = self._of_every_expert("weight")
        normalize = self._normalize()
        count = len(self.experts)
        if counterpart.mixes == "sum":
            return {**options, "scaling": self._of_all("lambda", 1.0) * (1 / count if normalize else weight)}
        if counterpart.mixes == "election" and not normalize:
            raise InputError(
                f"{self._file}: normalize: without it {name} takes the sum of the entries that agree, and twin-bench "
                "takes their mean; set normalize: true, or use mergekit"
            )
        if counterpart.mixes == "mean" and not normalize and abs(weight * count - 1) > 1e-6:
            key = counterpart.normalize_key
            raise InputError(f"{self._file}: {key}: the weights don't sum to 1; set {key}: true, or use mergekit")
        if weight <= 0:
            raise InputError(f"{self._file}: weight: {weight} leaves nothing to average; give a positive one")
        return options if counterpart.mixes == "mean" else {**options, "scaling": self._of_all("lambda", 1.0)}

    def _check_keys(self, where: str, given: Mapping[str, Any], known: set[str]) -> None:
        for key, value in given.items():
            if key in _REFUSED:
                raise InputError(f"{self._file}: {where}.{key}: {_REFUSED[key]}")
            if key not in known:
                raise InputError(f"{self._file}: {where}.{key}: has no counterpart here{nearest(key, known)}")
            if isinstance(value, list | dict):
                raise InputError(f"{self._file}: {where}.{key}: differs between layers or tensors; give one number")
            boolean = key == self._counterpart.normalize_key
            if isinstance(value, bool) != boolean or not isinstance(value, int | float) or not abs(value) < math.inf:
                wanted = "true or false" if boolean else "a number"
                raise InputError(f"{self._file}: {where}.{key}: must be {wanted}, not {shown(value)}")

    def _of_every_expert(self, key: str, default: float | None = None) -> float:
        """Return a parameter that is equal for all experts."""
        values = self._of_experts(key, default)
        if len(set(values)) > 1:
            raise InputError(
                f"{self._file}: {key}: {', '.join(map(str, values))} differ; twin-bench has one for all experts: give "
                "one value, or use mergekit"
            )
        return values[0]

    def _of_experts(self, key: str, default: float | None = None) -> list[float]:
        """Return a parameter of each expert: a model's own value, the file's, or mergekit's default."""
        fallback = self._config.parameters.get(key, default)
        values: list[Any] = [entry.parameters.get(key, fallback) for entry in self.experts]
        if None in values:
            raise InputError(f"{self._file}: {key}: missing for {self.experts[values.index(None)].model}; give it")
        return values

    def _of_all(self, key: str, default: float | None = None) -> float:
        value: float | None = self._config.parameters.get(key, default)
        if value is None:
            raise InputError(f"{self._file}: parameters.{key}: {self._config.merge_method} needs it; give it")
        return value

    def _normalize(self) -> bool:
        return bool(self._config.parameters.get(self._counterpart.normalize_key, self._counterpart.normalize))


def _names(models: Sequence[str]) -> list[str]:
    """Return a name for each expert: the last part of its path. A number is appended to a name that is taken."""
    names: list[str] = []
    for model in models:
        name = re.sub(r"[^A-Za-z0-9_-]", "-", model.rstrip("/").rpartition("/")[2]).lstrip("-") or "expert"
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names
