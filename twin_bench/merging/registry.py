"""Merge methods: one file each, found by name.

A method is a function `(vectors: TaskVectors, *, options) -> mapping` under `@merge_method(...)`; its name,
its docstring's first line and its keyword defaults are the header. A keyword without a default is no option but
something that a merge must be given: `task`, by a method whose result is one set of parameters a task;
`statistics` of training inputs, by one that needs them. To add a method, add a file to this folder.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from twin_bench.checkpoints.finite import require_finite
from twin_bench.errors import InputError, nearest
from twin_bench.merging.task_vectors import TaskVectors

Track = Literal["bound", "data-free", "calibration", "test-time", "routed", "task-id given"]
MergeFunction = Callable[..., Mapping[str, Tensor]]
Statistics = Mapping[str, Mapping[str, Tensor]]
"""Expert to parameter name to a tensor that training inputs gave: see `twin_bench.merging.calibration`."""
StatisticsKind = Literal["fisher", "gram"]
SCALINGS: Mapping[str, Sequence[float]] = MappingProxyType({"scaling": (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)})
"""The grid of a method whose lambda the paper searches."""


@dataclass(frozen=True)
class Method:
    """A merge method's header: what a table or a catalogue says of it.

    `needs` lists what it takes beyond weights ("seed", "task ids of training inputs", ...); `defaults` maps
    its options to their defaults, `inputs` names what it must be given besides; `function` is None where the result is
    no single set of parameters, or is learnt with the model at hand. `stored` returns how many parameters are stored
    for a model of so many, so many experts and so many bits a parameter; None where it is the model alone. `statistics`
    says which are its `statistics`; `tune` lists the values that a leaderboard's --tune chooses an option from. One
    with an option `merge` builds on the method which that names, and takes its options as well.
    """

    name: str
    title: str
    paper: str
    track: Track
    needs: tuple[str, ...]
    defaults: Mapping[str, Any]
    function: MergeFunction | None
    inputs: tuple[str, ...] = ()
    stored: Callable[[int, int, int], int] | None = None
    statistics: StatisticsKind | None = None
    tune: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def given(self, options: Mapping[str, Any]) -> Method:
        """Return the header for these options: with those of the method that `merge` names, where this builds on one.

        Raises InputError where `merge` names no other data-free method.
        """
        if "merge" not in self.defaults:
            return self
        inner = find_method(str(options.get("merge", self.defaults["merge"])))
        if inner.function is None or inner.track != "data-free" or "merge" in inner.defaults:
            raise InputError(f"{self.name}: merge must be a data-free method that builds on no other, not {inner.name}")
        return replace(self, needs=self.needs + inner.needs, defaults={**inner.defaults, **self.defaults})

    def seeded(self, seed: int) -> dict[str, Any]:
        """Return the defaults, `seed` among them where the method draws."""
        return {**self.defaults, **({"seed": seed} if "seed" in self.defaults else {})}

    def check(self, option: str, value: Any) -> None:
        """Raise an InputError unless the method has this option and `value` is of its default's kind."""
        if option not in self.defaults:
            raise InputError(f"{self.name} has no option {option!r}{nearest(option, self.defaults)}")
        if isinstance(self.defaults[option], int | float) and (
            isinstance(value, bool) or not isinstance(value, int | float)
        ):
            raise InputError(f"{self.name}: {option} must be a number, not {value!r}")

    def check_inputs(self, experts: Collection[str], given: Mapping[str, Any]) -> None:
        """Raise an InputError unless what the method must be given is there, for these experts."""
        if "task" in self.inputs and given.get("task") not in experts:
            asked = f"not {given['task']!r}; " if "task" in given else ""
            raise InputError(
                f"{self.name} has one set of parameters a task: say which with task=, {asked}known: "
                f"{', '.join(sorted(experts))}"
            )
        lacking = [task for task in experts if task not in (given.get("statistics") or {})]
        if "statistics" in self.inputs and lacking:
            raise InputError(
                f"{self.name} needs statistics of training inputs, those of expert {lacking[0]!r} are missing: give "
                "statistics={task: {parameter: tensor}}, which twin_bench.merging.calibration computes"
            )


_registry: dict[str, Method] = {}


