"""Executors that give lines to worker processes, and read the cells from the directory of results."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch

from twin_bench.contenders.references import ReferenceMethod
from twin_bench.errors import InputError, NotFiniteError, UnsuitedError
from twin_bench.files import write_text
from twin_bench.leaderboard.board import finished
from twin_bench.leaderboard.executors.executor import Executor, Given
from twin_bench.leaderboard.executors.failures import Failures
from twin_bench.leaderboard.executors.job import Job, job_of
from twin_bench.leaderboard.executors.pool import Pool
from twin_bench.leaderboard.executors.sweep import Sweep
from twin_bench.leaderboard.executors.worker import Ticket
from twin_bench.leaderboard.ready import Ready
from twin_bench.leaderboard.scoring import cells_of
from twin_bench.leaderboard.tally import Tally
from twin_bench.merging.plugins import loaded_plugins
from twin_bench.results.cells import installed_versions


class Workers(Pool, Executor):
    """Gives lines to worker processes. What kind of process they are is a subclass's to say.

    All that decides a score is in a worker what it is in the command: code, keys, files, versions, threads. Workers
    stay until the executor is closed.
    """

    def __init__(self, given: Given) -> None:
        """Take what the command line says."""
        Pool.__init__(self)
        Executor.__init__(self, given)

    def __enter__(self) -> Self:
        """Open it. Workers start when there are lines for them."""
        self.closing.callback(self.end_all)
        return self

    def compute(self, ready: Ready, tally: Tally) -> None:
        """Have the lines computed, and tell the tally of all.

        A line that fails is passed over and kept in `Failures`: it is computed again with `retry`. References take no
        time and are answered here.

        Raises:
            InputError: a bound fails, or a worker does not see what the command sees.
        """
        failures = Failures(ready.run.out)
        jobs = self._jobs(ready, tally, failures)
        if jobs:
            with _ticket(ready) as ticket:
                try:
                    Sweep(self, ticket, tally, failures).run(jobs)
                except BaseException:
                    self.end_all()  # others may still compute lines of this sweep
                    raise
        for line in ready.work:
            protocol, entry = line
            reference = isinstance(entry.method, ReferenceMethod)
            for cell in cells_of(ready.run, entry, protocol) if reference else finished(ready.run, entry, protocol):
                tally.add(line, cell)
            tally.complete(line)

    def _jobs(self, ready: Ready, tally: Tally, failures: Failures) -> list[Job]:
        """Return what is to be computed. Lines that have failed before are passed over, unless they are to be retried.

        Options are chosen here, on runs whose lines the same workers compute.
        """
        run, jobs = ready.run, dict[tuple[str, str], Job]()
        for line in ready.work:
            protocol, entry = line
            place = run.computed_under(entry, protocol), entry.label
            if isinstance(entry.method, ReferenceMethod):
                continue
            if place in jobs:
                jobs[place].lines.append(line)
                continue
            try:
                jobs[place] = job_of(run, line)
            except (UnsuitedError, NotFiniteError) as error:
                tally.pass_over(line, str(error))
            except InputError as error:  # a trial has failed, and its own record keeps the traceback
                tally.pass_over(line, str(error), failed=True)
        wanted = []
        for job in jobs.values():
            if job.look(tally):
                continue
            if self.given.retry or job.bound:
                failures.forget(job)
            reason = failures.read(job)
            if reason is None:
                wanted.append(job)
            else:
                for line in job.lines:
                    tally.pass_over(line, reason, failed=True)
        return wanted


@contextmanager
def _ticket(ready: Ready) -> Iterator[bytes]:
    """Give the ticket of a run. In the block its mark is in the directory of results, by which a worker knows it."""
    run = ready.run
    name, text = f".workers-{uuid.uuid4().hex}", uuid.uuid4().hex
    ticket = Ticket(
        suite=ready.suite,
        out=run.out,
        options=ready.options,
        plugins=tuple(loaded_plugins()),
        folder=os.getcwd(),
        mark=(name, text),
        inputs=run.inputs,
        versions=dict(installed_versions()),
        threads=torch.get_num_threads(),
        started=run.started,
    )
    write_text(run.out / name, text)
    try:
        yield pickle.dumps(ticket)
    finally:
        (run.out / name).unlink(missing_ok=True)
