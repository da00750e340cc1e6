"""twin-bench tasks."""

from __future__ import annotations

import argparse

from twin_bench.paths import tasks_directory

SUMMARY = 'print the folder of the lm-eval tasks: lm_eval --include_path "$(twin-bench tasks)"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command takes no arguments."""


def run(options: argparse.Namespace) -> None:
    """Print the folder."""
    print(tasks_directory())
