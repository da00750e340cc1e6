"""Weights and names on the command line are checked before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from twin_bench import InputError
from twin_bench.cli import main
from twin_bench.export.run import export_twin
from twin_bench.export.selection import selection

EXPERTS = ("cola", "stsb", "mnli")


def test_every_expert_and_the_mixtures_are_the_models() -> None:
    models = selection(EXPERTS, None, ["0.2,0.8,0", "calm=1,-1e-3,0.5"]).models(EXPERTS)
    expected = {
        "cola": [1, 0, 0],
        "stsb": [0, 1, 0],
        "mnli": [0, 0, 1],
        "mixture": [0.2, 0.8, 0],
        "calm": [1, -1e-3, 0.5],
    }
    assert list(models) == list(expected)
    for name, weights in models.items():
        torch.testing.assert_close(weights, torch.tensor(expected[name], dtype=torch.float32))
    assert selection(EXPERTS, "stsb", []).models(EXPERTS)["stsb"].tolist() == [0, 1, 0]
    assert list(selection(EXPERTS, "stsb", []).models(EXPERTS)) == ["stsb"]


@pytest.mark.parametrize(
    ("expert", "weights", "said"),
    [
        ("colo", [], "no such expert; did you mean 'cola'"),
        ("cola", ["1,0,0"], "not both"),
        (None, ["1,0"], "2 numbers for 3 experts; give one for each of cola, stsb, mnli"),
        (None, ["1,0,nan"], "weight of mnli is nan"),
        (None, ["1,inf,0"], "weight of stsb is inf"),
        (None, ["1,2e6,0"], "1e\\+06 at most"),
        (None, ["1,x,0"], "'x', the weight of stsb, is no number"),
        (None, ["1,,0"], "'', the weight of stsb, is no number"),
        (None, ["cola=1,0,0"], "cola is another model's name"),
        (None, ["1,0,0", "0,1,0"], "mixture is another model's name"),
        (None, ["../x=1,0,0"], "letters, digits"),
    ],
)
def test_a_wrong_choice_is_refused_in_one_line(expert: str | None, weights: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        selection(EXPERTS, expert, weights)


def test_what_is_wrong_leaves_nothing_behind(twins: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = str(twins("bert"))
    out = tmp_path / "deep" / "out"
    assert main(["export", twin, str(out), "--format", "onnx"]) == 2
    assert "unknown format 'onnx'; known: hf, peft, vllm" in capsys.readouterr().err
    assert main(["export", twin, str(out), "--format", "hf", "--pad-ranks", "--expert", "cola"]) == 2
    assert "format hf has no option 'pad-ranks'" in capsys.readouterr().err
    assert main(["export", twin, str(out), "--format", "hf"]) == 2
    assert "none is named; give --expert NAME" in capsys.readouterr().err
    assert main(["export", twin, str(out), "--format", "vllm"]) == 2
    assert "serves causal language models, not sequence_classification" in capsys.readouterr().err
    assert main(["export", twin, str(tmp_path), "--format", "hf", "--expert", "cola"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(out), "--format", "hf", "--expert", "cola"]) == 2
    assert "no twin there" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))


def test_a_mixture_without_weight_is_the_shared_expert(matrix_twin: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="zero: nothing is left for an adapter: it is the shared expert"):
        export_twin(matrix_twin, tmp_path / "out", to="peft", weights=["zero=0,0,0"])
