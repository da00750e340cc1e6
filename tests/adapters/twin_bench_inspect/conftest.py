"""A twin with a window that holds Inspect's prompts, and models of twins as Inspect makes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.model import Model, get_model

from tests.support.families import built


@pytest.fixture(scope="session")
def models(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a base model and an expert, mmlu, with windows of 1,024 tokens.

    Their positions are rotary and need no parameters.
    """
    narrow, root = causal_families("llama"), tmp_path_factory.mktemp("wide")
    for name in ("base", "mmlu"):
        shutil.copytree(narrow.root / name, root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    lines = (narrow.root / "router.jsonl").read_text().splitlines()
    (root / "rows.jsonl").write_text("\n".join(line for line in lines if '"mmlu"' in line))
    return root


@pytest.fixture(scope="session")
def alone(models: Path, causal_families: Any) -> Path:
    """Return a twin of that expert alone, at full rank: it computes what the expert's checkpoint computes."""
    recipe = {
        **causal_families("llama").recipe,
        "base_model": str(models / "base"),
        "experts": {"mmlu": str(models / "mmlu")},
        "exclusive": {"density": 1.0},
        "router": {"data": str(models / "rows.jsonl"), "epochs": 1},
    }
    return built(recipe, models / "twin")


@pytest.fixture
def served() -> Any:
    """Return a function from a twin's directory and arguments of -M to Inspect's model of it."""

    def make(directory: Path | str, **arguments: Any) -> Model:
        return get_model(f"twin_merged/{directory}", memoize=False, **{"device": "cpu", **arguments})

    return make
