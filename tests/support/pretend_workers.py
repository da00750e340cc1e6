"""Worker processes that are pretended: calls run in threads of this process, one at a time, and may die."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from twin_bench.leaderboard.executors import Given
from twin_bench.leaderboard.executors.pool import Worker
from twin_bench.leaderboard.executors.worker import Outcome
from twin_bench.leaderboard.executors.workers import Workers


class Killed(Exception):  # noqa: N818 (what happens to a process)
    """The end of a pretended process."""


class PretendWorkers(Workers):
    """Two workers in threads. `dies` says of a call's arguments, after the ticket, whether the process dies at it."""

    def __init__(self, dies: Callable[..., bool] = lambda *_: False, **given: Any) -> None:
        super().__init__(Given(**given))
        self.dies, self.calls = dies, list[tuple[Any, ...]]()
        self.started = self.ended = 0
        self.one_at_a_time = threading.Lock()

    def count(self) -> int:
        return 2

    def start(self, number: int) -> Worker:
        self.started += 1
        return PretendWorker(self)


class PretendWorker(Worker):
    """A thread."""

    died = (Killed,)

    def __init__(self, owner: PretendWorkers) -> None:
        self._owner, self._pool = owner, ThreadPoolExecutor(1)

    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Future[Outcome]:
        return self._pool.submit(self._called, function, *arguments)

    def _called(self, function: Callable[..., Outcome], ticket: bytes, *line: Any) -> Outcome:
        with self._owner.one_at_a_time:
            self._owner.calls.append(line)
            if self._owner.dies(*line):
                raise Killed
            return function(ticket, *line)

    def end(self) -> None:
        self._owner.ended += 1
        self._pool.shutdown()
