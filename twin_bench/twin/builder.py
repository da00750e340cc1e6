"""From a recipe to a twin directory: shared expert, exclusive vectors, heads, router."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from twin_bench.checkpoints.skeleton import context_window
from twin_bench.checkpoints.sources import Sources, load_model, open_sources, require_expert_name
from twin_bench.data import TASKS
from twin_bench.data.rows import read_router_rows, scored_inputs, split_path
from twin_bench.data.task import TaskInput
from twin_bench.errors import InputError
from twin_bench.merging.registry import find_method, merge_lazily
from twin_bench.twin.directory import save_twin
from twin_bench.twin.exclusive import exclusive_vector
from twin_bench.twin.model import Encoded, TwinModel, distinct, twin_class
from twin_bench.twin.paper import PaperFactors, stack_adapters
from twin_bench.twin.parts import PaperParts, Parts
from twin_bench.twin.recipe import Recipe, RouterSettings
from twin_bench.twin.router import RouterConfig, Trained, train_router
from twin_bench.twin.tolerance import sensitivity

ORACLE_PARAMETERS = re.compile(r"bias")
"""Parameters that the paper protocol neither merges nor replaces: the true task's expert supplies them."""

PROBE_ROWS = 16
PROBE_TOKENS = 512
"""Held-out rows of a task, and their tokens, on which a twin's sensitivity to its weights is measured: one at least."""

FEATURE_TOKENS = 8192
"""Tokens of a batch whose features are taken: bounds what the hidden states of long prompts need."""


