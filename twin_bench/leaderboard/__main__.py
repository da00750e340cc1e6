"""python -m twin_bench.leaderboard: the command `twin-bench leaderboard`."""

import sys

from twin_bench.__main__ import main as run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run `twin-bench leaderboard`; return the exit status."""
    return run(["leaderboard", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
