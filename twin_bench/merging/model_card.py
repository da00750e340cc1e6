"""The model card of a merge: everything that is needed to make the merge again."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from twin_bench.checkpoints.hub import model_directory, on_hub
from twin_bench.checkpoints.sources import Sources
from twin_bench.files import digest_files
from twin_bench.merging.recipe import MergeRecipe
from twin_bench.merging.registry import find_method


def model_card(recipe: MergeRecipe, options: Mapping[str, Any], sources: Sources, name: str, parameters: int) -> str:
    """Return README.md of a merge: the method, its options and paper, and a digest of each input.

    A local folder is named by the last part of its path, because a card is published. The digests identify the files.
    """
    method = find_method(recipe.merge.method)
    models = {"base model": recipe.base_model, **recipe.experts}
    repositories = dict.fromkeys(model.repository for model in map(on_hub, models.values()) if model)
    front = {
        "library_name": "peft" if recipe.as_adapter else "transformers",
        "tags": ["merge", "twin-bench"],
        **({"base_model": list(repositories)} if repositories else {}),
    }
    title = f"[{method.title}](https://arxiv.org/abs/{method.paper.removeprefix('arXiv:')})"
    own_dtype = "float32" if recipe.as_adapter else "the base model's"
    given = "".join(f"- {option}: {value}\n" for option, value in options.items())
    folders = {model: model_directory(model, allow_pickle=recipe.allow_pickle) for model in models.values()}
    rows = "".join(f"| {role} | {_shown(model)} | {digest_files(folders[model])} |\n" for role, model in models.items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n\n"
        f"{'A LoRA adapter' if recipe.as_adapter else 'A model'} merged by twin-bench {version('twin-bench')} with "
        f"{title if method.paper else method.title} (`{method.name}`): {method.formula}\n\n"
        f"{given}- dtype: {recipe.dtype or own_dtype}\n- parameters: {parameters:,}\n\n"
        f"{_head(recipe, sources)}\n\n"
        f"| input | model | sha256 of its files' sha256 |\n| --- | --- | --- |\n{rows}"
    )


def _shown(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model


def _head(recipe: MergeRecipe, sources: Sources) -> str:
    if not sources.skeleton.head:
        return "The tokenizer is the base model's."
    if recipe.head:
        head = sources.experts[recipe.head].head()
        labels = head[sources.skeleton.head_output or min(head)].shape[0]
        base = f" Load the base model with `num_labels={labels}` first." if recipe.as_adapter else ""
        return f"The head is that of the expert `{recipe.head}`, unmerged; the tokenizer is the base model's.{base}"
    return (
        "This is the backbone alone: each head belongs to a task and is not merged. A classifier loaded from it gets a "
        "new, untrained head; `head: TASK` in the recipe writes an expert's head. The tokenizer is the base model's."
    )
