"""One line after the other, in this process."""

from __future__ import annotations

from twin_bench.errors import NotFiniteError, UnsuitedError
from twin_bench.leaderboard.executors.executor import Executor, Given
from twin_bench.leaderboard.ready import Ready
from twin_bench.leaderboard.scoring import cells_of
from twin_bench.leaderboard.tally import Tally


class Local(Executor):
    """Computes one line after the other in this process. An error ends the run, and the finished cells are kept."""

    def __init__(self, given: Given) -> None:
        """Take nothing: all options are for workers."""
        super().__init__(given)
        given.refuse("local", "workers", "address", "gpus_per_worker", "retry")

    def compute(self, ready: Ready, tally: Tally) -> None:
        """Compute the lines in the suite's order."""
        for line in ready.work:
            protocol, entry = line
            tally.working_on([line])
            try:
                for cell in cells_of(ready.run, entry, protocol):
                    tally.add(line, cell)
            except (UnsuitedError, NotFiniteError) as error:
                if entry.track == "bound":
                    raise
                tally.pass_over(line, str(error))
            tally.complete(line)
