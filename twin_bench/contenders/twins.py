"""Twins on the leaderboard: build a twin from a suite's entry, keep it, and make a contender of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from twin_bench.config import Settings, parse
from twin_bench.contenders.context import Contender, Context
from twin_bench.contenders.storage import bytes_of, twin_bytes
from twin_bench.data.classification import labels_of
from twin_bench.data.rows import RouterRows, read_router_rows, router_rows
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.files import digest, read_record, write_record
from twin_bench.locks import made_by_one
from twin_bench.measured import Meter, Taken
from twin_bench.merging.recipe import Shared
from twin_bench.merging.registry import MergeMethod, ServedMethod, find_method, served_method
from twin_bench.merging.rehearsal import rehearse_merge
from twin_bench.protocols import PROTOCOLS, ProtocolName, Track
from twin_bench.twin.builder import build_twin, check_limits
from twin_bench.twin.directory import load_twin, read_manifest
from twin_bench.twin.exclusive import find_kind
from twin_bench.twin.model import twin_class
from twin_bench.twin.recipe import ExclusiveSettings, Recipe, RouterSettings
from twin_bench.twin.routers.limits import check_rows
from twin_bench.twin.routers.rows import require_two
from twin_bench.twin.shared import merge_options

SUITE_ROWS = "the suite's training rows"
"""A suite's recipe has it in place of `router.data`."""
TWIN_FORMAT = 4
"""It is raised when the same recipe builds another twin."""
DEFAULT_EXCLUSIVE = MappingProxyType({"density": 0.1})
"""The exclusive vectors of a twin without settings of its own."""
BUILD_FORMAT = 2
"""The format of the record of what a build took."""


class RoutedOptions(Settings):
    """The options of an entry with a router: those that decide what the router reads, and its own."""

    shared: Shared = Field(default_factory=Shared)
    router: dict[str, Any] = Field(default_factory=dict)


class TwinOptions(RoutedOptions):
    """A twin entry's options: those of a recipe, and which weights fuse the twin.

    `weights: task` gives every row the exclusive vector of its true task. It needs no router. It is the upper limit of
    every router, and it is on the track "task-id given".
    `without` names an expert that has no part in the twin: the rows of its tasks are those of no expert.
    """

    exclusive: ExclusiveSettings = ExclusiveSettings(density=0.1)
    weights: Literal["router", "task"] = "router"
    without: str | None = None

    @model_validator(mode="after")
    def _in_effect(self) -> TwinOptions:
        """Refuse keys that would change nothing beside the others."""
        if self.weights == "task" and self.router.get("fallback"):
            raise InputError("router.fallback: with weights: task no router decides; leave out one of them")
        if self.weights == "task" and self.without is not None:
            raise InputError("without: with weights: task its own rows would have no weights; leave out one of them")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what came later unless it is set: digests of settings that lack it stay what they were."""
        dumped: dict[str, Any] = serialise(self)
        return {key: value for key, value in dumped.items() if key != "without" or value is not None}


def checked_options(kind: type[RoutedOptions], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as plain data, defaults included. An InputError names the key that is wrong."""
    settings = parse(kind, dict(options))
    if "data" in settings.router:  # its rows would be in no key
        raise InputError("router.data: all routers of a suite read the same rows; give router at the suite's top")
    parse(RouterSettings, {"data": "", **settings.router}, "router")
    return settings.model_dump(mode="json")


@dataclass(frozen=True, kw_only=True)
class TwinMethod(ServedMethod):
    """The header of twins, whose options are groups of settings."""

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options as plain data, defaults included. An InputError names the key that is wrong."""
        return checked_options(TwinOptions, options)

    def track_of(self, options: Mapping[str, Any]) -> Track:
        """Return the track. A twin that is given the task is not on the routers' track."""
        return "task-id given" if options.get("weights") == "task" else self.track

    def draws(self, options: Mapping[str, Any]) -> bool:
        """Return whether router, exclusive vectors or shared expert depend on the seed."""
        twin = parse(TwinOptions, dict(options))
        shared = find_method(twin.shared.method)
        exclusive = twin.exclusive.random or find_kind(twin.exclusive.kind).draws
        return twin.weights == "router" or exclusive or shared.draws(shared.defaults)

    def runs_under(self, protocol: ProtocolName, options: Mapping[str, Any]) -> bool:
        """Return whether a twin runs under a protocol: `routed` asks a router what `weights: task` tells."""
        return protocol != "routed" or options.get("weights") != "task"


