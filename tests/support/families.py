"""Base models and their experts, saved as a user would have them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support.models import (
    tiny_causal,
    tiny_causal_tokenizer,
    tiny_classifier,
    tiny_seq2seq,
    tiny_seq2seq_tokenizer,
    tiny_tokenizer,
)
from tests.support.rows import write_router_rows
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe

SCALING, DENSITY = 0.29, 0.5
"""Of the families' recipes, and of the dense references that are written out for them."""


@dataclass
class Family:
    """A base model and three experts on disk, and the models themselves."""

    root: Path
    kind: str
    base: Any
    experts: dict[str, Any]
    labels: dict[str, int]
    recipe: dict[str, Any] = field(default_factory=dict)


def make_family(
    root: Path, kind: str, labels: dict[str, int] | None = None, config: Mapping[str, Any] | None = None
) -> Family:
    """Save a tiny base model, an expert a task, and router rows; return them with a recipe."""
    labels = labels or {"cola": 2, "stsb": 1, "mnli": 3}
    base = tiny_classifier(kind, config=config)
    experts = {
        task: tiny_classifier(kind, n, seed, like=base, config=config)
        for seed, (task, n) in enumerate(labels.items(), 1)
    }
    base.save_pretrained(root / "base")
    tiny_tokenizer(kind).save_pretrained(root / "base")
    for task, expert in experts.items():
        expert.save_pretrained(root / task)
    write_router_rows(root / "router.jsonl", list(labels))
    recipe = {
        "base_model": str(root / "base"),
        "experts": {task: str(root / task) for task in labels},
        "shared": {"method": "task_arithmetic", "scaling": SCALING},
        "exclusive": {"density": DENSITY},
        "router": {"data": str(root / "router.jsonl"), "epochs": 5},
    }
    return Family(root, kind, base, experts, labels, recipe)


def make_causal_family(root: Path, kind: str) -> Family:
    """Save a tiny language model, three experts, and router rows; return them with a recipe."""
    return _language_family(root, kind, tiny_causal, tiny_causal_tokenizer())


def make_matrix_family(family: Family, root: Path) -> Family:
    """Save experts that differ from a family's base in the nn.Linear weights of their blocks alone: adapters hold them.

    Return them with the family's base, and a recipe.
    """
    experts = {}
    for seed, task in enumerate(family.experts, 1):
        torch.manual_seed(seed)
        model: Any = copy.deepcopy(family.base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layers." in name and parameter.ndim == 2:
                    parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(root / task)
        experts[task] = model
    router = {**family.recipe["router"], "epochs": 20, "top_k": 1, "layer": 0}  # it is sure of itself
    recipe = {**family.recipe, "experts": {task: str(root / task) for task in experts}, "router": router}
    return Family(family.root, family.kind, family.base, experts, {}, recipe)


def make_seq2seq_family(root: Path, kind: str) -> Family:
    """Save a tiny encoder-decoder, three experts, and router rows; return them with a recipe."""
    return _language_family(root, kind, tiny_seq2seq, tiny_seq2seq_tokenizer())


def _language_family(root: Path, kind: str, make: Any, tokenizer: Any) -> Family:
    base = make(kind)
    experts = {task: make(kind, seed, like=base) for seed, task in enumerate(("mmlu", "bbq", "cnn_dailymail"), 1)}
    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    write_router_rows(root / "router.jsonl", list(experts))
    recipe = {
        "base_model": str(root / "base"),
        "experts": {task: str(root / task) for task in experts},
        "shared": {"method": "task_arithmetic", "scaling": SCALING},
        "exclusive": {"density": DENSITY},
        "router": {"data": str(root / "router.jsonl"), "epochs": 5},
    }
    return Family(root, kind, base, experts, {}, recipe)


def built(recipe: Mapping[str, Any], directory: Path) -> Path:
    """Build the twin of a recipe in `directory`, and return that."""
    build_twin(Recipe.model_validate(recipe), directory)
    return directory


def alone(family: Family, root: Path) -> Path:
    """Build a twin of one expert, at full rank, in `root`: its router can say nothing but 1."""
    lines = (family.root / "router.jsonl").read_text().splitlines()
    (root / "rows.jsonl").write_text("\n".join(line for line in lines if '"mmlu"' in line))
    recipe = {
        **family.recipe,
        "experts": {"mmlu": family.recipe["experts"]["mmlu"]},
        "exclusive": {"density": 1.0},
        "router": {"data": str(root / "rows.jsonl"), "epochs": 1},
    }
    return built(recipe, root / "twin")
