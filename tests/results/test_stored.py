"""Results on disk: what is missing or damaged ends in one line that names the file, and never in another figure."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.support.cells import answered, write_made
from twin_bench.cli import main
from twin_bench.errors import InputError
from twin_bench.results.samples import Samples, read_samples, write_samples
from twin_bench.results.stored import load_leaderboard

TARGETS = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    flipped = {"experts": 1, "constant": 5, "average": 3}
    texts = [f"the text of row {row}" for row in range(10)]
    weights = {"cola": [0.1 * row for row in range(10)]}
    scored = [
        answered(
            method,
            "cola",
            TARGETS,
            [1 - t if r < n else t for r, t in enumerate(TARGETS)],
            texts=texts,
            weights=weights,
        )
        for method, n in flipped.items()
    ]
    write_made(scored, tmp_path / "out")
    return tmp_path / "out"


def sample_file(out: Path, method: str) -> Path:
    (file,) = (out / "samples" / "standard" / method).glob("*.parquet")
    return file


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_samples_that_are_missing_cut_off_or_of_other_rows(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sample_file(out, "average")
    whole = file.read_bytes()
    for content in (None, b"", whole[:-9], b"no parquet file at all"):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        line = error_of(["report", str(out)], capsys)
        assert line.startswith(f"error: {file}: no samples can be read")
        assert line.endswith("run the leaderboard again, which scores what is missing")
    write_samples(file, Samples(["a", "b"], [0, 1], [1, 1], [0.0, 1.0], "metric"))
    said = "the rows make acc 50, and the cell of average on cola has 70; remove this file"
    assert said in error_of(["report", str(out)], capsys)
    assert not (out / "leaderboard.json").exists()


def test_a_flipped_bit_of_samples_is_found_or_harmless(out: Path) -> None:
    file = sample_file(out, "average")
    whole, expected = file.read_bytes(), read_samples(file).frame()
    refused = 0
    for place in range(4, len(whole), 11):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = read_samples(file).frame()
        except InputError:
            refused += 1
        else:
            pd.testing.assert_frame_equal(found, expected)
    assert refused > 100


def test_a_board_that_is_missing_damaged_or_of_another_version(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(["report", str(tmp_path / "none")], capsys)
    assert line.startswith(f"error: {tmp_path / 'none'}: no results of this version of twin-bench")
    file = out / "board.json"
    stored = json.loads(file.read_text())
    changed = json.loads(file.read_text())
    changed["content"]["cells"][0]["score"] = 99.0
    for content in ("{", "[]", json.dumps(changed), json.dumps({**stored, "format": 99})):
        file.write_text(content)
        assert error_of(["report", str(out)], capsys).startswith(f"error: {out}")
    assert not (out / "leaderboard.json").exists()


def test_samples_of_a_cell_as_a_frame(out: Path) -> None:
    board = load_leaderboard(out)
    frame = board.rows("standard", "average", "cola")
    assert list(frame.columns) == ["identity", "prediction", "target", "score", "weight_cola", "text"]
    assert list(frame["prediction"]) == [1, 0, 0, 0, 1, 0, 0, 1, 1, 1]
    assert list(frame["score"]) == 3 * [0] + 7 * [1]
    assert frame["text"][4] == "the text of row 4"
    assert list(frame["weight_cola"]) == pytest.approx([0.1 * row for row in range(10)])
    every = board.samples
    own = every[(every["method"] == "average") & (every["task"] == "cola")]
    assert list(every.columns[:6]) == ["protocol", "method", "task", "seed", "identity", "prediction"]
    assert own[list(frame.columns)].to_dict("list") == frame.to_dict("list")
    assert len(every) == sum(board.cells["n"])
    with pytest.raises(InputError, match=r"no cell of averge on cola under standard; did you mean 'average'"):
        board.rows("standard", "averge", "cola")
