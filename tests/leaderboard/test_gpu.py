"""A tiny leaderboard on a CUDA device: twins are built and scored there, and the scores are the CPU's."""

import pytest

from tests.support.rows import write_rows
from twin_bench.leaderboard.run import RunOptions, run_suite
from twin_bench.leaderboard.suite import Suite

pytestmark = pytest.mark.gpu


def test_a_suites_scores_are_those_of_the_cpu(families, tmp_path):
    family = families("bert")
    suite = Suite.model_validate(
        {
            "name": "tiny",
            "base_model": family.recipe["base_model"],
            "experts": family.recipe["experts"],
            "data": str(write_rows(tmp_path / "data")),
            "tasks": list(family.labels),
            "protocol": ["standard", "paper", "routed"],
            "methods": ["task_arithmetic", {"twin": {"router": {"epochs": 2}}}],
        }
    )
    scores = []
    for device in ("cpu", "cuda"):
        board = run_suite(suite, tmp_path / device, RunOptions(device=device))
        assert not board.skipped
        assert board.identity["device"].startswith(device)
        scores.append({(cell.protocol, cell.method, cell.task): cell.score for cell in board.cells})
    cpu, gpu = scores
    assert gpu.keys() == cpu.keys()
    for cell, score in cpu.items():
        # The routers are trained on features of either device, and a row near a head's threshold can change sides.
        assert gpu[cell] == pytest.approx(score, abs=1e-3 if cell[1] != "twin" else 10), cell