def check_twin(
    context: Context,
    *,
    shared: Mapping[str, Any],
    exclusive: Mapping[str, Any],
    router: Mapping[str, Any],
    weights: str,
    without: str | None = None,
) -> None:
    """Raise an InputError for a router, a window or options of the shared expert that these experts do not allow."""
    recipe = _recipe(context, shared, exclusive, router, without)
    check_limits(recipe, context.sources)
    method = find_method(recipe.shared.method)
    if isinstance(method, MergeMethod):
        rehearse_merge(method, merge_options(recipe), tuple(recipe.experts))


def check_router_rows(context: Context, rows: RouterRows) -> None:
    """Raise an InputError if the router of a twin, with the context's settings, can't be made from a suite's rows.

    `rows` are those of all experts, as `rows_for_routers` returns them.
    """
    given = context.settings
    recipe = _recipe(
        context, given["shared"], given.get("exclusive", DEFAULT_EXCLUSIVE), given["router"], given.get("without")
    )
    check_rows(recipe, context.sources, rows.of(recipe.experts))


@served_method(
    title="Twin-Merging",
    paper="arXiv:2406.15479",
    track="per-input",
    needs=("task ids of training inputs", "seed"),
    sees=("training rows",),
    protocols=PROTOCOLS,
    check_options=check_twin,
    kind=TwinMethod,
)
def twin(
    context: Context,
    *,
    shared: Mapping[str, Any] = MappingProxyType({"method": "task_arithmetic", "scaling": 0.3}),
    exclusive: Mapping[str, Any] = DEFAULT_EXCLUSIVE,
    router: Mapping[str, Any] = MappingProxyType({"layer": -1}),
    weights: str = "router",
    without: str | None = None,
) -> Iterator[Contender]:
    """theta*(x) = theta_s + sum_t w_t(x) v_t: a shared expert, compressed exclusive vectors, and a router's weights.

    `shared` names a static merge, `exclusive` gives a density, a rank, a budget or another kind, and `router` the
    settings of a recipe's router. With `weights` "task" every row has the exclusive vector of its true task. `without`
    holds one expert out: its tasks are answered by the twin of the others, and a classifier's with the head of its own.
    """
    built = built_twin(context, shared, exclusive, router, without)
    told = weights == "task"
    loaded = load_twin(built.directory, dtype=context.dtype, trust_remote_code=built.recipe.trust_remote_code)
    further: dict[str, Mapping[str, Tensor]] = {}
    if without is not None and context.sources.skeleton.head:
        further[without] = context.sources.experts[without].head()
    model = twin_class(loaded.task_type)(
        loaded.model,
        loaded.tokenizer,
        replace(loaded.parts, heads={**loaded.parts.heads, **further}),
        protocol=context.protocol,
        routing="task" if told else "router",
    )
    model.feature_cache = context.feature_cache
    chosen = built.manifest["router"]
    notes = {} if told else chosen.get("paper", {}) if context.protocol == "paper" else chosen
    yield Contender(
        model,
        context.owned if told else context.names,
        built.build,
        sum(built.manifest["parameters"].values()),
        twin_bytes(built.directory, context.protocol, routed=not told)
        + sum(bytes_of(head.values()) for head in further.values()),
        {
            "router": {key: value for key, value in notes.items() if key != "paper"},
            "twin": built.directory.relative_to(context.workspace.parents[1]).as_posix(),
        },
    )


class Built(NamedTuple):
    """A twin in a suite's workspace: its recipe, its directory, its twin.json, and what its build took."""

    recipe: Recipe
    directory: Path
    manifest: Mapping[str, Any]
    build: Taken


