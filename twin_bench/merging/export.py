"""Merging to an ordinary checkpoint or to one LoRA adapter, with a model card."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.finite import require_no_overflow
from twin_bench.checkpoints.hub import model_directory
from twin_bench.checkpoints.peft_files import save_adapter
from twin_bench.checkpoints.skeleton import meta_model, quiet_transformers, read_config
from twin_bench.checkpoints.sources import Sources, open_sources
from twin_bench.checkpoints.stream import SHARD_BYTES, Layout, ordered, write_sharded
from twin_bench.checkpoints.tokenizers import save_tokenizer
from twin_bench.config import parse, read_yaml, with_models_located
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.files import written_at_once
from twin_bench.merging.adapter_sum import merged_adapter
from twin_bench.merging.by_name import merge_lazily
from twin_bench.merging.mergekit import from_mergekit
from twin_bench.merging.model_card import model_card
from twin_bench.merging.recipe import MergeRecipe
from twin_bench.merging.registry import find_method


def read_merge_recipe(file: Path) -> tuple[MergeRecipe, str]:
    """Read and check a merge recipe, or a mergekit file (one with `merge_method`).

    Returns:
        The recipe, and one line that says what mergekit computes differently ("" if nothing differs).

    Raises:
        InputError: names the file and the key that is wrong.
    """
    raw = read_yaml(file)
    if "merge_method" in raw:
        return from_mergekit(raw, file)
    return parse(MergeRecipe, with_models_located(raw, file), str(file)), ""


def merge_to_directory(
    recipe: MergeRecipe,
    directory: Path,
    *,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Merge and write the result to `directory`, which appears whole or not at all.

    Parameters are merged and written one at a time. For classifiers the backbone alone is written, under the name of
    its own class. With `recipe.head` the classifier is written, with that expert's head and labels. `device` is where
    parameters are merged, by default the CPU; an adapter's factors are always added there.

    Returns:
        The number of parameters written.

    Raises:
        InputError: the recipe or one of its inputs is wrong.
    """
    progress = progress or Progress(disable=True)
    sources = open_sources(
        recipe.base_model,
        recipe.experts,
        allow_pickle=recipe.allow_pickle,
        trust_remote_code=recipe.trust_remote_code,
    )
    if recipe.head is not None and not sources.skeleton.head:
        raise InputError(f"head: {recipe.head}: a language model has no separate head; leave head out")
    options = {**find_method(recipe.merge.method).seeded(recipe.seed), **recipe.merge.options}
    with written_at_once(directory) as root, quiet_transformers():
        if recipe.as_adapter:
            parameters = _write_adapter(recipe, sources, options, root)
        else:
            parameters = _write_checkpoint(recipe, sources, options, device, root, progress, shard_bytes)
        save_tokenizer(sources.tokenizer, root)
        (root / "README.md").write_text(model_card(recipe, options, sources, directory.name, parameters))
    return parameters


def _write_checkpoint(
    recipe: MergeRecipe,
    sources: Sources,
    options: Mapping[str, Any],
    device: str | torch.device | None,
    root: Path,
    progress: Progress,
    shard_bytes: int,
) -> int:
    wanted = getattr(torch, recipe.dtype) if recipe.dtype else None
    base = _Widened(sources.base, wanted) if wanted else sources.base
    transposed = sources.skeleton.transposed
    merged = merge_lazily(recipe.merge.method, base, sources.experts, transposed=transposed, device=device, **options)
    head = sources.experts[recipe.head].head() if recipe.head else {}
    whole = {**head, **sources.buffers}
    kept_prefix = sources.skeleton.prefix if sources.skeleton.head and not head else ""
    layouts = {
        name: Layout(wanted or sources.base.dtype(name), shape) for name, shape in sources.skeleton.backbone.items()
    }
    layouts |= {name: Layout(wanted or tensor.dtype, tensor.shape) for name, tensor in whole.items()}
    dtype = layouts[next(iter(sources.skeleton.backbone))].dtype

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in progress.track(ordered(layouts), description="merging"):
            tensor = whole[name] if name in whole else merged[name]
            cast = require_no_overflow(tensor.to(layouts[name].dtype), name, recipe.merge.method)
            yield name.removeprefix(kept_prefix), cast
            del tensor, cast  # frees it before the next one is merged

    stored = {name.removeprefix(kept_prefix): layout for name, layout in layouts.items()}
    write_sharded(root, stored, stream(), shard_bytes=shard_bytes)
    _merged_config(recipe, sources, head, dtype).save_pretrained(root)
    if sources.generation is not None:
        sources.generation.save_pretrained(root)
    return sum(layout.shape.numel() for layout in layouts.values())


def _write_adapter(recipe: MergeRecipe, sources: Sources, options: Mapping[str, Any], root: Path) -> int:
    factors = merged_adapter(recipe.merge.method, options, sources.experts, sources.skeleton)
    tied = {first: name for name, first in sources.skeleton.tied.items() if name not in sources.skeleton.backbone}
    if factors.keys() & tied:
        table = min(factors.keys() & tied)
        raise UnsuitedError(
            f"as_adapter: {table} is tied to {tied[table]}, which an adapter does not change; leave as_adapter out"
        )
    head = sources.experts[recipe.head].head() if recipe.head else {}
    if recipe.dtype:
        dtype = getattr(torch, recipe.dtype)
        factors = {name: Factors(B.to(dtype), A.to(dtype)) for name, (B, A) in factors.items()}
        head = {name: tensor.to(dtype) for name, tensor in head.items()}
    save_adapter(root, factors, sources.skeleton, base_model=recipe.base_model, head=head)
    return sum(t.numel() for pair in factors.values() for t in pair) + sum(t.numel() for t in head.values())


def _merged_config(recipe: MergeRecipe, sources: Sources, head: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """Return the base's config with the class and dtype of what is written and, if a head is written, its labels."""
    config = copy.deepcopy(sources.config)
    config.dtype = dtype
    if recipe.head is not None:
        expert = model_directory(recipe.experts[recipe.head], allow_pickle=recipe.allow_pickle)
        if (expert / "adapter_config.json").is_file():
            config.num_labels = head[sources.skeleton.head_output or min(head)].shape[0]
        else:
            theirs = read_config(expert, trust_remote_code=recipe.trust_remote_code)
            config.id2label, config.label2id = theirs.id2label, theirs.label2id
            config.problem_type = getattr(theirs, "problem_type", None)
    model = meta_model(config, sources.skeleton.task_type, num_labels=config.num_labels)
    written = model.base_model if sources.skeleton.head and recipe.head is None else model
    config.architectures = [type(written).__name__]
    return config


class _Widened(Mapping[str, Tensor]):
    """A base model with dtypes that hold `dtype` without loss. A merge returns its base's dtypes."""

    def __init__(self, base: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._base = base
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._base[name]
        return tensor.to(torch.promote_types(tensor.dtype, self._dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)
