"""python -m twin_bench.bench: the command `twin-bench bench`."""

import sys

from twin_bench.__main__ import main as run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run `twin-bench bench`; return the exit status."""
    return run(["bench", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
