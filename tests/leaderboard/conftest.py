"""What the leaderboard's tests share: a family of classifiers, a tiny suite of them and its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.families import Family
from tests.support.rows import TASKS, write_rows


@pytest.fixture(scope="session")
def family(families: Any) -> Family:
    return families("bert")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return rows that no test changes."""
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


@pytest.fixture(scope="session")
def tiny(family: Family, data: Path) -> dict[str, Any]:
    """Return a suite without its methods."""
    return {
        "name": "tiny",
        "base_model": family.recipe["base_model"],
        "experts": family.recipe["experts"],
        "data": str(data),
        "tasks": list(TASKS),
    }
