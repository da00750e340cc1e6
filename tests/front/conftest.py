"""An export of the format vllm, opened once."""

from __future__ import annotations

from pathlib import Path

import pytest

from twin_bench.export.run import export_twin
from twin_bench.front.routing import PromptRouter


@pytest.fixture(scope="session")
def exported(matrix_twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "out"
    export_twin(matrix_twin, out, to="vllm", weights=["calm=0.5,0.5,0"])
    return out


@pytest.fixture(scope="session")
def router(exported: Path) -> PromptRouter:
    return PromptRouter.open(exported)
