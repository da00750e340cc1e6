"""CONTRIBUTING.md's recipes work as they are written."""

from __future__ import annotations

import importlib.metadata
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import twin_bench
from tests.support.interpreter import ROOT
from twin_bench.leaderboard.harness import ENTRY_POINTS, find_harness
from twin_bench.leaderboard.run import RunOptions, run_suite
from twin_bench.leaderboard.suite import Suite
from twin_bench.merging.registry import REGISTRY
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.layers import TWINS, install


def recipe(heading: str, **given: Any) -> dict[str, Any]:
    """Run the Python of a section, its indented lines up to the first TOML, and return the names that it defines."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    code = [line for line in section.split("\n") if line.startswith("    ") or not line]
    source = textwrap.dedent("\n".join(code)).partition("[project")[0].partition("twin-bench methods")[0]
    names: dict[str, Any] = {"__name__": "contributed", **given}
    exec(compile(source, heading, "exec"), names)
    return names


def test_a_merge_method(monkeypatch: pytest.MonkeyPatch) -> None:
    twin_bench.methods()  # loads all others
    before = dict(REGISTRY)
    recipe("Add a merge method")
    try:
        base = {"w": torch.tensor([1.0, 2.0])}
        experts = {"a": {"w": torch.tensor([2.0, 2.0])}, "b": {"w": torch.tensor([1.0, 6.0])}}
        assert twin_bench.merge("half_sum", base, experts)["w"].tolist() == [1.5, 4.0]
        assert twin_bench.methods()["half_sum"].formula == "theta_0 + scaling * sum_t tau_t."
    finally:
        REGISTRY.clear()
        REGISTRY.update(before)


def test_a_task() -> None:
    riddles = recipe("Add a task")["riddles"]
    rows = [{"riddle": f"What is {number}?", "solution": str(number)} for number in range(4)]
    (asked,) = riddles.inputs(rows[:1], rows)
    shown = "".join(f"What is {number}?\nAnswer: {number}\n\n" for number in (1, 2))
    assert asked.text == f"Solve the riddle.\n\n{shown}What is 0?\nAnswer:"
    assert riddles.answer(rows[0]) == "0"
    with pytest.raises(twin_bench.InputError, match="here: no field 'solution'"):
        riddles.check({"riddle": "What?"}, "here")


def test_a_harness(families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coin = recipe("Add a harness")["Coin"]
    point = importlib.metadata.EntryPoint("coin", "contributed:Coin", ENTRY_POINTS)
    found = importlib.metadata.entry_points

    def with_coin(**group: str) -> Any:
        return [*found(**group), *([point] if group.get("group") == ENTRY_POINTS else [])]

    monkeypatch.setattr(importlib.metadata, "entry_points", with_coin)
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: coin)
    assert find_harness("coin").name == "coin"
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "validation.jsonl").write_text('{"sentence": "the cat sat", "label": 1}\n')
    recipe_ = families("bert").recipe
    suite = Suite.model_validate(
        {
            "name": "tossed",
            "base_model": recipe_["base_model"],
            "experts": {"cola": recipe_["experts"]["cola"]},
            "data": str(tmp_path),
            "tasks": ["cola"],
            "methods": ["average"],
        }
    )
    board = run_suite(suite, tmp_path / "out", RunOptions(harness="coin"))
    assert [(cell.method, cell.score, cell.stderr, cell.n) for cell in board.cells] == [
        (method, 50.0, 5.0, 100) for method in ("pretrained", "experts", "average")
    ]
    assert len(list((tmp_path / "out" / "cells-coin" / "standard" / "average").glob("cola-*.json"))) == 1


class Scale(nn.Module):
    """A layer that multiplies its input by a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dtype=torch.float64), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_a_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = recipe("Add a kind of layer", Scale=Scale)["TwinScale"]
    monkeypatch.setattr("twin_bench.twin.layers.kinds.TWINS", (*TWINS, kind))
    torch.manual_seed(0)
    model = nn.Sequential(Scale(5), Scale(5))
    before = [layer.weight.clone() for layer in model]
    moves = {name: torch.randn(5, dtype=torch.float64) for name in ("a", "b")}
    exclusive = {name: Exclusive({}, {"1.weight": move}) for name, move in moves.items()}
    fusion = install(model, exclusive)
    x, weights = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    dense = torch.stack(
        [
            row * before[0] * (before[1] + w[0] * moves["a"] + w[1] * moves["b"])
            for row, w in zip(x, weights, strict=True)
        ]
    )
    with fusion.per_row(weights):
        torch.testing.assert_close(model(x), dense)
    for row, own in enumerate(weights):
        with fusion.fuse(own):
            torch.testing.assert_close(model(x[row : row + 1])[0], dense[row])