def built_twin(
    context: Context,
    shared: Mapping[str, Any],
    exclusive: Mapping[str, Any],
    router: Mapping[str, Any],
    without: str | None = None,
) -> Built:
    """Return the twin of these settings. It is built unless the workspace holds it."""
    recipe = _recipe(context, shared, exclusive, router, without)
    directory = context.workspace / digest({"format": TWIN_FORMAT, **recipe.model_dump(mode="json")})[:16]
    taken = _build(recipe, directory, context)
    return Built(recipe, directory, read_manifest(directory), taken)


def _recipe(
    context: Context,
    shared: Mapping[str, Any],
    exclusive: Mapping[str, Any],
    router: Mapping[str, Any],
    without: str | None,
) -> Recipe:
    """Return the recipe that builds a suite's twin.

    The authors' router, which is chosen on test rows, is left out unless the suite runs the protocol paper.

    Raises:
        InputError: settings of the suite and of the entry that do not go together, or an unknown expert left out.
        UnsuitedError: the twin can't answer under the protocol.
    """
    if without is not None and (without not in context.experts or len(context.experts) == 1):
        known = ", ".join(context.experts)
        raise InputError(f"without: {without!r}, expected one of several experts; the suite's: {known}")
    settings = {"data": SUITE_ROWS, **context.router, **router}
    if "paper" not in context.protocols:
        settings["paper"] = False
    recipe = parse(
        Recipe,
        {
            "base_model": context.base_model,
            "experts": {name: path for name, path in context.experts.items() if name != without},
            "shared": shared,
            "exclusive": exclusive,
            "router": settings,
            "seed": context.seed,
            "max_length": context.max_length,
            "dtype": context.dtype,
            **context.trust,
        },
    )
    _require_suited(context, recipe, without)
    return recipe


def _require_suited(context: Context, recipe: Recipe, without: str | None) -> None:
    """Raise an UnsuitedError for a twin that can't answer under the context's protocol: before it is built."""
    protocol = context.protocol
    if protocol == "routed" and recipe.router is not None and recipe.router.fallback:
        raise UnsuitedError(
            "protocol routed takes the head from the router, which names none for a row that falls back to the shared "
            "expert"
        )
    if protocol != "standard" and without is not None and context.sources.skeleton.head:
        raise UnsuitedError(f"protocol {protocol} asks for what the twin does not hold of expert {without!r}")


def rows_for_routers(context: Context) -> RouterRows:
    """Return the rows of the suite's routers: those that `router.data` names, or else its tasks' own, of all experts.

    Raises InputError for an expert with fewer than two, or a malformed row.
    """
    names = list(context.experts)
    if "data" in context.router:
        file = Path(context.router["data"])
        found = read_router_rows(file, names)
        require_two(found.train, names, str(file))
        return found
    found = router_rows(context.tasks, names)
    for name in names:
        files = [str(rows.file("train")) for rows in context.tasks if rows.task.expert == name]
        require_two(found.train, [name], ", ".join(files))
    return found


def _build(recipe: Recipe, directory: Path, context: Context) -> Taken:
    """Build the twin unless it exists. Return what the build took, which may have been one of an earlier run.

    Another process that would build the same twin waits, and uses it. On a file system without locks both build it, and
    the first one's twin is used. Nobody may have measured that build.
    """
    record = directory.with_suffix(".json")  # beside the twin, whose own files depend on its inputs alone
    with made_by_one(directory):
        if not directory.is_dir():
            try:
                with Meter(context.device) as meter:
                    build_twin(
                        recipe,
                        directory,
                        rows=rows_for_routers(context).of(recipe.experts),
                        labels=labels_of(rows.task for rows in context.tasks),
                        device=context.device,
                        feature_cache=context.feature_cache,
                        progress=context.progress,
                    )
                write_record(record, asdict(meter.taken), format_number=BUILD_FORMAT)
            except (InputError, OSError):
                if not directory.is_dir():
                    raise
    stored = read_record(record, format_number=BUILD_FORMAT)
    return Taken() if stored is None else Taken(**stored)
