"""python -m twin_bench.bench: the command `twin-bench bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from twin_bench import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `twin-bench bench`; return the exit status."""
    return cli.main(["bench", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
