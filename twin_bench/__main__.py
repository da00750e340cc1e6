"""The twin-bench command, which is also python -m twin_bench."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing or __future__ takes as long as an interrupt needs to fall into it
    from collections.abc import Sequence


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run `twin_bench.cli.main`. An interrupt ends in one line also while the command line itself is being imported."""
    try:
        from twin_bench.cli import main as run

        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
