"""python -m twin_bench.bench."""

import sys

from twin_bench.bench import main

sys.exit(main())
