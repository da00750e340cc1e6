"""Worker processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import torch
from tqdm import tqdm

from twin_bench.errors import InputError
from twin_bench.leaderboard.executors.executor import Given
from twin_bench.leaderboard.executors.pool import Worker
from twin_bench.leaderboard.executors.worker import Outcome
from twin_bench.leaderboard.executors.workers import Workers
from twin_bench.processes import deaf_to_interrupts, end_with_the_command

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

    def device(self, asked: str | None) -> str:
        """Return the device of all workers. InputError for one of several GPUs: each worker is given its own."""
        if (asked or "").startswith("cuda:") and _own_gpu(0):
            raise InputError(f"--device {asked}: the processes take the GPUs in turn; give cuda, or --executor local")
        return super().device(asked)

    def start(self, number: int) -> Worker:
        """Start a process."""
        return ProcessWorker(_own_gpu(number))


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
        try:
            with deaf_to_interrupts(), _environment(QUIET):  # read by libraries as they are imported
                future = self._pool.submit(function, *arguments)
        except BrokenProcessPool as error:  # it has died since its last call
            future = Future()
            future.set_exception(error)
        self._processes |= set(multiprocessing.active_children()) - before
        return future

    def end(self) -> None:
        """Kill the process and all that it has started. What it was writing is removed by the next run."""
        for process in (one for one in self._processes if one.is_alive()):
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
    end_with_the_command()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have processes that start in the block begin with these environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _own_gpu(number: int) -> dict[str, str]:
    """Return what gives a worker one of several GPUs, in turn; nothing where there are none or one."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(place) for place in range(torch.cuda.device_count())] if given is None else given.split(",")
    return {"CUDA_VISIBLE_DEVICES": names[number % len(names)]} if len(names) > 1 else {}
