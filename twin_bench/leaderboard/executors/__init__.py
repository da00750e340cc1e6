"""Executors: where the lines of a run are computed. In this process, in processes of this machine, or on Ray."""

from __future__ import annotations

from twin_bench.leaderboard.executors.executor import Executor, Given
from twin_bench.leaderboard.executors.local import Local
from twin_bench.leaderboard.executors.processes import Processes
from twin_bench.leaderboard.executors.ray import OnRay

__all__ = ["EXECUTORS", "Executor", "Given", "Local"]

EXECUTORS: dict[str, type[Executor]] = {"local": Local, "processes": Processes, "ray": OnRay}
"""The executors by the names that --executor takes."""
