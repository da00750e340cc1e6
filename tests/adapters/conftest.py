"""Twins of language models that harnesses are asked about."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.support import families

collect_ignore = [] if importlib.util.find_spec("inspect_ai") else ["twin_bench_inspect"]
"""Inspect can't be installed beside HELM: `make test-inspect` has an environment of its own."""


@pytest.fixture
def three(causal_twins: Any) -> Path:
    return causal_twins("llama")


@pytest.fixture(scope="session")
def alone(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a twin of one expert, at full rank."""
    return families.alone(causal_families("llama"), tmp_path_factory.mktemp("alone"))
