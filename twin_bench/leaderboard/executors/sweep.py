"""A sweep: jobs are given to workers as these become free, and what becomes of them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from twin_bench.errors import InputError, first_line
from twin_bench.leaderboard.executors.failures import Failures
from twin_bench.leaderboard.executors.job import Job
from twin_bench.leaderboard.executors.pool import Pool
from twin_bench.leaderboard.executors.worker import Outcome, computed, joined
from twin_bench.leaderboard.tally import Tally

_log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How many workers may die at one job, or one after the other before they are ready."""
INTERVAL = 1.0
"""The seconds between two looks for new cells."""
LATE = 60.0
"""The seconds for which jobs wait until all workers are ready, once one is. Workers that come later get jobs then."""
UNSEEN = 30.0
"""The seconds after which a cell that a worker has written must be seen. NFS may show an old listing for a while."""


class Sweep:
    """Jobs that are computed by the workers of a pool.

    A job whose worker dies is given to another one, three times at most. A job that fails is passed over.
    """

    def __init__(self, pool: Pool, ticket: bytes, tally: Tally, failures: Failures) -> None:
        """Prepare to compute jobs of a run. `ticket` is a pickled `Ticket`."""
        self._pool, self._ticket, self._tally, self._failures = pool, ticket, tally, failures
        self._waiting: deque[Job] = deque()
        self._running: dict[Future[Outcome], tuple[int, Job | None]] = {}
        self._deaths = 0

    def run(self, jobs: Sequence[Job]) -> None:
        """Have the jobs computed. InputError for a bound that fails, or a worker that can't take part in the run."""
        self._waiting.extend(jobs)
        for number in range(min(self._pool.count(), len(jobs))):
            self._join(number)
        while not wait(self._running, timeout=LATE, return_when=FIRST_COMPLETED).done:
            _log.warning("no worker is ready yet: it reads all weights first, and on a cluster it waits for room")
        wait(self._running, timeout=LATE)
        while self._waiting or any(job for _, job in self._running.values()):
            done, _ = wait(self._running, timeout=INTERVAL, return_when=FIRST_COMPLETED)
            busy = [job for _, job in self._running.values() if job is not None]
            self._tally.working_on([job.lines[0] for job in busy])
            for job in busy:
                job.look(self._tally)
            for future in done:
                number, ended = self._running.pop(future)
                self._take(future, number, ended)

    def _join(self, number: int) -> None:
        """Have a worker make itself ready for the run."""
        self._running[self._pool.worker(number).call(joined, self._ticket)] = number, None

    def _take(self, future: Future[Outcome], number: int, job: Job | None) -> None:
        """Take the outcome of a call, and give the worker its next job."""
        worker = self._pool.worker(number)
        try:
            outcome = future.result()
        except worker.died:
            self._bury(number, job)
            return
        except Exception as error:
            raise InputError(
                f"a worker can't begin: {first_line(error)}; is this version of twin-bench installed on its machine?"
            ) from error
        if outcome.kind == "refused":
            raise InputError(outcome.reason)
        if job is None:
            self._deaths = 0
        else:
            self._close(job, outcome)
        if outcome.kind == "failed":  # an error of a GPU stays in the process
            self._pool.drop(number)
        if not self._waiting:
            return
        if outcome.kind == "failed":
            self._join(number)
            return
        job = self._waiting.popleft()
        self._running[worker.call(computed, self._ticket, *job.name)] = number, job

    def _bury(self, number: int, job: Job | None) -> None:
        """Put another worker in the place of one that has died, and give its job to the next one that is free."""
        self._pool.drop(number)
        if job is None:
            self._deaths += 1
            if self._deaths >= ATTEMPTS:
                raise InputError(
                    f"{self._deaths} workers have died before they were ready; is there memory for so many? --workers "
                    "says how many there are"
                )
        else:
            job.deaths += 1
            if job.deaths < ATTEMPTS:
                self._waiting.appendleft(job)
            else:
                reason = f"its worker has died {job.deaths} times: it was killed, or there was no memory left"
                self._close(job, Outcome("failed", reason))
        if self._waiting:
            self._join(number)

    def _close(self, job: Job, outcome: Outcome) -> None:
        """Note how a job has ended. InputError for a bound without cells: there is no table without it."""
        if outcome.kind == "done":
            self._require_seen(job)
            self._failures.forget(job)
            return
        failed, reason = outcome.kind == "failed", outcome.reason
        if failed:
            self._failures.write(job, outcome)
            reason = self._failures.read(job) or reason
        if job.bound:
            raise InputError(f"{job.name[1]}: {reason}")
        for line in job.lines:
            self._tally.pass_over(line, reason, failed=failed)

    def _require_seen(self, job: Job) -> None:
        """Wait until all cells of a finished job are seen. InputError where they are not."""
        until = time.monotonic() + UNSEEN
        while not job.look(self._tally):
            if time.monotonic() > until:
                place = job.unseen[0]
                raise InputError(
                    f"{place.cells.out}: a worker has written the cell of {place.method} on {place.task}, and it is "
                    "not there; --out must be a folder that all machines share"
                )
            time.sleep(0.1)
