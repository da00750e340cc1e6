"""The benchmark of the scheduler, and what a long request list takes in memory."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from twin_bench.bench.scheduling import instant_twin, long_list, main
from twin_bench.twin.requests import score


def test_figures_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rows", "300", "--prefix", "20", "--top-k", "2"])
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows"], figures["top_k"]) == (300, 2)
    assert 300 * 28 <= figures["tokens"] <= 300 * 52
    assert min(figures[name] for name in ("seconds", "cpu_seconds", "megabytes")) >= 0


def test_a_lists_tokens_are_not_copied_again_and_again() -> None:
    """A token takes 8 bytes in a list and 4 packed. Two packed copies, and what a row takes whatever its length."""
    twin, requests = instant_twin(1056, top_k=1), long_list(400, 1024)
    score(twin, requests[:10], batch_size=64)
    tracemalloc.start()
    try:
        score(twin, requests, batch_size=64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 12 * sum(len(request.context) for request in requests)
