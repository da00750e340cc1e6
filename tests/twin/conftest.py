"""Twins of tiny language models whose router is sure of itself, each built once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.support.families import built


@pytest.fixture(scope="session")
def sharp_twins(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a kind to a twin whose router gives one expert all weight.

    Many of its rows have equal weights, and only those can share keys and values.
    """

    @functools.cache
    def directory(kind: str) -> Path:
        recipe = causal_families(kind).recipe
        router = {**recipe["router"], "epochs": 20, "top_k": 1, "layer": 0}
        return built({**recipe, "router": router}, tmp_path_factory.mktemp(f"sharp-twin-{kind}") / "twin")

    return directory
