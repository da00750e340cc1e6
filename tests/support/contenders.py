"""What answers for an entry of a suite, as the leaderboard makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.rows import task_rows
from twin_bench.checkpoints.sources import open_sources
from twin_bench.contenders import Contender, Context, contenders
from twin_bench.leaderboard.suite import Suite
from twin_bench.protocols import ProtocolName


def all_served(
    suite: dict[str, Any],
    label: str,
    folder: Path,
    rows: int | None = None,
    protocol: ProtocolName = "standard",
    device: str = "cpu",
) -> list[Contender]:
    """Return the contenders of one entry of a suite."""
    checked = Suite.model_validate(suite)
    (entry,) = (entry for entry in checked.entries() if entry.label == label)
    context = Context(
        name=entry.method.name,
        settings=entry.settings(checked.seed),
        protocol=protocol,
        tasks=tuple(task_rows(Path(str(checked.data)), *checked.tasks)),
        base_model=checked.base_model,
        experts=checked.expert_paths,
        sources=open_sources(checked.base_model, checked.expert_paths),
        workspace=folder,
        router=checked.router,
        protocols=tuple({*checked.protocol, protocol}),
        rows=rows,
        seed=checked.seed,
        max_length=checked.max_length,
        dtype=checked.dtype,
        calibration_rows=checked.calibration_rows,
        device=device,
    )
    return list(contenders(entry.method, context))


def served(suite: dict[str, Any], label: str, folder: Path, rows: int | None = None, device: str = "cpu") -> Contender:
    """Return the one contender of an entry."""
    (made,) = all_served(suite, label, folder, rows, device=device)
    return made
