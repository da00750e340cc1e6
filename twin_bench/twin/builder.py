"""Building a twin directory from a recipe: the shared expert, the exclusive vectors, the heads and the routers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from twin_bench.checkpoints.quantization import quantization_config, require_quantisable
from twin_bench.checkpoints.skeleton import position_limit
from twin_bench.checkpoints.sources import Labels, Sources, load_model, open_sources, require_expert_names
from twin_bench.data.rows import RouterRows, read_router_rows
from twin_bench.errors import InputError
from twin_bench.locks import written_by_one
from twin_bench.merging.device import exact_device
from twin_bench.merging.registry import find_method
from twin_bench.twin.device import usable_device
from twin_bench.twin.directory import save_twin
from twin_bench.twin.exclusive import Exclusive, exclusive_vector
from twin_bench.twin.exclusive.budget import check_budget
from twin_bench.twin.exclusive.files import stored_as_adapter
from twin_bench.twin.exclusive.vector import exact_difference
from twin_bench.twin.exclusive_random import random_like
from twin_bench.twin.going_on import parameters_below
from twin_bench.twin.kept_svd import kept_svd
from twin_bench.twin.paper import PaperFactors, stack_adapters
from twin_bench.twin.parts import PaperParts, Parts
from twin_bench.twin.recipe import Recipe
from twin_bench.twin.routers.limits import check_router, check_rows
from twin_bench.twin.routers.training import RouterTraining, train_routers
from twin_bench.twin.shared import merge_options, merged_parameters
from twin_bench.twin.work import Work, work_on
from twin_bench.twin.workers import Job, compute_tensors, threads_each

ORACLE_PARAMETERS = re.compile(r"bias$")
"""The parameters that the protocol paper neither merges nor replaces. It takes them from the true task's expert.

