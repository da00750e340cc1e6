"""Twins as a suite builds them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.contenders import all_served, served
from tests.support.dense import batch
from tests.support.rows import write_generative_rows
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.leaderboard.suite import Suite
from twin_bench.protocols import PROTOCOLS


def built_router(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("twin.json")
    router: dict[str, Any] = json.loads(file.read_text())["router"]
    return router


def test_a_router_is_trained_on_test_rows_for_protocol_paper_alone(
    tiny: dict[str, Any], families: Any, tmp_path: Path
) -> None:
    family = families("bert")
    models = {key: family.recipe[key] for key in ("base_model", "experts")}
    method = {"twin": {"router": {"epochs": 1, "kind": "nearest_centroid"}}}
    suite = {"name": "tiny", "tasks": list(family.experts), "data": tiny["data"], "methods": [method], **models}
    for protocol, trained in (("standard", False), ("routed", False), ("paper", True)):
        workspace = tmp_path / protocol / "twins" / "one"
        (made,) = all_served(suite, "twin", workspace, None, protocol)  # type: ignore[arg-type]
        router = built_router(workspace)
        assert ("selected_on" in router.get("paper", {})) if trained else router["paper"] is False
        assert router["kind"] == "nearest_centroid"
        assert made.notes["router"].get("selected_on", "").startswith("test" if trained else "held-out")


def of_family(family: Any, tiny: dict[str, Any], **entry: Any) -> dict[str, Any]:
    models = {key: family.recipe[key] for key in ("base_model", "experts")}
    return {"name": "tiny", "tasks": list(family.experts), "data": tiny["data"], "methods": [{"twin": entry}], **models}


@pytest.mark.parametrize("in_suite", [False, True])
def test_a_twin_that_falls_back_is_skipped_where_the_router_names_the_head(
    in_suite: bool, tiny: dict[str, Any], families: Any, tmp_path: Path
) -> None:
    """Its entry is among those that run under `routed`, so that the reason is told. Nothing is built for it."""
    fallback = {"fallback": "shared"}
    suite = of_family(families("bert"), tiny, router={"epochs": 1, **({} if in_suite else fallback)})
    (entry,) = (one for one in Suite.model_validate(suite).entries() if one.label == "twin")
    assert [name for name in PROTOCOLS if entry.runs_under(name)] == list(PROTOCOLS)
    with pytest.raises(UnsuitedError, match="names none for a row that falls back to the shared expert"):
        all_served({**suite, "router": fallback if in_suite else {}}, "twin", tmp_path / "twins", None, "routed")
    assert not (tmp_path / "twins").exists()


def test_an_expert_is_held_out(tiny: dict[str, Any], families: Any, tmp_path: Path) -> None:
    """The twin is one of the others; the held-out expert's task has its own head on the others' fusion."""
    family, folder = families("bert"), tmp_path / "twins" / "one"
    given: Any = {"router": {"kind": "nearest_centroid", "fallback": "shared"}, "exclusive": {"density": 1.0}}
    suite = of_family(family, tiny, without="mnli", **given)
    made = served(suite, "twin", folder)
    twin: Any = made.twin
    assert twin.expert_names == twin.router.config.experts == ("cola", "stsb")
    assert made.tasks == ("cola", "stsb", "mnli")
    assert made.notes["router"]["confusion"].keys() == {"cola", "stsb"}
    inputs, model = batch(4), copy.deepcopy(family.experts["mnli"])
    base = family.base.base_model.state_dict()
    cola, stsb = (family.experts[name].base_model.state_dict() for name in ("cola", "stsb"))
    shared = {name: one + 0.3 * (cola[name] - one + stsb[name] - one) for name, one in base.items()}
    for weights, expected in (([0.0, 0.0], shared), ([0.0, 1.0], stsb)):
        model.base_model.load_state_dict(expected)
        found = twin(**inputs, task="mnli", fusion_weights=torch.tensor([weights] * 4)).logits
        with torch.no_grad():
            torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    whole = served(of_family(family, tiny, **given), "twin", folder)
    assert whole.stored_bytes is not None
    assert made.stored_bytes is not None
    numbers = sum(parameter.numel() for parameter in family.base.base_model.parameters())
    assert 4 * numbers < whole.stored_bytes - made.stored_bytes < 10 * numbers  # one exclusive vector, and no head
    for protocol in ("paper", "routed"):
        with pytest.raises(UnsuitedError, match=f"protocol {protocol} "):
            all_served(suite, "twin", folder, None, protocol)  # type: ignore[arg-type]


def test_a_language_models_expert_is_held_out(causal_families: Any, tmp_path: Path) -> None:
    family = causal_families("llama")
    tiny = {"data": str(write_generative_rows(tmp_path / "rows"))}
    made = served(of_family(family, tiny, without="bbq", router={"epochs": 1}), "twin", tmp_path / "twins" / "one")
    assert made.twin.expert_names == ("mmlu", "cnn_dailymail")
    assert "bbq" in made.tasks


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"without": "mnly"}, "without: 'mnly', expected one of several experts; the suite's: cola, stsb, mnli"),
        ({"without": "mnli", "weights": "task"}, "without: with weights: task its own rows would have no weights"),
        (
            {"weights": "task", "router": {"fallback": "shared"}},
            "fallback: with weights: task no router decides",
        ),
        ({"router": {"layers": [0, 1]}}, "router: give either layer or layers"),
        ({"router": {"kind": "uniform"}}, "router: fallback: kind uniform is as sure of one input as of any other"),
    ],
)
def test_settings_that_do_not_go_together(
    entry: dict[str, Any], says: str, tiny: dict[str, Any], families: Any, tmp_path: Path
) -> None:
    suite = of_family(families("bert"), tiny, **entry) | {"router": {"layer": 1, "fallback": "shared"}}
    with pytest.raises(InputError, match=says):
        all_served(suite, "twin", tmp_path / "twins")
    assert not (tmp_path / "twins").exists()
