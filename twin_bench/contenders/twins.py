"""Twins on the leaderboard: build a twin from a suite's entry, keep it, and make a contender of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pydantic import Field

from twin_bench.config import Settings, parse
from twin_bench.contenders.context import Contender, Context
from twin_bench.contenders.storage import twin_bytes
from twin_bench.data.classification import labels_of
from twin_bench.data.rows import RouterRows, read_router_rows, router_rows
from twin_bench.errors import InputError
from twin_bench.files import digest, made_by_one, read_record, write_record
from twin_bench.measured import Meter, Taken
from twin_bench.merging.recipe import Shared
from twin_bench.merging.registry import MergeMethod, ServedMethod, find_method, served_method
from twin_bench.merging.rehearsal import rehearse_merge
from twin_bench.protocols import PROTOCOLS, ProtocolName, Track
from twin_bench.twin.builder import build_twin, check_limits
from twin_bench.twin.directory import read_manifest
from twin_bench.twin.exclusive import find_kind
from twin_bench.twin.model import TwinModel
from twin_bench.twin.recipe import ExclusiveSettings, Recipe, RouterSettings
from twin_bench.twin.routers.rows import require_two
from twin_bench.twin.shared import merge_options

SUITE_ROWS = "the suite's training rows"
"""A suite's recipe has it in place of `router.data`."""
TWIN_FORMAT = 3
"""It is raised when the same recipe builds another twin."""
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
    """

    exclusive: ExclusiveSettings = ExclusiveSettings(density=0.1)
    weights: Literal["router", "task"] = "router"


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
        """Return whether a twin runs under a protocol.

        The protocol `routed` takes the head from the router, which names none for a row that falls back.
        """
        twin = parse(TwinOptions, dict(options))
        return protocol != "routed" or (twin.weights != "task" and not twin.router.get("fallback"))


def check_twin(
    context: Context,
    *,
    shared: Mapping[str, Any],
    exclusive: Mapping[str, Any],
    router: Mapping[str, Any],
    weights: str,
) -> None:
    """Raise an InputError for a router, a window or options of the shared expert that these experts do not allow."""
    recipe = _recipe(context, shared, exclusive, router)
    check_limits(recipe, context.sources)
    method = find_method(recipe.shared.method)
    if isinstance(method, MergeMethod):
        rehearse_merge(method, merge_options(recipe), tuple(context.experts))


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
    exclusive: Mapping[str, Any] = MappingProxyType({"density": 0.1}),
    router: Mapping[str, Any] = MappingProxyType({"layer": -1}),
    weights: str = "router",
) -> Iterator[Contender]:
    """theta*(x) = theta_s + sum_t w_t(x) v_t: a shared expert, compressed exclusive vectors, and a router's weights.

    `shared` names a static merge, `exclusive` gives a density, a rank, a budget or another kind, and `router` the
    settings of a recipe's router. With `weights` "task" every row has the exclusive vector of its true task.
    """
    built = built_twin(context, shared, exclusive, router)
    told = weights == "task"
    model = TwinModel.from_pretrained(
        built.directory,
        protocol=context.protocol,
        routing="task" if told else "router",
        dtype=context.dtype,
        trust_remote_code=built.recipe.trust_remote_code,
    )
    model.feature_cache = context.feature_cache
    chosen = built.manifest["router"]
    notes = {} if told else chosen.get("paper", {}) if context.protocol == "paper" else chosen
    yield Contender(
        model,
        context.owned if told else context.names,
        built.build,
        sum(built.manifest["parameters"].values()),
        twin_bytes(built.directory, context.protocol, routed=not told),
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
    context: Context, shared: Mapping[str, Any], exclusive: Mapping[str, Any], router: Mapping[str, Any]
) -> Built:
    """Return the twin of these settings. It is built unless the workspace holds it."""
    recipe = _recipe(context, shared, exclusive, router)
    directory = context.workspace / digest({"format": TWIN_FORMAT, **recipe.model_dump(mode="json")})[:16]
    taken = _build(recipe, directory, context)
    return Built(recipe, directory, read_manifest(directory), taken)


def _recipe(
    context: Context, shared: Mapping[str, Any], exclusive: Mapping[str, Any], router: Mapping[str, Any]
) -> Recipe:
    """Return the recipe that builds a suite's twin.

    The authors' router, which is chosen on test rows, is left out unless the suite runs the protocol paper.
    """
    settings = {"data": SUITE_ROWS, **context.router, **router}
    if "paper" not in context.protocols:
        settings["paper"] = False
    return Recipe.model_validate(
        {
            "base_model": context.base_model,
            "experts": dict(context.experts),
            "shared": shared,
            "exclusive": exclusive,
            "router": settings,
            "seed": context.seed,
            "max_length": context.max_length,
            "dtype": context.dtype,
            **context.trust,
        }
    )


def rows_for_routers(context: Context) -> RouterRows:
    """Return the rows of the suite's routers: those that `router.data` names, or else its tasks' own.

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
                        rows=rows_for_routers(context),
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
