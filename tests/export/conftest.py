"""A twin whose experts change matrices of the blocks alone, which adapters hold whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.families import Family, built


@pytest.fixture(scope="session")
def matrix_family(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Return tiny Qwen2s whose experts differ from the base in the nn.Linear weights of their blocks alone."""
    family, root = causal_families("qwen2"), tmp_path_factory.mktemp("matrices")
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
    paths = {task: str(root / task) for task in experts}
    recipe = {**family.recipe, "experts": paths, "exclusive": {"density": 0.5}}
    return Family(family.root, "qwen2", family.base, experts, {}, recipe)


@pytest.fixture(scope="session")
def matrix_twin(matrix_family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(matrix_family.recipe, tmp_path_factory.mktemp("matrix-twin") / "twin")
