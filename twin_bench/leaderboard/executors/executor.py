"""The interface of an executor, which computes the lines of a run."""

from __future__ import annotations

import abc
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from twin_bench.errors import InputError
from twin_bench.leaderboard.ready import Ready
from twin_bench.leaderboard.tally import Tally
from twin_bench.twin.device import usable_device


@dataclass(frozen=True)
class Given:
    """What the command line says of an executor. None is what was not said.

    - `workers`: how many processes compute lines.
    - `address`: of a Ray cluster.
    - `gpus_per_worker`: how many GPUs each worker has, or what part of one.
    - `retry`: compute again what failed in an earlier run.
    """

    workers: int | None = None
    address: str | None = None
    gpus_per_worker: float | None = None
    retry: bool = False

    def refuse(self, executor: str, *names: str) -> None:
        """Raise an InputError for an option that an executor does not take."""
        for name in names:
            if getattr(self, name) not in (None, False):
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option}: --executor {executor} does not take it; leave it out")


class Executor(abc.ABC):
    """Computes the lines of a run, each an entry under a protocol, and tells a tally of what it has computed.

    It is opened once and may compute several runs, one inside the other: options are tuned on runs of their own.
    `closing` holds what is done when it is closed.
    """

    def __init__(self, given: Given) -> None:
        """Take what the command line says. InputError for an option that this executor does not take."""
        self.given = given
        self.closing = ExitStack()

    def __enter__(self) -> Self:
        """Open it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it. No process that it has started is left."""
        self.closing.close()

    def device(self, asked: str | None) -> str:
        """Return the device that models are computed on. InputError for one that is not there."""
        return str(usable_device(asked))

    @abc.abstractmethod
    def compute(self, ready: Ready, tally: Tally) -> None:
        """Compute those of a run's lines that are not there yet, and tell the tally of all."""
