"""docs/suites.md names every key, and its examples are read as they stand."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from tests.support.interpreter import ROOT
from twin_bench.leaderboard.suite import Suite, read_suite
from twin_bench.leaderboard.tasks import TaskSettings
from twin_bench.twin.recipe import RouterSettings

TEXT = (ROOT / "docs" / "suites.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("heading", "settings"),
    [("Keys of a suite", Suite), ("Keys of a task", TaskSettings), ("Router", RouterSettings)],
)
def test_every_key_is_in_its_table(heading: str, settings: type[Suite | TaskSettings | RouterSettings]) -> None:
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    named = {key for row in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE) for key in re.findall("`(.*?)`", row)}
    assert named == settings.model_fields.keys()


@pytest.mark.parametrize(
    ("name", "owners", "metric"),
    [
        ("desk", ["math", "math", "code", "desk", None], ("humaneval_instruct", "pass@1,create_test")),
        ("texts", ["tox", "sim"], ("toxicity", "f1")),
    ],
)
def test_the_examples_are_read(tmp_path: Path, name: str, owners: list[str | None], metric: tuple[str, str]) -> None:
    example = re.search(rf"(?:^    .*\n)*?^    # {name}\.yaml\n((?:^    .*\n)+)", TEXT, re.MULTILINE)
    assert example is not None
    (tmp_path / "suite.yaml").write_text(textwrap.dedent(example[1]))
    tasks = read_suite(str(tmp_path / "suite.yaml")).kinds
    assert [task.expert for task in tasks.values()] == owners
    assert tasks[metric[0]].metric == metric[1]
