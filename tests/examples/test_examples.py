"""The examples run as they are, and print what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
def test_merge_and_serve_routes_a_mixed_batch(capsys: pytest.CaptureFixture[str]) -> None:
    answers = runpy.run_path(str(EXAMPLES / "merge_and_serve.py"))["main"]()
    assert [answer["head"] for answer in answers] == ["sst2", "mnli", "sst2", "mnli"]
    for answer in answers:
        for probabilities in (answer["weights"], answer["twin"], answer["ties"]):
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        labels = {"sst2": 2, "mnli": 3}[answer["task"]]
        assert answer["twin"][labels:] == [0] * (3 - labels)
        assert len(answer["ties"]) == labels
    picked = [max(range(len(answer["twin"])), key=answer["twin"].__getitem__) for answer in answers]
    assert picked == [1, 0, 0, 2]  # positive, entailed, negative, contradicted
    assert capsys.readouterr().out.count("weights") == len(answers)