The authors' pattern has no end. In RoBERTa, which they merge, it finds the same. In MPNet it would also find the table
of relative positions, relative_attention_bias.weight, which is a matrix and is merged and fused as one.
"""


def build_twin(
    recipe: Recipe,
    directory: Path,
    *,
    rows: RouterRows | None = None,
    labels: Labels | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    feature_cache: Path | None = None,
    progress: Progress | None = None,
    resumable: bool = False,
    workers: int = 1,
    plugins: Sequence[str] = (),
) -> dict[str, Any]:
    """Build a twin and write it to `directory`, which appears whole or not at all.

    Args:
        recipe: What the twin is made of.
        directory: It must not exist yet.
        rows: The router's rows, in place of those at the recipe's `router.data`.
        labels: The labels of each expert's task (see `open_sources`).
        device: Where merges, SVDs and the routers' features are computed: the CPU by default; `auto` is cuda, else mps,
            else cpu.
        batch_size: How many rows a forward pass for features has, by default what 8,192 tokens hold, up to 64.
        feature_cache: The directory in which SVDs and the routers' features are kept from run to run, or None.
        progress: Where progress is shown, if anywhere.
        resumable: Keep each tensor on disk, so that a killed build goes on from there (see `twin_bench.twin.work`).
        workers: How many processes compute tensors. Several keep them on disk as well.
        plugins: The files that were imported besides those of the recipe, for these processes.

    Returns:
        The settings of the build that twin.json holds: method, options, the router's accuracy, parameters stored.

    Raises:
        InputError: Anything is wrong with the recipe or its inputs. Nothing is written then.
    """
    progress, on, threads = progress or Progress(disable=True), usable_device(device), threads_each(workers)
    _require_writable(directory)
    require_expert_names(recipe.experts)
    if recipe.router and rows is None:
        rows = read_router_rows(Path(recipe.router.data), list(recipe.experts))
    trust: Any = {"allow_pickle": recipe.allow_pickle, "trust_remote_code": recipe.trust_remote_code}
    sources = open_sources(recipe.base_model, recipe.experts, labels=labels, **trust)
    check_limits(recipe, sources, rows)
    kept = work_on(directory, recipe, on, threads) if resumable or workers > 1 else nullcontext(Work())
    with written_by_one(directory), kept as work:
        _require_writable(directory)  # another build may have ended since
        if workers > 1:
            job = Job(recipe, labels, work, str(on), tuple(plugins), threads)
            compute_tensors(job, _largest_first(sources, work.smallest), workers, progress)
        cache = feature_cache if workers == 1 else None  # workers keep SVDs in the work, for their number of threads
        shared, parts = _merged_parts(recipe, sources, work, cache, progress, on)
        chosen: dict[str, Any] = {}
        if recipe.router and rows:
            given = (sources, shared, parts, rows, feature_cache, progress, on, batch_size)
            parts, chosen = train_routers(RouterTraining(recipe, recipe.router, *given))
        settings = _summary(recipe, shared, parts, chosen)
        model = load_model(sources, shared, quantization=recipe.quantization)
        save_twin(directory, model, sources.tokenizer, parts, sources.skeleton, settings)
    return settings


def _merged_parts(
    recipe: Recipe, sources: Sources, work: Work, cache: Path | None, progress: Progress, device: torch.device
) -> tuple[dict[str, Tensor], Parts]:
    """Return the shared expert's parameters, and the twin's parts without a router."""
    merged = merged_parameters(recipe, sources, device)
    shapes = progress.track(sources.skeleton.backbone.items(), len(merged), description="shared expert")
    shared = {name: work.parameter(name, shape, partial(merged.__getitem__, name)) for name, shape in shapes}
    keeping: dict[str, Any] = {"keep": work.tensors}
    if cache is not None:  # once: the cache serves a build that goes on, too. Workers may have kept some in the work
        keeping = {"keep": replace(work, writes=False).tensors, "decompose": partial(kept_svd, cache / "svd")}
    below = _below(sources, shared, recipe.exclusive.from_layer)
    return shared, Parts(
        heads={name: expert.head() for name, expert in sources.experts.items()},
        exclusive=_exclusive_vectors(recipe, sources, shared, below, keeping, progress, device),
        paper=_paper_parts(recipe, sources, shared, below),
        max_length=recipe.max_length,
    )


def _largest_first(sources: Sources, smallest: int) -> list[str]:
    """Return the names of the parameters of `smallest` entries or more."""
    entries = {name: shape.numel() for name, shape in sources.skeleton.backbone.items()}
    return sorted((name for name in entries if entries[name] >= smallest), key=lambda name: -entries[name])


def _summary(recipe: Recipe, shared: Mapping[str, Tensor], parts: Parts, router: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the build that twin.json holds."""
    exclusive = recipe.exclusive.model_dump(exclude_none=True)
    return {
        "twin_bench": version("twin-bench"),  # Information only: nothing is decided by it.
        "base_model": recipe.base_model,
        "shared": {"method": recipe.shared.method, **merge_options(recipe)},
        "exclusive": exclusive,
        "router": dict(router),
        "seed": recipe.seed,
        **({} if recipe.quantization is None else {"quantization": recipe.quantization}),
        "max_length": recipe.max_length,  # None means the default of the twin's kind.
        "sensitivity": parts.sensitivity,
        "parameters": {
            "shared": sum(t.numel() for t in shared.values()),
            "exclusive": sum(own.numbers() for own in parts.exclusive.values()),
        },
        **_bytes(exclusive, shared, parts),
    }


def _bytes(exclusive: Mapping[str, Any], shared: Mapping[str, Tensor], parts: Parts) -> dict[str, Any]:
    """Return the bytes that are stored, where they don't follow from the numbers of parameters."""
    if stored_as_adapter(exclusive):
        return {}
    each = (own.nbytes() for own in parts.exclusive.values())
    return {"bytes": {"shared": sum(t.nbytes for t in shared.values()), "exclusive": sum(each)}}


def _exclusive_vectors(
    recipe: Recipe,
    sources: Sources,
    shared: Mapping[str, Tensor],
    without: frozenset[str],
    keeping: Mapping[str, Any],
    progress: Progress,
    device: torch.device,
) -> dict[str, Exclusive]:
    """Return each expert's exclusive vector over the shared expert, or random ones of their sizes."""
    settings, seed, found = recipe.exclusive, recipe.seed, dict[str, Exclusive]()
    experts = progress.track(sources.experts.items(), len(sources.experts), description="exclusive vectors")
    for name, expert in experts:
        options = {"kind": settings.kind, "name": name, "seed": seed, "without": without, **settings.options()}
        own = exclusive_vector(expert, shared, device=exact_device(device), **keeping, **options)
        found[name] = random_like(own, name, seed=seed) if settings.random else own
    return found


