"""Workers on a Ray cluster. Ray is optional, and is imported when a cluster is asked for."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future
from types import ModuleType
from typing import Any, Self

import torch

from twin_bench.errors import InputError, first_line
from twin_bench.leaderboard.executors.executor import Given
from twin_bench.leaderboard.executors.pool import Worker
from twin_bench.leaderboard.executors.processes import QUIET
from twin_bench.leaderboard.executors.worker import Outcome
from twin_bench.leaderboard.executors.workers import Workers
from twin_bench.twin.device import AUTO

TIMEOUT = 10.0
"""The seconds in which a cluster must answer."""


class OnRay(Workers):
    """Gives lines to Ray actors. Each stays in its process, with the GPUs that it has been given.

    There are as many as the cluster has GPUs for, or processors where no GPU is used.
    """

    def __init__(self, given: Given) -> None:
        """Take what the command line says. InputError where Ray is not installed."""
        super().__init__(given)
        self._ray = _imported()
        self._gpus = 0.0
        self._named = ""

    def __enter__(self) -> Self:
        """Connect to the cluster, or start one on this machine. InputError for one that can't be reached."""
        address = self.given.address or os.environ.get("RAY_ADDRESS")
        self._named = f"--address {address or 'local'}"
        _require_reachable(address)
        settings = {"include_dashboard": None if address else False, "log_to_driver": False}
        try:
            self._ray.init(address=address, logging_level=logging.ERROR, **settings)
        except (Exception, SystemExit) as error:
            raise InputError(f"{self._named}: no Ray cluster is there ({first_line(error)})") from None
        self.closing.callback(self._ray.shutdown)  # after the workers have ended
        return super().__enter__()

    def device(self, asked: str | None) -> str:
        """Return cuda where workers have GPUs, else cpu, for `auto`. A worker checks that a device is there."""
        resources = self._ray.cluster_resources()
        there, given = float(resources.get("GPU", 0)), self.given.gpus_per_worker
        self._gpus = given if given is not None else float(there >= 1 and asked not in (None, "cpu"))
        if self._gpus < 0 or (self._gpus > 1 and self._gpus % 1):
            raise InputError(f"--gpus-per-worker {self._gpus:g}: give a part of one GPU, a whole number, or 0 for none")
        if self._gpus > there:
            raise InputError(
                f"{self._named}: --gpus-per-worker {self._gpus:g}: the cluster has {there:g} GPUs; give 0 for none"
            )
        self._require_room()
        if asked == AUTO:
            return "cuda" if self._gpus else "cpu"
        return asked or "cpu"

    def _require_room(self) -> None:
        """Raise an InputError unless some machine has room for one actor: Ray would wait for one for ever."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        needs = {"CPU": 1 if self._gpus else torch.get_num_threads(), "GPU": self._gpus}
        if not any(all(machine.get(kind, 0) >= least for kind, least in needs.items()) for machine in machines):
            raise InputError(
                f"{self._named}: a worker needs {needs['CPU']} processors and {needs['GPU']:g} GPUs, and no "
                "machine of the cluster has them; give a smaller OMP_NUM_THREADS, or --gpus-per-worker"
            )

    def count(self) -> int:
        """Return how many actors there are at most."""
        resources = self._ray.cluster_resources()
        kind, each = ("GPU", self._gpus) if self._gpus else ("CPU", torch.get_num_threads())
        return self.given.workers or max(1, math.floor(resources.get(kind, 0) / each))

    def start(self, number: int) -> Worker:
        """Start an actor."""
        threads = str(torch.get_num_threads())  # Ray would give it one for each processor of its own
        environment = {**QUIET, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        actor = self._ray.remote(Host).options(
            num_cpus=1 if self._gpus else torch.get_num_threads(),
            num_gpus=self._gpus,
            runtime_env={"env_vars": environment},
        )
        return RayWorker(self._ray, actor.remote())


class Host:
    """What runs in an actor's process."""

    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
        """Return what a function returns."""
        return function(*arguments)


class RayWorker(Worker):
    """An actor."""

    def __init__(self, ray: ModuleType, actor: Any) -> None:
        """Take an actor of a `Host`."""
        errors = ray.exceptions
        self.died = (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError)
        self._ray, self._actor = ray, actor

    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Future[Outcome]:
        """Run a function in the actor's process."""
        future: Future[Outcome] = self._actor.call.remote(function, *arguments).future()
        return future

    def end(self) -> None:
        """Kill the actor's process. Ray kills all that it has started."""
        self._ray.kill(self._actor)


def _imported() -> ModuleType:
    """Return the module of Ray. InputError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise InputError(f"--executor ray: {first_line(error)}; pip install 'twin-bench[ray]'") from None
    return ray


def _require_reachable(address: str | None) -> None:
    """Raise an InputError unless something answers at HOST:PORT or ray://HOST:PORT. Ray itself would wait for minutes.

    `auto`, and no address, stand for a cluster that Ray finds on this machine or starts.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if address in (None, AUTO, "local"):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--address {address}: no Ray cluster can be reached there ({first_line(error)}); give HOST:PORT, or start "
            "one: ray start --head"
        ) from None