def build_twin(
    recipe: Recipe, directory: Path, *, feature_cache: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Build a twin and write it to `directory`, which appears whole or not at all.

    `feature_cache`: the directory in which the routers' features are kept across runs, if in any.
    Returns what twin.json says of the build (settings, the router's accuracy, parameters stored). Raises
    InputError for whatever is wrong with the inputs, before anything is written.
    """
    progress = progress or Progress(disable=True)
    _require_writable(directory)
    for name in recipe.experts:
        require_expert_name(name)
    rows = read_router_rows(Path(recipe.router.data), list(recipe.experts)) if recipe.router else []
    sources = open_sources(
        recipe.base_model,
        recipe.experts,
        allow_pickle=recipe.allow_pickle,
        trust_remote_code=recipe.trust_remote_code,
    )
    _check_limits(recipe, sources)
    header = find_method(recipe.shared.method).given(recipe.shared.options)
    options = {**header.seeded(recipe.seed), **recipe.shared.options}
    merged = merge_lazily(recipe.shared.method, sources.base, sources.experts, **options)
    shared = {n: merged[n] for n in progress.track(sources.skeleton.backbone, description="shared expert")}
    limits = recipe.exclusive.model_dump()
    parts = Parts(
        heads={name: expert.head() for name, expert in sources.experts.items()},
        exclusive={
            name: exclusive_vector(expert, shared, seed=recipe.seed, **limits)
            for name, expert in progress.track(
                sources.experts.items(), len(sources.experts), description="exclusive vectors"
            )
        },
        paper=_paper_parts(recipe, sources),
        max_length=recipe.max_length,
    )
    chosen: dict[str, Any] = {}
    if recipe.router:
        parts, chosen = _with_routers(recipe, recipe.router, sources, shared, parts, rows, feature_cache, progress)
    stored = sum(
        tensor.numel()
        for exclusive in parts.exclusive.values()
        for tensor in (*(t for f in exclusive.factors.values() for t in f), *exclusive.vectors.values())
    )
    settings = {
        "twin_bench": version("twin-bench"),
        "base_model": recipe.base_model,
        "shared": {"method": recipe.shared.method, **options},
        "exclusive": recipe.exclusive.model_dump(exclude_none=True),
        "router": chosen,
        "seed": recipe.seed,
        "max_length": recipe.max_length,  # None: the kind's own default
        "sensitivity": parts.sensitivity,
        "parameters": {"shared": sum(t.numel() for t in shared.values()), "exclusive": stored},
    }
    save_twin(directory, load_model(sources, shared), sources.tokenizer, parts, sources.skeleton, settings)
    return settings


def _with_routers(
    recipe: Recipe,
    settings: RouterSettings,
    sources: Sources,
    shared: Mapping[str, Tensor],
    parts: Parts,
    rows: Sequence[TaskInput],
    feature_cache: Path | None,
    progress: Progress,
) -> tuple[Parts, dict[str, Any]]:
    """Return the parts with their routers, and how these were chosen."""
    names = tuple(recipe.experts)
    rows = _sampled(rows, names, settings.max_rows, recipe.seed)
    depth = sources.config.num_hidden_layers
    layers = list(range(depth + 1)) if settings.layer == "auto" else [settings.layer]
    twin = twin_class(sources.skeleton.task_type)(load_model(sources, shared, recipe.dtype), sources.tokenizer, parts)
    twin.feature_cache = feature_cache
    features = _features(twin, rows, layers, progress, "router features")
    held_out = held_out_rows(rows, names, settings.held_out, recipe.seed)
    owner = torch.tensor([names.index(row.task) for row in rows])
    best: Trained | None = None
    layer_accuracy: dict[str, float] = {}
    for layer, hidden in progress.track(list(zip(layers, features, strict=True)), description="router"):
        config = RouterConfig(names, hidden.shape[1], layer, settings.top_k, settings.temperature)
        fit, chosen = (hidden[~held_out], owner[~held_out]), (hidden[held_out], owner[held_out])
        trained = train_router(config, *fit, *chosen, epochs=settings.epochs, seed=recipe.seed)
        layer_accuracy[str(layer)] = trained.accuracy
        best = trained if best is None or trained.accuracy > best.accuracy else best
    assert best is not None
    twin.router = best.router
    parts = dataclasses.replace(
        parts, router=best.router, sensitivity=_sensitivity(twin, [r for r, h in zip(rows, held_out, strict=True) if h])
    )
    summary = {
        **settings.model_dump(exclude={"data"}),
        "layer": best.router.config.layer,
        "selected_on": "held-out training rows",
        **_summary(best),
        "layer_accuracy": layer_accuracy,
    }
    test_rows = _test_rows(Path(settings.data), names, settings.max_rows) if settings.paper and parts.paper else []
    if test_rows:
        paper = _paper_router(recipe, settings, sources, shared, parts, rows, test_rows, feature_cache, progress)
        assert parts.paper is not None
        parts = dataclasses.replace(parts, paper=dataclasses.replace(parts.paper, router=paper.router))
        summary["paper"] = {"layer": -1, "selected_on": "test rows, as the authors do", **_summary(paper)}
    return parts, summary


def _paper_router(
    recipe: Recipe,
    settings: RouterSettings,
    sources: Sources,
    shared: Mapping[str, Tensor],
    parts: Parts,
    rows: Sequence[TaskInput],
    test_rows: Sequence[TaskInput],
    feature_cache: Path | None,
    progress: Progress,
) -> Trained:
    """Train the authors' router: last layer, pretrained biases, its epoch chosen on the test rows."""
    kind = twin_class(sources.skeleton.task_type)
    twin = kind(load_model(sources, shared, recipe.dtype), sources.tokenizer, parts, protocol="paper")
    twin.feature_cache = feature_cache
    names = tuple(recipe.experts)
    both = [*rows, *test_rows]
    hidden = _features(twin, both, [-1], progress, "router features (paper)")[0]
    owner = torch.tensor([names.index(row.task) for row in both])
    fit, chosen = (hidden[: len(rows)], owner[: len(rows)]), (hidden[len(rows) :], owner[len(rows) :])
    config = RouterConfig(names, hidden.shape[1])
    return train_router(config, *fit, *chosen, epochs=settings.epochs, seed=recipe.seed)


def _features(
    twin: TwinModel,
    rows: Sequence[TaskInput],
    layers: Sequence[int],
    progress: Progress,
    what: str,
) -> list[Tensor]:
    """Return the (rows, width) features of each layer, on the CPU."""
    encoded = twin.encode([(row.text, row.text_pair) for row in rows])
    lengths = [len(row["input_ids"]) for row in encoded]
    if not all(lengths):
        raise InputError(
            f"router: the tokenizer makes no token of a row of {rows[lengths.index(0)].task}; mend the row"
        )
    kept, place = distinct(encoded)
    bar = progress.add_task(what, total=len(kept))
    features = twin.features_of(
        kept,
        layers,
        batch_size=max(1, min(64, FEATURE_TOKENS // max(lengths))),
        progress=lambda done: progress.advance(bar, done),
    )
    progress.update(bar, completed=len(kept))
    return [hidden.float()[place] for hidden in features]


def _sensitivity(twin: TwinModel, rows: Sequence[TaskInput]) -> float:
    """Return how sensitive the twin is to its weights, from a few held-out rows of each task."""
    probes: list[Encoded] = []
    tasks: list[str] = []
    for task in twin.expert_names:
        own = twin.encode([(row.text, row.text_pair) for row in rows if row.task == task][:PROBE_ROWS])
        tokens = list(itertools.accumulate(len(row["input_ids"]) for row in own))
        few = max(1, sum(count <= PROBE_TOKENS for count in tokens))
        probes += own[:few]
        tasks += [task] * len(own[:few])
    return sensitivity(twin, probes, tasks, twin.route_all(probes))


def _sampled(rows: Sequence[TaskInput], names: Sequence[str], limit: int, seed: int) -> list[TaskInput]:
    """Return at most `limit` rows of each task, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[TaskInput] = []
    for name in names:
        own = [row for row in rows if row.task == name]
        kept += [own[index] for index in torch.randperm(len(own), generator=generator)[:limit].tolist()]
    return kept


def held_out_rows(rows: Sequence[TaskInput], names: Sequence[str], fraction: float, seed: int) -> Tensor:
    """Return a mask of the rows that choose the router: a fraction of each task's, at least one.

    Equal texts go to the same side, so that no row chooses what it was trained on.
    """
    texts = sorted({(row.text, row.text_pair or "") for row in rows})
    shuffled = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    rank = dict(zip(texts, shuffled, strict=True))
    mask = torch.zeros(len(rows), dtype=torch.bool)
    for name in names:
        own = sorted((rank[row.text, row.text_pair or ""], i) for i, row in enumerate(rows) if row.task == name)
        if len(own) < 2:
            raise InputError(f"router: expert {name!r} has {len(own)} rows; it needs two, one of them held out")
        cut = own[max(1, int(fraction * len(own))) - 1][0]
        mask[[i for position, i in own if position <= cut]] = True
    return mask


def _test_rows(data: Path, names: Sequence[str], limit: int) -> list[TaskInput]:
    """Return every expert's validation rows, which the authors select their router on; empty if any lacks."""
    files = {name: split_path(data, name) for name in names if name in TASKS}
    if len(files) < len(names) or not all(file.is_file() for file in files.values()):
        return []
    return [row for name, file in files.items() for row in scored_inputs(TASKS[name], data, file, min(limit, 1000))]


def _summary(trained: Trained) -> dict[str, Any]:
    return {
        "epoch": trained.epoch,
        "accuracy": trained.accuracy,
        "task_accuracy": trained.task_accuracy,
        "rows": trained.rows,
        "selection_rows": trained.selection_rows,
    }


def _paper_parts(recipe: Recipe, sources: Sources) -> PaperParts | None:
    """Return what the paper protocol needs; None where it can't be had of these experts."""
    if sources.skeleton.head:
        return PaperParts({n: sources.base[n] for n in sources.skeleton.backbone if ORACLE_PARAMETERS.search(n)})
    if recipe.shared.method != "task_arithmetic" or not all(expert.low_rank for expert in sources.experts.values()):
        return None
    adapted = {name for expert in sources.experts.values() for name in expert.low_rank}
    if adapted & (sources.skeleton.transposed | sources.skeleton.embeddings):
        return None
    try:
        stacks = stack_adapters(sources.experts)
    except InputError:  # adapters of several ranks: a twin all the same, under the other protocols
        return None
    scaling = {**find_method("task_arithmetic").defaults, **recipe.shared.options}["scaling"]
    limits = recipe.exclusive
    return PaperParts(factors=PaperFactors(stacks, scaling, limits.density, limits.rank))


def _require_writable(directory: Path) -> None:
    """Raise an InputError unless a twin can be written to `directory`: before hours are spent on it."""
    if directory.exists():
        raise InputError(f"{directory}: exists already; give another name, or remove it first")
    parent = next(parent for parent in directory.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{directory}: {parent} can't be written to; give another place")


def _check_limits(recipe: Recipe, sources: Sources) -> None:
    """Raise an InputError for settings that this base model, or this number of experts, can't have."""
    config, router = sources.config, recipe.router
    window = context_window(config)
    if recipe.max_length and recipe.max_length > window:
        raise InputError(f"max_length {recipe.max_length}: the base model has a window of {window}; give no more")
    if router is None:
        return
    depth = config.num_hidden_layers
    if router.layer != "auto" and not -1 <= router.layer <= depth:
        raise InputError(f"router.layer {router.layer}: the base model has {depth} blocks; -1 to {depth}, or auto")
    if router.top_k > len(recipe.experts):
        raise InputError(f"router.top_k {router.top_k}: there are {len(recipe.experts)} experts; 0 keeps all")