def _below(sources: Sources, shared: Mapping[str, Tensor], from_layer: int | None) -> frozenset[str]:
    """Return the names of the parameters that stay the shared expert's: those that hidden state `from_layer` needs."""
    if from_layer is None:
        return frozenset()
    model = load_model(sources, shared)
    backbone = model.get_encoder() if sources.skeleton.task_type == "seq2seq_lm" else model.base_model
    return parameters_below(model.eval(), backbone, from_layer)


def _paper_parts(
    recipe: Recipe, sources: Sources, shared: Mapping[str, Tensor], below: frozenset[str]
) -> PaperParts | None:
    """Return what the protocol paper needs, or None if the twin can't run under it.

    The protocol needs the pretrained biases of classifiers, and the experts' biases `below` the layer from which on
    exclusive vectors are kept. Of causal LMs it needs LoRA experts of one rank on the
    same nn.Linear layers, merged by task arithmetic, and truncated SVDs of one density or rank. It truncates A and B
    itself, so exclusive vectors that are random, quantised or left out below a layer would have no effect. It computes
    weights of its own, which can't be quantised.
    """
    exclusive = recipe.exclusive
    density, rank = exclusive.truncation
    if sources.skeleton.head:
        biases = {n: sources.base[n] for n in sources.skeleton.backbone if ORACLE_PARAMETERS.search(n)}
        left_out = {
            name: {n: exact_difference(expert[n], shared[n], n) for n in biases if n in below}
            for name, expert in (sources.experts.items() if below else ())
        }
        changed = {n for own in left_out.values() for n, difference in own.items() if difference.any()}
        left_out = {name: {n: own[n] for n in own if n in changed} for name, own in left_out.items()}
        return PaperParts(biases, density=density, left_out=left_out)
    if exclusive.random or exclusive.bits or exclusive.from_layer is not None or (density, rank) == (None, None):
        return None
    if recipe.shared.method != "task_arithmetic" or recipe.quantization is not None:
        return None
    if not all(expert.low_rank for expert in sources.experts.values()):
        return None
    adapted = {name for expert in sources.experts.values() for name in expert.low_rank}
    if adapted & (sources.skeleton.transposed | sources.skeleton.embeddings):
        return None
    try:
        stacks = stack_adapters(sources.experts)
    except InputError:  # Adapters of several ranks can still make a twin for the other protocols.
        return None
    scaling = {**find_method("task_arithmetic").defaults, **recipe.shared.options}["scaling"]
    return PaperParts(factors=PaperFactors(stacks, scaling, density, rank))


def _require_writable(directory: Path) -> None:
    """Raise an InputError unless a twin can be written to `directory`. A build can take hours, so this is first."""
    if directory.exists():
        raise InputError(f"{directory}: exists already; give another name, or remove it first")
    parent = next(parent for parent in directory.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{directory}: {parent} can't be written to; give another place")


def check_limits(recipe: Recipe, sources: Sources, rows: RouterRows | None = None) -> None:
    """Raise an InputError for settings that this base model, its experts or a router's rows do not allow."""
    config = sources.config
    if recipe.quantization is not None:
        require_quantisable(sources.skeleton.task_type)
        quantization_config(recipe.quantization)
    window = position_limit(config)
    if recipe.max_length and window is not None and recipe.max_length > window:
        raise InputError(f"max_length {recipe.max_length}: the base model has a window of {window}; give no more")
    depth, from_layer = config.num_hidden_layers, recipe.exclusive.from_layer
    if from_layer is not None and from_layer >= depth:
        raise InputError(f"exclusive.from_layer {from_layer}: the base model has {depth} blocks; give 0 to {depth - 1}")
    check_budget(recipe.exclusive, sources)
    check_router(recipe, sources)
    if rows is not None:
        check_rows(recipe, sources, rows)
