"""Worker processes, and a pool of them."""

from __future__ import annotations

import abc
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from twin_bench.leaderboard.executors.worker import Outcome


class Worker(abc.ABC):
    """A process that runs calls, one after the other. `died` are the errors of a call whose process has ended."""

    died: tuple[type[BaseException], ...]

    @abc.abstractmethod
    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Future[Outcome]:
        """Run a function in the process."""

    @abc.abstractmethod
    def end(self) -> None:
        """End the process at once, and all that it has started."""


class Pool(abc.ABC):
    """Workers with numbers from 0. They stay until all are ended."""

    def __init__(self) -> None:
        self._workers: dict[int, Worker] = {}

    @abc.abstractmethod
    def count(self) -> int:
        """Return how many workers there are at most."""

    @abc.abstractmethod
    def start(self, number: int) -> Worker:
        """Start the worker of a number."""

    def drop(self, number: int) -> None:
        """End the worker of a number. The next call of `worker` starts another one."""
        if number in self._workers:
            self._workers.pop(number).end()

    def worker(self, number: int) -> Worker:
        """Return the worker of a number, started unless it is there."""
        if number not in self._workers:
            self._workers[number] = self.start(number)
        return self._workers[number]

    def end_all(self) -> None:
        """End all workers."""
        while self._workers:
            self._workers.popitem()[1].end()
