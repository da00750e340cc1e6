"""Which process computes a job: one that has died or failed is not asked again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twin_bench.leaderboard.executors import processes
from twin_bench.leaderboard.executors.failures import Failures
from twin_bench.leaderboard.executors.job import Job
from twin_bench.leaderboard.executors.pool import Pool, Worker
from twin_bench.leaderboard.executors.processes import ProcessWorker
from twin_bench.leaderboard.executors.sweep import Sweep
from twin_bench.leaderboard.executors.worker import Outcome


class DiedError(Exception):
    """The end of a process."""


class Numbered(Worker):
    """A worker with a number of its own, which says how each call ends."""

    died = (DiedError,)

    def __init__(self, pool: NumberedPool, own: int) -> None:
        self.pool, self.own = pool, own

    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Future[Outcome]:
        line = arguments[2] if len(arguments) > 1 else "join"
        self.pool.calls.append((self.own, line))
        future: Future[Outcome] = Future()
        if self.own in self.pool.dead:
            future.set_exception(DiedError())
        else:
            future.set_result(Outcome("failed", "the card", "trace") if line == "bad" else Outcome("done"))
        return future

    def end(self) -> None:
        self.pool.ended.append(self.own)


class NumberedPool(Pool):
    """Workers that are numbered as they are started, `count` at a time. `dead` are those whose process has ended."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self.started, self.ended, self.dead = 0, list[int](), set[int]()
        self.calls = list[tuple[int, str]]()

    def count(self) -> int:
        return self._count

    def start(self, number: int) -> Worker:
        self.started += 1
        return Numbered(self, self.started - 1)

    def computed(self) -> dict[str, int]:
        """Return the worker of each line."""
        return {line: own for own, line in self.calls if line != "join"}


class Quiet:
    """A tally that keeps what was passed over."""

    def __init__(self) -> None:
        self.failed = list[str]()

    def working_on(self, lines: Any) -> None:
        pass

    def pass_over(self, line: Any, reason: str, failed: bool = False) -> None:
        self.failed.append(line[1].label)


def sweep(pool: Pool, out: Path, *labels: str) -> list[str]:
    """Compute a job of each label, and return the labels of those that failed."""
    entries: list[Any] = [SimpleNamespace(label=label, track="data-free") for label in labels]
    tally: Any = Quiet()
    Sweep(pool, b"", tally, Failures(out)).run([Job([("standard", entry)], [entry.label], []) for entry in entries])
    return tally.failed


def test_a_worker_that_dies_between_two_sweeps_is_replaced(tmp_path: Path) -> None:
    pool = NumberedPool(2)
    assert not sweep(pool, tmp_path, "a", "b")
    pool.dead = {0, 1}
    assert not sweep(pool, tmp_path, "c", "d")
    assert set(pool.computed().values()) == {0, 1, 2, 3}
    assert sorted(pool.ended) == [0, 1]


def test_a_process_that_failed_computes_nothing_more(tmp_path: Path) -> None:
    """An error of a GPU stays in its process, and would fail all lines that come after."""
    pool = NumberedPool(1)
    assert sweep(pool, tmp_path, "a", "bad", "b", "c") == ["bad"]
    assert pool.computed() == {"a": 0, "bad": 0, "b": 1, "c": 1}
    assert pool.ended == [0]
    assert (1, "join") in pool.calls  # it sees what the command sees, as the first one does
    assert sweep(pool, tmp_path, "bad") == ["bad"]
    assert pool.ended == [0, 1]
    assert pool.started == 2  # none is started for nothing
    assert not sweep(pool, tmp_path, "d")
    assert pool.computed()["d"] == 2


def test_a_cluster_that_is_busy_is_not_waited_for_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray starts an actor when there is room for it, and says nothing until then."""

    class Late(Numbered):
        def call(self, function: Callable[..., Outcome], *arguments: Any) -> Future[Outcome]:
            ready = super().call(function, *arguments)
            if len(arguments) > 1:
                return ready
            late: Future[Outcome] = Future()
            threading.Timer(0.2, late.set_result, [ready.result()]).start()
            return late

    monkeypatch.setattr("twin_bench.leaderboard.executors.sweep.LATE", 0.05)
    pool = NumberedPool(1)
    monkeypatch.setattr(pool, "start", lambda number: Late(pool, number))
    assert not sweep(pool, tmp_path, "a")
    assert pool.computed() == {"a": 0}
    assert "no worker is ready yet" in caplog.text


class StubPool:
    """A pool of one process that is not there. It keeps the environment that a process would begin with."""

    seen: dict[str, str]
    broken = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def submit(self, *arguments: Any) -> Future[Outcome]:
        if StubPool.broken:
            raise BrokenProcessPool("it has ended")
        StubPool.seen = dict(os.environ)
        return Future()


def test_a_process_that_has_ended_is_told_as_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", StubPool)
    monkeypatch.setattr(StubPool, "broken", True)
    worker = ProcessWorker({})
    assert isinstance(worker.call(Outcome, "done").exception(0), worker.died)


def test_processes_begin_without_bars_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries read these variables as they are imported: the initializer of a process would come too late."""
    monkeypatch.setattr(processes, "ProcessPoolExecutor", StubPool)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    ProcessWorker({}).call(Outcome, "done")
    assert (StubPool.seen["TQDM_DISABLE"], StubPool.seen["HF_HUB_DISABLE_PROGRESS_BARS"]) == ("1", "1")
    assert os.environ["TQDM_DISABLE"] == "0"
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
