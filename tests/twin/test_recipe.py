"""Recipes and the twin-bench command: what is wrong is one line, status 2, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from twin_bench import TwinModel
from twin_bench.cli import main
from twin_bench.twin.recipe import read_recipe


@pytest.fixture
def recipe_file(families: Any, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(families("bert").recipe, sort_keys=False))
    return file


def changed(file: Path, **changes: Any) -> Path:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}, sort_keys=False))
    return file


def test_build_writes_a_twin(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(recipe_file), str(tmp_path / "twin")]) == 0
    assert "router on layer -1" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "twin" / "twin.json").read_text())
    assert manifest["experts"] == ["cola", "stsb", "mnli"]
    assert manifest["router"]["selected_on"] == "held-out training rows"
    twin = TwinModel.from_pretrained(tmp_path / "twin")
    assert twin.expert_names == ("cola", "stsb", "mnli")
    weights = twin.route(**twin.collate(twin.encode([("the cat", None), ("why who", None)], max_length=16)))
    assert weights.shape == (2, 3)
    assert weights.sum(dim=1).tolist() == pytest.approx([1, 1])


def test_build_keeps_features_where_a_directory_is_named(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TWIN_BENCH_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert main(["build", str(recipe_file), "one"]) == 0
    assert set(tmp_path.iterdir()) - before == {tmp_path / "one"}
    monkeypatch.setenv("TWIN_BENCH_CACHE", str(tmp_path / "kept"))
    assert main(["build", str(recipe_file), "two"]) == 0
    layers = [file.stem.rpartition("-")[2] for file in (tmp_path / "kept" / "features").glob("*.safetensors")]
    assert layers == ["2", "2"]  # the last: of the rows that train the router, and of those its twin is probed with


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exclusive": {"density": 1.5}}, "exclusive.density"),
        ({"exclusive": {"density": 0}}, "exclusive.density"),
        ({"exclusive": {"density": 0.1, "rank": 3}}, "exclusive: give either density or rank"),
        ({"exclusive": {"rank": 0}}, "exclusive.rank"),
        ({"shared": {"method": "tis"}}, "unknown merge method 'tis'; did you mean 'ties'"),
        ({"shared": {"method": "ties", "scalin": 1}}, "ties has no option 'scalin'; did you mean 'scaling'"),
        ({"shared": {"method": "twin"}}, "not a static merge method"),
        ({"ruter": {}}, "unknown key; did you mean 'router'"),
        ({"router": {"data": "x", "epoch": 3}}, "router.epoch: unknown key; did you mean 'epochs'"),
        ({"experts": {}}, "experts"),
        ({"experts": {"a/b": "x"}}, "letters, digits"),
        ({"router": {"data": "/nowhere.jsonl"}}, "/nowhere.jsonl: no such file"),
        ({"router": None, "base_model": "/nowhere"}, "'/nowhere'"),
        ({"router": {"data": "$NO_SUCH_VARIABLE/x"}}, "environment variable NO_SUCH_VARIABLE"),
    ],
)
def test_bad_recipes(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    assert main(["build", str(changed(recipe_file, **change)), str(tmp_path / "twin")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("error: ")]) == 1
    assert message in error[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_settings_out_of_range(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    router = yaml.safe_load(recipe_file.read_text())["router"]
    assert main(["build", str(changed(recipe_file, router={**router, "layer": 3})), str(tmp_path / "twin")]) == 2
    assert "router.layer 3: the base model has 2 blocks" in capsys.readouterr().err
    assert main(["build", str(changed(recipe_file, router={**router, "top_k": 4})), str(tmp_path / "twin")]) == 2
    assert "router.top_k 4: there are 3 experts" in capsys.readouterr().err
    assert main(["build", str(changed(recipe_file, max_length=71)), str(tmp_path / "twin")]) == 2
    assert "the base model has a window of 70" in capsys.readouterr().err


def test_paths_beside_the_recipe_and_variables(families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = families("bert")
    monkeypatch.setenv("EXPERTS", str(family.root))
    (tmp_path / "rows.jsonl").write_text("")
    recipe = {
        "base_model": "${EXPERTS}/base",
        "experts": {"cola": "$EXPERTS/cola"},
        "router": {"data": "rows.jsonl"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    read = read_recipe(tmp_path / "recipe.yaml")
    assert read.experts == {"cola": str(family.root / "cola")}
    assert read.router is not None
    assert read.router.data == str(tmp_path / "rows.jsonl")


def test_unreadable_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("a: [", "- a list"):
        (tmp_path / "recipe.yaml").write_text(text)
        assert main(["build", str(tmp_path / "recipe.yaml"), str(tmp_path / "twin")]) == 2
        assert str(tmp_path / "recipe.yaml") in capsys.readouterr().err
    assert main(["build", str(tmp_path / "none.yaml"), str(tmp_path / "twin")]) == 2


def test_tasks_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "glue" / "twin_cola.yaml").is_file()
    assert main(["methods"]) == 0
    assert "dare_task_arithmetic" in capsys.readouterr().out


def test_experts_whose_names_differ_in_case_alone_are_refused(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their folders would be one on a file system that ignores case."""
    experts = yaml.safe_load(recipe_file.read_text())["experts"]
    file = changed(recipe_file, experts={"cola": experts["cola"], "CoLA": experts["mnli"]})
    assert main(["build", str(file), str(tmp_path / "twin")]) == 2
    assert "experts 'cola' and 'CoLA' differ in case alone; rename one" in capsys.readouterr().err
    assert not (tmp_path / "twin").exists()
