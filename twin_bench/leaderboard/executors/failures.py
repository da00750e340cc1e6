"""The errors that ended lines of a run, kept on disk: a line that has failed is not computed again unasked."""

from __future__ import annotations

from pathlib import Path

from twin_bench.files import digest, read_record, write_record
from twin_bench.leaderboard.executors.job import Job
from twin_bench.leaderboard.executors.worker import Outcome

FORMAT = 1
"""The format of a failure's record."""


class Failures:
    """The failures of one leaderboard directory. A job is known by the keys of its cells."""

    def __init__(self, out: Path) -> None:
        """Read and write `out`/failed."""
        self._folder = out / "failed"

    def read(self, job: Job) -> str | None:
        """Return why a job has failed in an earlier run, and what to do; None if it has not."""
        file = self._file(job)
        stored = read_record(file, format_number=FORMAT)
        return None if stored is None else f"{stored['reason']} ({file} has the traceback; --retry computes it again)"

    def write(self, job: Job, outcome: Outcome) -> None:
        """Keep how a job has failed."""
        protocol, label = job.name
        content = {"protocol": protocol, "method": label, "reason": outcome.reason, "traceback": outcome.trace}
        write_record(self._file(job), content, format_number=FORMAT)

    def forget(self, job: Job) -> None:
        """Remove what is kept of a job: it is to be computed again, or was."""
        self._file(job).unlink(missing_ok=True)

    def _file(self, job: Job) -> Path:
        protocol, label = job.name
        return self._folder / protocol / f"{label}-{digest(job.keys)[:16]}.json"
