"""What every test may ask for: families of tiny models, made once; and where the real rows and experts are."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils import collect_env

from tests.support.families import (
    Family,
    built,
    make_causal_family,
    make_family,
    make_matrix_family,
    make_seq2seq_family,
)
from tests.support.models import tiny_causal_tokenizer

torch.set_num_threads(1)  # tiny models: a second thread only waits
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from kind to its family, each made once."""
    return functools.cache(lambda kind: make_family(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="session")
def causal_families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from kind to its family of language models, each made once."""
    return functools.cache(lambda kind: make_causal_family(tmp_path_factory.mktemp(f"causal-{kind}"), kind))


@pytest.fixture(scope="session")
def twins(families: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from kind to the directory of its family's twin, each built once, for reading alone."""
    return functools.cache(lambda kind: built(families(kind).recipe, tmp_path_factory.mktemp("twin") / "twin"))


@pytest.fixture(scope="session")
def causal_twins(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from kind of language model to the directory of its family's twin, likewise."""
    return functools.cache(lambda kind: built(causal_families(kind).recipe, tmp_path_factory.mktemp("twin") / "twin"))


@pytest.fixture(scope="session")
def matrix_family(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Return tiny Qwen2s whose experts change matrices of the blocks alone, which adapters hold whole."""
    return make_matrix_family(causal_families("qwen2"), tmp_path_factory.mktemp("matrices"))


@pytest.fixture(scope="session")
def matrix_twin(matrix_family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of that family's twin, for reading alone."""
    return built(matrix_family.recipe, tmp_path_factory.mktemp("matrix-twin") / "twin")


@pytest.fixture(scope="session")
def seq2seq_families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from kind to its family of encoder-decoders, each made once."""
    return functools.cache(lambda kind: make_seq2seq_family(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="session")
def seq2seq_twins(seq2seq_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from kind of encoder-decoder to the directory of its family's twin, likewise."""
    return functools.cache(lambda kind: built(seq2seq_families(kind).recipe, tmp_path_factory.mktemp("twin") / "twin"))


@pytest.fixture(scope="session", autouse=True)
def environment_told_once() -> Iterator[None]:
    """Describe the machine once: lm-eval does with every result, and runs pip, lscpu and others for it."""
    told = functools.cache(collect_env.get_pretty_env_info)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", told)
        yield


@pytest.fixture(scope="session")
def wide_llama(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Return the tiny Llamas with a window that holds a summary's 128 tokens (rotary positions need no parameters).

    The letters' rows of the (tied) embeddings are large, so that letters are what they answer and scores differ.
    """
    letters = [tiny_causal_tokenizer().convert_tokens_to_ids(letter) for letter in "ABC"]
    narrow, root = causal_families("llama"), tmp_path_factory.mktemp("wide")
    for name in ("base", *narrow.experts):
        shutil.copytree(narrow.root / name, root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
        tensors = load_file(root / name / "model.safetensors")
        tensors["model.embed_tokens.weight"][letters] *= 20
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
    recipe = {"base_model": str(root / "base"), "experts": {task: str(root / task) for task in narrow.experts}}
    return dataclasses.replace(narrow, root=root, recipe=recipe)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the directory of real rows; tests with it are marked real."""
    return Path(os.environ["TWIN_BENCH_DATA"])


@pytest.fixture(scope="session")
def real_experts() -> Path:
    """Return the directory of real experts; tests with it are marked real."""
    return Path(os.environ["TWIN_BENCH_EXPERTS"])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests that need a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect (never count as passed) the real-row tests where there are no real rows."""
    if {"TWIN_BENCH_DATA", "TWIN_BENCH_EXPERTS"} <= os.environ.keys():
        return
    real = [item for item in items if item.get_closest_marker("real")]
    config.hook.pytest_deselected(items=real)
    items[:] = [item for item in items if item not in real]
