"""Worker processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import torch
from tqdm import tqdm

from twin_bench.leaderboard.executors.executor import Given
from twin_bench.leaderboard.executors.pool import Worker
from twin_bench.leaderboard.executors.worker import Outcome
from twin_bench.leaderboard.executors.workers import Workers

DEFAULT = 2
"""How many processes there are by default."""
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Environment variables of workers: all progress is in the command's own bar."""


class Processes(Workers):
    """Gives lines to processes of this machine, two by default. On a machine with several GPUs each has one of them."""

    def __init__(self, given: Given) -> None:
        """Take the number of workers. InputError for what is Ray's."""
        super().__init__(given)
        given.refuse("processes", "address", "gpus_per_worker")

    def count(self) -> int:
        """Return how many processes there are at most."""
        return self.given.workers or DEFAULT

    def start(self, number: int) -> Worker:
        """Start a process."""
        return ProcessWorker({**QUIET, **_own_gpu(number)})


class ProcessWorker(Worker):
    """A pool of one process. Where a process of a larger pool dies, all calls of the pool are lost."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Prepare a process with more environment variables. It starts with the first call."""
        self.died = (BrokenProcessPool,)
        spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may stand still
        self._pool = ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(environment,))
        self._processes: set[BaseProcess] = set()

    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Future[Outcome]:
        """Run a function in the process."""
        before = set(multiprocessing.active_children())
        with _deaf_to_interrupts():
            future = self._pool.submit(function, *arguments)
        self._processes |= set(multiprocessing.active_children()) - before
        return future

    def end(self) -> None:
        """Kill the process and all that it has started. What it was writing is removed by the next run."""
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        child.kill()
            process.kill()
        self._pool.shutdown(cancel_futures=True)


def _begin(environment: dict[str, str]) -> None:
    """Begin a worker process: it ends when the command does, however that ends."""
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore of the system, which a killed process would leave
    command = multiprocessing.parent_process()
    assert command is not None

    def end_with_the_command() -> None:
        command.join()
        os._exit(1)

    threading.Thread(target=end_with_the_command, name="twin-bench-command", daemon=True).start()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let no process that starts in the block hear a Ctrl-C, which a terminal sends to all: the command ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _own_gpu(number: int) -> dict[str, str]:
    """Return what gives a worker one of several GPUs, in turn; nothing where there are none or one."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(place) for place in range(torch.cuda.device_count())] if given is None else given.split(",")
    return {"CUDA_VISIBLE_DEVICES": names[number % len(names)]} if len(names) > 1 else {}
