"""Twins of tiny language models, each built once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe


@pytest.fixture(scope="session")
def twins(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a kind of language model to the directory of its twin."""
    built: dict[str, Path] = {}

    def directory(kind: str) -> Path:
        if kind not in built:
            built[kind] = tmp_path_factory.mktemp(f"causal-twin-{kind}") / "twin"
            build_twin(Recipe.model_validate(causal_families(kind).recipe), built[kind])
        return built[kind]

    return directory


@pytest.fixture(scope="session")
def sharp_twins(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a kind to a twin whose router gives one expert all weight.

    Many of its rows have equal weights, and only those can share keys and values.
    """
    built: dict[str, Path] = {}

    def directory(kind: str) -> Path:
        if kind not in built:
            recipe = causal_families(kind).recipe
            router = {**recipe["router"], "epochs": 20, "top_k": 1, "layer": 0}
            built[kind] = tmp_path_factory.mktemp(f"sharp-twin-{kind}") / "twin"
            build_twin(Recipe.model_validate({**recipe, "router": router}), built[kind])
        return built[kind]

    return directory
