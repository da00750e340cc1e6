"""The tasks: what a row is, how rows are read, and how answers are scored."""

from __future__ import annotations

from collections.abc import Mapping

from twin_bench.data.generative import GENERATIVE
from twin_bench.data.glue import GLUE
from twin_bench.data.task import Task

TASKS: Mapping[str, Task] = {**GLUE, **GENERATIVE}
"""Every task that a suite can score, by name."""
