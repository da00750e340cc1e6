"""How a test chooses the way in which a twin runs its rows."""

from __future__ import annotations

from dataclasses import replace

from twin_bench.twin.model import TwinModel

FUSION_SECONDS = {"fused": 0.0, "low-rank": 1e12}


def force_path(twin: TwinModel, path: str) -> None:
    """Let the planner fuse all rows, or none (`low-rank`), or choose for itself (`planned`)."""
    if path in FUSION_SECONDS:
        experts, fusion = len(twin.costs.fuse), FUSION_SECONDS[path]
        forced = {"fuse": (fusion,) * experts, "rebuild": fusion, "columns": (1.0,) * experts, "joint": 1.0}
        twin.costs = replace(twin.costs, **forced)  # type: ignore[misc, arg-type]
