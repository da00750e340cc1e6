"""Markdown, LaTeX, CSV and JSON hold the figures of the data frames, and read what they are given as text."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.cells import Scored, answered, made_cell, write_made
from twin_bench.report.files import FILES, write_report
from twin_bench.report.latex import escaped, latex
from twin_bench.report.markdown import markdown
from twin_bench.results.board import Leaderboard
from twin_bench.results.stored import load_leaderboard

ODD = "odd_1.5"
TASKS = {"sst_2": "acc", "cola": "mcc", "distance": "mse"}


def scored() -> list[Scored]:
    draw, found = np.random.default_rng(2), []
    for task, metric in TASKS.items():
        targets = draw.integers(0, 2, 60)
        for place, method in enumerate(("experts", "average", ODD, "twin")):
            answers = np.where(draw.random(60) < 0.9 - 0.1 * place, targets, 1 - targets)
            own = [float(answer) for answer in answers] if metric == "mse" else answers.tolist()
            found.append(answered(method, task, targets.tolist(), own, metric=metric))
    found += [answered("constant", "sst_2", targets.tolist(), 60 * [1], build_seconds=None, stored_bytes=0)]
    unknown = {"stderr": None, "model_seconds": None, "build_peak_bytes": None, "relative_storage": None}
    return [*found, (made_cell("pretrained", "sst_2", 40.0, **unknown), None)]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Leaderboard:
    folder = tmp_path_factory.mktemp("figures")
    write_made(scored(), folder, suite="r&d 50% (v_1)")
    found = load_leaderboard(folder)
    write_report(found, folder)
    return found


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def same(told: Any, known: Any) -> bool:
    if known is None or (isinstance(known, float) and math.isnan(known)):
        return told is None
    return bool(told == (known.tolist() if isinstance(known, np.ndarray) else known))


def test_json_holds_every_figure_and_no_nan(board: Leaderboard) -> None:
    for name, frame in (
        ("leaderboard.json", board.cells),
        ("summary.json", board.summary),
        ("comparisons.json", board.comparisons),
    ):
        told, known = strict((board.directory / name).read_text()), frame.to_dict("records")
        assert len(told) == len(known) > 0
        for line, own in zip(told, known, strict=True):
            assert line.keys() == own.keys()
            assert all(same(line[key], value) for key, value in own.items()), (name, line, own)
    assert strict((board.directory / "skipped.json").read_text()) == []


def test_csv_holds_the_same_figures(board: Leaderboard) -> None:
    table = pd.read_csv(board.directory / "leaderboard.csv")
    whole = pd.read_json(io.StringIO((board.directory / "leaderboard.json").read_text()))[list(table.columns)]
    pd.testing.assert_frame_equal(table, whole, check_dtype=False, rtol=1e-12)
    for column in ("score", "stderr", "normalized", "gain", "ci_low", "ci_high", "n", "expert", "floor", "seeds"):
        assert column in table.columns


def of_line(shown: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", shown)]


def test_markdown_holds_the_same_figures(board: Leaderboard) -> None:
    text = markdown(board)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = pd.read_csv(io.StringIO("\n".join([lines[0], *lines[2:]])), sep=r"\s*\|\s*", engine="python", dtype=str)
    table = table.drop(columns=[column for column in table if column.startswith("Unnamed")]).set_index("method")
    cells = board.cells.set_index(["method", "task"])
    for line in board.summary.to_dict("records"):
        own = table.loc[line["method"]]
        if math.isfinite(line["normalized"]):
            expected = [line["normalized"], line["ci_low"], line["ci_high"]]
            assert of_line(own["normalized"]) == pytest.approx(expected, abs=0.0501)
        for task in TASKS:
            if (line["method"], task) in cells.index:
                cell = cells.loc[(line["method"], task)]
                known = [cell["score"], *([] if cell["stderr"] is None else [cell["stderr"]])]
                assert of_line(own[task].replace("±", " ")) == pytest.approx(known, abs=0.00501)
    assert f"Floors (the constant answer): sst_2 {cells['score']['constant', 'sst_2']:.2f}." in text
    assert "nan" not in text.lower()


def test_latex_holds_the_same_figures_and_escapes_what_is_its_own(board: Leaderboard) -> None:
    text = latex(board)
    cells = board.cells.set_index(["method", "task"])
    for line in board.summary.to_dict("records"):
        (shown,) = [
            row for row in text.splitlines() if re.match(rf"(\\textbf{{)?{re.escape(escaped(line['method']))}\W", row)
        ]
        parts = [part.strip() for part in shown.removesuffix(r"\\").split(" & ")]
        if math.isfinite(line["normalized"]):
            figures = of_line(parts[2].replace(r"\scriptsize", ""))
            assert figures == pytest.approx([line["normalized"], line["ci_low"], line["ci_high"]], abs=0.0501)
        else:
            assert parts[2] == "--"
        for task, part in zip(cells.index.unique("task"), parts[4:], strict=True):
            if (line["method"], task) in cells.index:
                assert of_line(part)[0] == pytest.approx(cells["score"][line["method"], task], abs=0.0501)
        assert parts[0].startswith(r"\textbf") == (line["tie_group"] == 1)
    assert r"odd\_1.5" in text
    assert r"sst\_2" in text
    assert r"r\&d 50\% (v\_1)" in text
    assert not re.search(r"(?<!\\)[&%#_]", re.sub(r" & |\\begin\{.*|\\end\{.*", "", text))
    assert "nan" not in text
    assert escaped(r"a\b~c^d&e%f$g#h_i{j}") == (
        r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\&e\%f\$g\#h\_i\{j\}"
    )


def test_a_report_is_written_again_without_a_model(board: Leaderboard) -> None:
    """In a process of its own: neither torch nor a harness is imported, and the files are the same."""
    before = {name: (board.directory / name).read_bytes() for name in FILES}
    for name in FILES:
        (board.directory / name).unlink()
    code = (
        "import sys; from twin_bench.cli import main; status = main(['report', sys.argv[1]]); "
        "print('imported:', *[name for name in ('torch', 'transformers', 'lm_eval', 'peft') if name in sys.modules]); "
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(board.directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "imported:"
    assert {name: (board.directory / name).read_bytes() for name in FILES} == before


def test_a_board_of_one_cell_is_reported(tmp_path: Path) -> None:
    write_made([(dataclasses.replace(made_cell("pretrained", "prose"), expert=None), None)], tmp_path)
    write_report(load_leaderboard(tmp_path), tmp_path)
    assert "No method is ranked under this protocol." in (tmp_path / "leaderboard.md").read_text()
