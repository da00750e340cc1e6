"""The registry of methods: their headers, and how a method is found by its name.

There are two kinds of method. A `MergeMethod` is a function of weights: a file in `twin_bench/merging/methods/` with
`@merge_method(...)` above a function `(vectors: TaskVectors, *, options) -> mapping`. A `ServedMethod` is a function
that yields models: `@served_method(...)` above a generator `(context, *, options)`, see `twin_bench.contenders`. In
both cases the function's name is the method's name, its docstring is the documentation, and its keyword defaults are
the options. Modules that register methods are found by the entry-point group `twin_bench.methods`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import Size, Tensor

from twin_bench.config import LARGEST_SEED
from twin_bench.errors import InputError, named, nearest, shown
from twin_bench.files import digest_code
from twin_bench.merging.plugins import load_methods
from twin_bench.protocols import PROTOCOLS, TRACKS, ProtocolName, Track

Sight = Literal["training rows", "scored rows", "task"]
"""What a method sees beside weights: training rows, the scored rows without their labels, or the true task."""
MergeFunction = Callable[..., Mapping[str, Tensor]]
ServeFunction = Callable[..., Iterator[Any]]
CheckFunction = Callable[..., None]
StoredFunction = Callable[[Sequence[Size], int, int], int]
"""A function (shapes of a model's tensors, experts, bytes of a number) -> bytes that are kept, without heads."""
Statistics = Mapping[str, Mapping[str, Tensor]]
"""Expert to parameter name to a tensor computed from training inputs: see `twin_bench.merging.calibration`."""
StatisticsKind = Literal["fisher", "gram"]
SCALINGS: Mapping[str, Sequence[float]] = MappingProxyType({"scaling": (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)})
"""The grid of a method whose paper searches lambda."""


@dataclass(frozen=True)
class Method:
    """A method's header: what tables and the catalogue say about it, and what it may see.

    `needs` lists in words what the method takes beside weights. `sees` says the same in fixed terms, for keys and
    tables. `defaults` maps options to their defaults. `protocols` are those under which the method runs. `tune` lists
    the values from which a leaderboard's --tune chooses an option. `origin` is where the method is defined.
    """

    name: str
    title: str
    paper: str
    track: Track
    needs: tuple[str, ...]
    defaults: Mapping[str, Any]
    documentation: str
    origin: str
    sees: frozenset[Sight] = frozenset()
    protocols: tuple[ProtocolName, ...] = ("standard",)
    tune: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def identity(self) -> list[str]:
        """What stands for the method in a key.

        It is the name. A method of another package has the digest of its module's file besides, since no format number
        of ours is raised when its code changes.
        """
        return [self.name, *digest_code(self.origin.rpartition(".")[0])]

    @property
    def formula(self) -> str:
        """The documentation's first paragraph, in one line."""
        return self.documentation.partition("\n\n")[0].replace("\n", " ")

    def seeded(self, seed: int) -> dict[str, Any]:
        """Return the defaults, with `seed` where the method draws."""
        return {**self.defaults, **({"seed": seed} if "seed" in self.defaults else {})}

    def given(self, options: Mapping[str, Any]) -> Method:
        """Return the header for these options. A method that builds on another method also has its options."""
        return self

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options as plain data. Raises InputError for an unknown option or a value of the wrong kind."""
        return {option: self._settled(option, value) for option, value in options.items()}

    def _settled(self, option: str, value: Any) -> Any:
        """Return an option's value. InputError unless the option is known, and the value finite and of its kind.

        Where the default is a whole number, which is a count or a seed, the value is one as well, 0 or more. A float
        such as 3.0 becomes an int there.
        """
        if option not in self.defaults:
            raise InputError(f"{self.name} has no option {option!r}{nearest(option, self.defaults)}")
        default = self.defaults[option]
        text = isinstance(default, str)
        if isinstance(default, int | float | str) and not (_is_number(value) or (text and isinstance(value, str))):
            raise InputError(f"{self.name}: {option} must be a number{' or a text' * text}, not {shown(value)}")
        if not isinstance(default, int):
            return value
        if value != int(value) or not 0 <= value <= LARGEST_SEED:
            raise InputError(f"{self.name}: {option} must be a whole number, 0 or more, not {shown(value)}")
        return int(value)

    def track_of(self, options: Mapping[str, Any]) -> Track:
        """Return the track for these options."""
        return self.track

    def draws(self, options: Mapping[str, Any]) -> bool:
        """Return whether the method draws with these options, so that its scores depend on the seed."""
        return "seed" in self.needs or "seed" in self.defaults

    def runs_under(self, protocol: ProtocolName, options: Mapping[str, Any]) -> bool:
        """Return whether the method runs under a protocol."""
        return protocol in self.protocols

    def require_weights_alone(self) -> None:
        """Raise an InputError unless the method merges weights and needs nothing else."""
        raise InputError(
            f"{self.name} is not a static merge method; run it in a suite, or give another: average, ties, ..."
        )


@dataclass(frozen=True, kw_only=True)
class MergeMethod(Method):
    """A method that merges weights into one set of parameters, or into one set for each task.

    `function` computes it. `inputs` names what a caller must pass beside weights: `task`, if each task has its own
    parameters, or `statistics` of the kind that the field `statistics` names. `stored` computes the bytes that are
    stored, heads not counted, from the shapes of the model's tensors, the number of experts and the bytes of a number
    (see `StoredFunction`). It is None if only the merged model is stored.
    """

    function: MergeFunction
    inputs: tuple[str, ...] = ()
    statistics: StatisticsKind | None = None
    stored: StoredFunction | None = None

    def given(self, options: Mapping[str, Any]) -> MergeMethod:
        """Return the header for these options, with the options and the grid of the method that `merge` names, if any.

        Raises InputError if `merge` does not name another data-free method.
        """
        if "merge" not in self.defaults:
            return self
        inner = find_method(str(options.get("merge", self.defaults["merge"])))
        if not isinstance(inner, MergeMethod) or inner.track != "data-free" or "merge" in inner.defaults:
            raise InputError(f"{self.name}: merge must be a data-free method that builds on no other, not {inner.name}")
        defaults = {**inner.defaults, **self.defaults}
        return replace(self, needs=self.needs + inner.needs, defaults=defaults, tune={**inner.tune, **self.tune})

    def require_weights_alone(self) -> None:
        """Raise an InputError if the method needs more than weights."""
        if self.inputs:
            raise InputError(
                f"{self.name} needs {self.inputs[0]}, and a recipe merges weights alone; run it in a suite"
            )

    def check_inputs(self, experts: Collection[str], given: Mapping[str, Any]) -> None:
        """Raise an InputError unless `given` holds every input that the method needs, for these experts."""
        if "task" in self.inputs and given.get("task") not in experts:
            asked = f"not {given['task']!r}; " if "task" in given else ""
            raise InputError(
                f"{self.name} has one set of parameters for each task: name the task with task=, {asked}known: "
                f"{', '.join(sorted(experts))}"
            )
        lacking = [task for task in experts if task not in (given.get("statistics") or {})]
        if "statistics" in self.inputs and lacking:
            raise InputError(
                f"{self.name} needs statistics of training inputs, and those of expert {lacking[0]!r} are missing: "
                "pass statistics={task: {parameter: tensor}}, which twin_bench.merging.calibration computes"
            )


@dataclass(frozen=True, kw_only=True)
class ServedMethod(Method):
    """A method that is more than a merge of weights: `serve(context, **options)` yields the contenders that it enters.

    Examples are the experts themselves, a twin, and methods that learn or route at test time.
    `check_options(context, **options)` raises an InputError for an option out of its range, before any model is loaded.
    """

    serve: ServeFunction
    check_options: CheckFunction | None = None


REGISTRY: dict[str, Method] = {}
"""The registered methods by name. `methods` first imports the modules that register them."""


def merge_method(
    *,
    title: str,
    paper: str,
    track: Track,
    needs: tuple[str, ...] = (),
    stored: StoredFunction | None = None,
    statistics: StatisticsKind | None = None,
    tune: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> Callable[[MergeFunction], MergeFunction]:
    """Register the decorated function `(vectors, *, options)` as the merge method of its own name.

    A keyword without a default is not an option but an input that a caller must pass: `task`, if each task has its own
    parameters, or `statistics` of training inputs, of the kind that `statistics` names.
    """

    def decorate(function: MergeFunction) -> MergeFunction:
        defaults, inputs = _keywords(function)
        sees: set[Sight] = {*(("training rows",) if statistics else ()), *(("task",) if "task" in inputs else ())}
        register(
            MergeMethod(
                *_header(function, title, paper, track, needs, defaults),
                frozenset(sees),
                PROTOCOLS if track == "bound" else ("standard", "paper"),
                tune,
                function=function,
                inputs=inputs,
                statistics=statistics,
                stored=stored,
            )
        )
        return function

    return decorate


def served_method(
    *,
    title: str,
    paper: str,
    track: Track,
    needs: tuple[str, ...] = (),
    sees: tuple[Sight, ...] = (),
    protocols: tuple[ProtocolName, ...] = ("standard",),
    check_options: CheckFunction | None = None,
    kind: type[ServedMethod] = ServedMethod,
) -> Callable[[ServeFunction], ServeFunction]:
    """Register the decorated generator `(context, *, options)` as the method of its own name.

    It yields `twin_bench.contenders.Contender`s. `check_options` takes the same arguments. `kind` is a subclass of
    ServedMethod for a method whose options are not single values.
    """

    def decorate(function: ServeFunction) -> ServeFunction:
        defaults, _ = _keywords(function)
        header = _header(function, title, paper, track, needs, defaults)
        register(kind(*header, frozenset(sees), protocols, serve=function, check_options=check_options))
        return function

    return decorate


def register(method: Method) -> None:
    """Add a method to the registry.

    Raises InputError if another method has the same name, or the track is unknown. Loading the same module twice is
    not an error.
    """
    if method.track not in TRACKS:
        raise InputError(f"method {method.name}: unknown track {method.track!r}{nearest(method.track, TRACKS)}")
    known = REGISTRY.get(method.name)
    if known is not None and known.origin != method.origin:
        raise InputError(f"two methods are named {method.name}: in {known.origin} and {method.origin}; rename one")
    REGISTRY[method.name] = method


def methods() -> Mapping[str, Method]:
    """Return the headers of all methods by name, ordered by track (bounds first) and name."""
    load_methods()
    ordered = sorted(REGISTRY.values(), key=lambda method: (TRACKS.index(method.track), method.name))
    return MappingProxyType({method.name: method for method in ordered})


def find_method(name: str) -> Method:
    """Return the header of method `name`. Raises an InputError that suggests the nearest name if it is unknown."""
    return named(name, methods(), "merge method")


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite number that float32 and int64 hold. True and False are none."""
    largest = LARGEST_SEED if isinstance(value, int) else 3e38
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def require_fraction(method: str, option: str, value: float) -> None:
    """Raise an InputError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise InputError(f"{method}: {option} must be in (0, 1], not {value}")


def method_header(function: Callable[..., Any], *, title: str, track: Track) -> dict[str, Any]:
    """Return the first fields of a `Method` that has no paper and no options, by name."""
    names = [field.name for field in fields(Method)]
    return dict(zip(names, _header(function, title, "", track, (), {}), strict=False))


def _keywords(function: Callable[..., Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return a function's keyword defaults, which are its options, and the names of the keywords without a default."""
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    defaults = {p.name: p.default for p in keywords if p.default is not p.empty}
    plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in defaults.items()}
    return MappingProxyType(plain), tuple(p.name for p in keywords if p.default is p.empty)


def _header(
    function: Callable[..., Any],
    title: str,
    paper: str,
    track: Track,
    needs: tuple[str, ...],
    defaults: Mapping[str, Any],
) -> tuple[str, str, str, Track, tuple[str, ...], Mapping[str, Any], str, str]:
    """Return the first fields of a function's header."""
    origin = f"{function.__module__}.{function.__qualname__}"
    return function.__name__, title, paper, track, needs, defaults, inspect.getdoc(function) or "", origin