def merge_method(
    *,
    title: str,
    paper: str,
    track: Track,
    needs: tuple[str, ...] = (),
    stored: Callable[[int, int, int], int] | None = None,
    statistics: StatisticsKind | None = None,
    tune: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> Callable[[MergeFunction], MergeFunction]:
    """Register the decorated function as the merge method of its own name."""

    def register(function: MergeFunction) -> MergeFunction:
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        defaults = MappingProxyType({p.name: p.default for p in keywords if p.default is not p.empty})
        inputs = tuple(p.name for p in keywords if p.default is p.empty)
        name = function.__name__
        _register(Method(name, title, paper, track, needs, defaults, function, inputs, stored, statistics, tune))
        return function

    return register


def unmerged_method(
    name: str, *, title: str, paper: str, track: Track, needs: tuple[str, ...] = (), **defaults: Any
) -> None:
    """Register a method that is more than a merge of weights: the experts themselves, a twin, test-time learning."""
    _register(Method(name, title, paper, track, needs, MappingProxyType(defaults), None))


def methods() -> Mapping[str, Method]:
    """Return every method's header by name, bounds first, then by track and name."""
    for package in ("twin_bench.merging.methods", "twin_bench.adaptive"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
    tracks = list(Track.__args__)  # type: ignore[attr-defined]
    ordered = sorted(_registry.values(), key=lambda method: (tracks.index(method.track), method.name))
    return MappingProxyType({method.name: method for method in ordered})


def find_method(name: str) -> Method:
    """Return the header of method `name`; an unknown name is an InputError with the nearest one."""
    known = methods()
    if name not in known:
        raise InputError(f"unknown merge method {name!r}{nearest(name, known)}")
    return known[name]


def merge_lazily(
    method: str, base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], **params: Any
) -> Mapping[str, Tensor]:
    """As `merge`, but each parameter is computed when it is read: memory for some 2 (T + 2) of the largest, float32."""
    header = find_method(method).given(params)
    if header.function is None:
        raise InputError(
            f"{method} is no merge of weights alone: run it in a suite (python -m twin_bench.leaderboard), or, a twin, "
            "build it (twin-bench build)"
        )
    header.check_inputs(experts, params)
    for option, value in params.items():
        if option not in header.inputs:
            header.check(option, value)
    return header.function(TaskVectors(base, experts), **params)


def merge(
    method: str, base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], **params: Any
) -> dict[str, Tensor]:
    """Merge experts into one set of parameters.

    Args:
        method: a name from `methods()`.
        base: the pretrained model theta_0, parameter name to tensor.
        experts: task to the fine-tuned model's mapping over the same names.
        **params: the method's options (`methods()[method].defaults`); `scaling` is lambda, `density` the
            kept fraction, `seed` where one draws; and what it must be given (`methods()[method].inputs`):
            `task`, where each task has parameters of its own; `statistics`, where it takes those.

    Returns:
        Every name of `base`, in `base`'s dtypes; sums are taken in float32 or better.

    Raises:
        InputError: unknown method or option, an input that is missing, a tensor that an expert lacks or has in
            another shape, an option out of its range.
    """
    return dict(merge_lazily(method, base, experts, **params).items())


def require_fraction(method: str, option: str, value: float) -> None:
    """Raise an InputError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise InputError(f"{method}: {option} must be in (0, 1], not {value}")


def statistics_of(method: str, statistics: Statistics, task: str, name: str, shape: torch.Size) -> Tensor:
    """Return one tensor of an expert's statistics; InputError where it is missing, misshapen or not finite."""
    if name not in statistics[task]:
        raise InputError(f"{method}: the statistics of expert {task!r} have no {name}; compute them on this model")
    tensor = require_finite(statistics[task][name], name, f"{method}: statistics of expert {task!r}")
    if tensor.shape != shape:
        raise InputError(
            f"{method}: the statistics of expert {task!r} have {name} as {tuple(tensor.shape)}, not {tuple(shape)}; "
            "compute them on this model"
        )
    return tensor


def _register(method: Method) -> None:
    if method.name in _registry:
        raise ValueError(f"two merge methods are named {method.name}")
    _registry[method.name] = method
