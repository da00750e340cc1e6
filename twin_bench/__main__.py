"""python -m twin_bench: the twin-bench command."""

import sys

from twin_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
