"""python -m twin_bench.leaderboard: the command `twin-bench leaderboard`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from twin_bench import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `twin-bench leaderboard`; return the exit status."""
    return cli.main(["leaderboard", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
