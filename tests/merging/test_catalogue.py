"""The catalogue page is what the headers say, today."""

from __future__ import annotations

import pytest

import twin_bench
from twin_bench.cli import main
from twin_bench.paths import leaderboards_directory


def test_the_committed_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--markdown"]) == 0
    page = leaderboards_directory() / "METHODS.md"
    assert page.read_text() == capsys.readouterr().out, f"run twin-bench methods --markdown > {page.name}"


def test_every_method_is_there_with_its_formula() -> None:
    page = (leaderboards_directory() / "METHODS.md").read_text()
    assert page.count("\n### ") == len(twin_bench.methods())
    for name, method in twin_bench.methods().items():
        entry = page.partition(f"\n### {name}: {method.title}\n")[2].partition("\n### ")[0]
        assert method.formula
        assert method.formula in entry
        assert all(f"{option}={value!r}" in entry for option, value in method.defaults.items())
        assert all(need in entry for need in method.needs)
        assert f"arxiv.org/abs/{method.paper.removeprefix('arXiv:')})" in entry or not method.paper
