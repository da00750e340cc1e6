"""The documents of results: each figure comes from a committed file, by the command that stands beside it."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted(
    path for path in (ROOT / "leaderboards" / "results").glob("*.md") if ">>>" in path.read_text(encoding="utf-8")
)
LONGEST = 150


@pytest.mark.parametrize("document", RESULTS, ids=lambda path: path.name)
def test_the_commands_of_a_document_print_its_figures(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where a reader runs `python -m doctest leaderboards/results/NAME.md`
    found = doctest.testfile(str(document), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("document", RESULTS, ids=lambda path: path.name)
def test_a_document_of_results_is_short(document: Path) -> None:
    assert len(document.read_text(encoding="utf-8").splitlines()) <= LONGEST
