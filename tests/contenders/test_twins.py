"""Twins as a suite builds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.contenders import all_served
from twin_bench.merging.registry import find_method
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


def test_a_twin_whose_router_falls_back_runs_under_no_protocol_that_takes_its_head() -> None:
    method = find_method("twin")
    given = method.checked({"router": {"fallback": "shared"}})
    assert [name for name in PROTOCOLS if method.runs_under(name, given)] == ["standard", "paper"]
    assert method.runs_under("routed", method.checked({}))
