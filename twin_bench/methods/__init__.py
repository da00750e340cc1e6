"""Merge methods: one file each, found by name.

A method is a function `(vectors: TaskVectors, *, options) -> mapping` under `@merge_method(...)`; its name,
its docstring's first line and its keyword defaults are the header. To add one, add a file to this folder.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from twin_bench.errors import InputError, nearest
from twin_bench.task_vectors import TaskVectors

Track = Literal["bound", "data-free", "calibration", "test-time", "routed", "task-id given"]
MergeFunction = Callable[..., Mapping[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A merge method's header: what a table or a catalogue says of it.

    `needs` lists what it takes beyond weights ("seed", "task ids of training inputs", ...); `defaults` maps
    its options to their defaults; `function` is None where the result is no single set of parameters.
    """

    name: str
    title: str
    paper: str
    track: Track
    needs: tuple[str, ...]
    defaults: Mapping[str, Any]
    function: MergeFunction | None

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


_registry: dict[str, Method] = {}


def merge_method(
    *, title: str, paper: str, track: Track, needs: tuple[str, ...] = ()
) -> Callable[[MergeFunction], MergeFunction]:
    """Register the decorated function as the merge method of its own name."""

    def register(function: MergeFunction) -> MergeFunction:
        options = inspect.signature(function).parameters.values()
        defaults = {option.name: option.default for option in options if option.kind is option.KEYWORD_ONLY}
        _register(Method(function.__name__, title, paper, track, needs, MappingProxyType(defaults), function))
        return function

    return register


def unmerged_method(
    name: str, *, title: str, paper: str, track: Track, needs: tuple[str, ...] = (), **defaults: Any
) -> None:
    """Register a method whose result is no single set of parameters (the experts themselves, a twin)."""
    _register(Method(name, title, paper, track, needs, MappingProxyType(defaults), None))


def methods() -> Mapping[str, Method]:
    """Return every method's header by name, bounds first, then by track and name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
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
    header = find_method(method)
    if header.function is None:
        raise InputError(f"{method} is no single set of parameters: serve it as a twin (twin-bench build)")
    for option, value in params.items():
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
            kept fraction, `seed` where one draws.

    Returns:
        Every name of `base`, in `base`'s dtypes; sums are taken in float32 or better.

    Raises:
        InputError: unknown method or option, a tensor that an expert lacks or has in another shape, an
            option out of its range.
    """
    return dict(merge_lazily(method, base, experts, **params).items())


def require_fraction(method: str, option: str, value: float) -> None:
    """Raise an InputError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise InputError(f"{method}: {option} must be in (0, 1], not {value}")


def _register(method: Method) -> None:
    if method.name in _registry:
        raise ValueError(f"two merge methods are named {method.name}")
    _registry[method.name] = method
