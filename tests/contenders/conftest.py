"""A tiny suite of classifiers without its methods, and its rows."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.rows import TASKS, write_rows


@pytest.fixture(scope="session")
def tiny(families: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    recipe = families("bert").recipe
    data = write_rows(tmp_path_factory.mktemp("rows") / "data")
    models = {key: recipe[key] for key in ("base_model", "experts")}
    return {"name": "tiny", "data": str(data), "tasks": list(TASKS), **models}
