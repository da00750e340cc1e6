"""Real worker processes, of which one is killed: the table is the local one bit for bit, and no process is left."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.board_figures import figures
from twin_bench.config import parse
from twin_bench.leaderboard.executors import EXECUTORS, Given, Local
from twin_bench.leaderboard.executors.workers import Workers
from twin_bench.leaderboard.run import run_suite
from twin_bench.leaderboard.suite import Suite
from twin_bench.merging.registry import methods

PLUGIN = """
import os, signal
from pathlib import Path
from twin_bench.contenders.context import static_contender
from twin_bench.merging.registry import served_method

@served_method(title="Mortal", paper="", track="data-free")
def mortal(context):
    '''The base model. The first worker that makes it is killed.'''
    died = Path({died!r})
    if os.getpid() != {command} and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield static_contender(context.sources.base, context.names, context)
"""


def running(marks: set[str]) -> list[str]:
    """Return the processes below this one whose command line has one of the marks."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(mark in " ".join(process.cmdline()) for mark in marks):
                found.append(" ".join(process.cmdline())[:80])
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file that the worker which is killed makes first."""
    return tmp_path_factory.mktemp("workers") / "died"


@pytest.fixture(scope="module")
def suite(tiny: dict[str, Any], died: Path) -> Iterator[Suite]:
    plugin = died.with_name("mortal.py")
    plugin.write_text(PLUGIN.format(died=str(died), command=os.getpid()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twin_bench.merging.registry.REGISTRY", dict(methods()))
        patch.setattr("twin_bench.merging.plugins._CONTENTS", {})  # other tests' plugins
        changes = {
            "tasks": ["cola", "mnli"],
            "rows": 12,
            "protocol": ["standard", "routed"],
            "plugins": [str(plugin)],
            "methods": ["average", "mortal", {"twin": {"exclusive": {"rank": 1}, "router": {"epochs": 1}}}],
        }
        yield parse(Suite, {**tiny, **changes}, "suite")


@pytest.fixture(scope="module")
def expected(suite: Suite, died: Path) -> dict[str, str]:
    """Return the local table, which is computed once."""
    out = died.with_name("local")
    return figures(run_suite(suite, out, executor=Local(Given())), out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["processes", "ray"])
def test_a_killed_worker_changes_no_bit_of_the_table(
    suite: Suite, expected: dict[str, str], died: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    died.unlink(missing_ok=True)
    if name == "ray":
        pytest.importorskip("ray")
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with EXECUTORS[name](Given(workers=2)) as executor:
        board = run_suite(suite, tmp_path / "out", executor=executor)
        assert isinstance(executor, Workers)
        asleep = executor.worker(0).call(time.sleep, 600)  # type: ignore[arg-type]  # what an interrupt would find
        assert running({"spawn_main", "ray::"})
    assert not running({"spawn_main", "ray::", "raylet", "gcs_server"})
    assert asleep.exception(10) is not None
    assert died.exists()
    assert figures(board, tmp_path / "out") == expected
