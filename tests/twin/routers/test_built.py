"""Routers in built twins: what they read, how they are chosen and kept, and that fusion is exact with their weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file

from tests.support.dense import batch, dense
from tests.support.families import Family, built
from twin_bench import InputError, TwinModel
from twin_bench.config import parse
from twin_bench.files import digest, digest_file
from twin_bench.twin.builder import build_twin
from twin_bench.twin.directory import FORMAT_VERSION
from twin_bench.twin.features import Read, pool, pool_after
from twin_bench.twin.recipe import Recipe
from twin_bench.twin.routers.base import RouterConfig
from twin_bench.twin.routers.choice import cheapest
from twin_bench.twin.routers.registry import RouterKind
from twin_bench.twin.routers.store import load_router

KINDS = {
    "knn": {"options": {"rows": 8}},
    "linear": {"layers": [0, 2]},
    "mahalanobis": {"layer": 1},
    "nearest_centroid": {"pooling": "last", "layer": 2},
    "projection": {"layer": 1},
    "random": {"layer": 0},
    "subspace": {"options": {"rows": 6}, "top_k": 2},
    "uniform": {},
}


def recipe_of(family: Family, **router: Any) -> dict[str, Any]:
    return {**family.recipe, "router": {**family.recipe["router"], **router}}


def told(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "twin.json").read_text())["router"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_fusion_is_exact_with_each_kinds_weights(kind: str, causal_families: Any, tmp_path: Path) -> None:
    family = causal_families("llama")
    directory = built(recipe_of(family, kind=kind, temperature="auto", **KINDS[kind]), tmp_path / "twin")
    twin: Any = TwinModel.from_pretrained(directory)
    inputs = batch(3)
    weights = twin.route(**inputs)
    assert twin.router.config.kind == kind
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    found = twin(**inputs).logits
    for row in range(3):
        length = int(inputs["attention_mask"][row].sum())
        one = {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}
        with torch.no_grad():
            expected = dense(family, weights[row])(**one).logits[0]
        torch.testing.assert_close(found[row, :length].double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(twin.route(**one)[0], weights[row], rtol=1e-4, atol=1e-5)


def test_pooling_is_of_the_rows_own_tokens(twins: Any, causal_twins: Any) -> None:
    twin = TwinModel.from_pretrained(twins("bert"))
    inputs = batch(5)
    with torch.no_grad():
        states = twin.model.base_model(**inputs, output_hidden_states=True).hidden_states
    first, last = twin.features(inputs, [Read(1, "first"), Read(2, "last")])
    for row in range(5):
        length = int(inputs["attention_mask"][row].sum())
        torch.testing.assert_close(first[row], states[1][row, 0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(last[row], states[2][row, length - 1], rtol=1e-5, atol=1e-6)
    causal = TwinModel.from_pretrained(causal_twins("llama"))
    reads = [Read(1, "first"), Read(1, "last"), Read(2)]
    rows = causal.encode(
        [("the cat sat on a big red dog", None), ("the cat sat on a big red bird who", None), ("a", None)]
    )
    together = causal.features_of(rows, reads, batch_size=3)
    for index, row in enumerate(rows):
        for alone, found in zip(causal.features_of([row], reads, batch_size=1), together, strict=True):
            torch.testing.assert_close(alone[0], found[index], rtol=1e-5, atol=1e-6)


def test_pooling_behind_a_prefix_and_before_padding_on_the_left() -> None:
    hidden = torch.randn(1, 7, 3, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.full((1, 2, 3), 9.0), hidden], dim=1)
    mask = torch.tensor([[0, 0] + [1] * 7])
    for pooling in ("mean", "first", "last"):
        whole = pool(hidden, None, pooling)
        torch.testing.assert_close(pool(padded, mask, pooling), whole)
        after = pool_after(hidden[:, :3], 3, hidden[:, 3:], torch.ones(1, 4), pooling)
        torch.testing.assert_close(after, whole)


def test_the_cheapest_layer_within_one_standard_error_is_chosen() -> None:
    accuracy = {Read(0): 0.90, Read(1): 0.94, Read(1, "last"): 0.945, Read(2): 0.95, Read(-1): 0.95}
    error = math.sqrt(0.95 * 0.05 / 400)
    assert 0.90 < 0.95 - error < 0.94
    assert cheapest(accuracy, 400, 3) == Read(1, "last")
    assert cheapest(accuracy, 40_000, 3) == Read(2)
    assert cheapest(accuracy, 10, 3) == Read(0)
    assert cheapest({Read(0): 0.5, Read(-1): 0.5}, 10, 3) == Read(0)


def test_auto_probes_all_layers_and_fits_one_router(
    families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted_fits(monkeypatch) as fits:
        directory = built(recipe_of(families("bert"), layer="auto", pooling="auto"), tmp_path / "twin")
        assert [config.kind for config in fits] == ["mlp"]
    chosen = told(directory)
    assert len(chosen["layer_accuracy"]) == 9  # three layers, three poolings
    assert {"0", "1 first", "2 last"} < chosen["layer_accuracy"].keys()
    router = TwinModel.from_pretrained(directory).router
    assert router is not None
    assert (router.config.layer, router.config.pooling) == (chosen["layer"], chosen["pooling"])
    best = max(chosen["layer_accuracy"].values())
    error = math.sqrt(best * (1 - best) / chosen["selection_rows"])
    assert min(layer for layer in range(3) if best_of(chosen, layer) >= best - error) == chosen["layer"]


def best_of(chosen: dict[str, Any], layer: int) -> float:
    return max(value for name, value in chosen["layer_accuracy"].items() if name.split()[0] == str(layer))


@contextmanager
def counted_fits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RouterConfig]]:
    """Collect the configs of the routers that are fitted."""
    fits: list[RouterConfig] = []
    fit = RouterKind.fit

    def counting(kind: RouterKind, config: RouterConfig, *rest: Any) -> Any:
        fits.append(config)
        return fit(kind, config, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RouterKind, "fit", counting)
        yield fits


def test_twins_on_one_shared_expert_fit_one_router(
    families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(families("bert"), layer=1, temperature="auto", fallback="shared")
    others = {
        "rank": {"exclusive": {"rank": 2}, "router": {**recipe["router"], "paper": False}},
        "shared": {"shared": {"method": "task_arithmetic", "scaling": 0.5}},
    }
    with counted_fits(monkeypatch) as fits:
        for name, changes in {"first": {}, **others}.items():
            before = len(fits)
            twin = Recipe.model_validate({**recipe, **changes})
            build_twin(twin, tmp_path / name, feature_cache=tmp_path / "features")
            assert len(fits) - before == (name != "rank"), name
        build_twin(Recipe.model_validate({**recipe, **others["rank"]}), tmp_path / "without")
    for file in ("router/config.json", "router/router.safetensors", "twin.json"):
        assert (tmp_path / "rank" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    projection = {**recipe, "router": {**recipe["router"], "kind": "projection"}}
    with counted_fits(monkeypatch) as fits:  # what reads the exclusive vectors is not shared
        for name, exclusive in (("one", {"rank": 2}), ("two", {"rank": 3})):
            own = Recipe.model_validate({**projection, "exclusive": exclusive})
            build_twin(own, tmp_path / name, feature_cache=tmp_path / "features")
        assert len(fits) == 2


def test_directories_of_older_formats_answer_bit_for_bit(twins: Any, tmp_path: Path) -> None:
    """Their routers have a config without kind, layers, pooling and threshold."""
    whole = TwinModel.from_pretrained(twins("bert"))
    for version in (1, 2):
        copy = shutil.copytree(twins("bert"), tmp_path / str(version))
        file = copy / "router" / "config.json"
        old = json.loads(file.read_text())
        assert [old.pop(key) for key in ("kind", "layers", "pooling", "threshold")] == ["mlp", [], "mean", None]
        assert list(old) == ["experts", "width", "layer", "top_k", "temperature"]
        file.write_text(json.dumps(old))
        manifest = json.loads((copy / "twin.json").read_text())
        manifest["files"]["router/config.json"] = digest_file(file)
        manifest["format_version"] = version
        del manifest["sha256"]
        (copy / "twin.json").write_text(
            json.dumps({**manifest, **({"sha256": digest(manifest)} if version == 2 else {})})
        )
        twin = TwinModel.from_pretrained(copy)
        assert torch.equal(twin.route(**batch(4)), whole.route(**batch(4)))
        assert torch.equal(twin(**batch(4), task="cola").logits, whole(**batch(4), task="cola").logits)
    names = load_file(twins("bert") / "router" / "router.safetensors").keys()
    assert {"mlp.0.weight", "mlp.1.running_mean", "mlp.8.bias"} < names
    assert FORMAT_VERSION == 3


@pytest.mark.parametrize(
    ("router", "says"),
    [
        ({"kind": "nearest_centre"}, r"unknown router kind 'nearest_centre'; did you mean 'nearest_centroid'\?"),
        ({"kind": "knn", "options": {"k": 3}}, r"^[^:]*: router.options: k: unknown key; .*known: neighbours, rows"),
        ({"kind": "uniform", "options": {"rows": 3}}, "router.options: kind uniform has none; remove rows"),
        ({"keep": 0.9}, "keep: without fallback: shared it changes nothing; give both, or neither"),
        ({"layers": []}, "router.layers: no layer; name one, or leave layers out"),
        ({"layers": [1, 0, 1]}, "router.layers: 1 stands twice; remove one"),
        ({"kind": "uniform", "fallback": "shared"}, "fallback: kind uniform is as sure of one input as of any other"),
        ({"kind": "random", "fallback": "shared"}, "fallback: kind random is as sure of one input as of any other"),
        ({"layer": 1, "layers": [0, 1]}, "give either layer or layers"),
        ({"pooling": "max"}, "pooling"),
        ({"temperature": "warm"}, "temperature"),
    ],
)
def test_wrong_settings_of_a_router(families: Any, router: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse(Recipe, recipe_of(families("bert"), **router), "recipe.yaml")


@pytest.mark.parametrize(
    ("router", "says"),
    [
        ({"layers": [0, 3]}, "router.layer 3: the base model has 2 blocks; -1 to 2"),
        (
            {"kind": "projection"},
            "router.layer -1: kind projection needs exclusive vectors in the block above it; 0 to 1, or auto",
        ),
        (
            {"kind": "projection", "layer": 2},
            "router.layer 2: kind projection needs exclusive vectors in the block above it",
        ),
        ({"kind": "projection", "layers": [0, 1]}, "kind projection reads one layer"),
        ({"layers": [0, 1], "pooling": "auto"}, "chosen for one layer"),
        ({"layers": [0, -1, 2]}, r"router.layers: -1 and 2 are the same layer of 2 blocks; remove one"),
        ({"kind": "knn", "options": {"neighbours": 67}}, r"options.neighbours 67: only 66 rows are stored; give fewer"),
        (
            {"max_rows": 10, "kind": "knn", "options": {"neighbours": 28}},
            r"options.neighbours 28: only 27 rows are stor",
        ),
        ({"pooling": "first"}, "a causal model's first token sees no other"),
    ],
)
def test_settings_that_a_model_does_not_allow(
    families: Any,
    causal_families: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    router: dict[str, Any],
    says: str,
) -> None:
    """They are refused before a merge is made, which can take hours."""
    monkeypatch.setattr("twin_bench.twin.shared.merge_lazily", None)
    family = causal_families("llama") if router == {"pooling": "first"} else families("bert")
    with pytest.raises(InputError, match=says):
        build_twin(Recipe.model_validate(recipe_of(family, **router)), tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


def test_a_router_on_the_experts_directions_needs_factors_above_its_layer(families: Any, tmp_path: Path) -> None:
    """What has none is refused before a merge is made. With auto, layers that have none are no candidates."""
    for exclusive, layer, says in (
        (
            {"kind": "sign_mask"},
            "auto",
            "router.kind projection: it reads factors, and exclusive.kind sign_mask has none",
        ),
        ({"rank": 2, "from_layer": 1}, 0, "router.layer 0: kind projection needs .*; 1 to 1, or auto"),
    ):
        recipe = {**recipe_of(families("bert"), kind="projection", layer=layer), "exclusive": exclusive}
        with pytest.raises(InputError, match=says):
            build_twin(Recipe.model_validate(recipe), tmp_path / "twin")
    recipe = {**recipe_of(families("bert"), kind="projection", layer="auto"), "exclusive": {"rank": 2, "from_layer": 1}}
    assert told(built(recipe, tmp_path / "twin"))["layer_accuracy"].keys() == {"1"}


def test_a_bar_counts_epochs_where_there_are_some(families: Any, tmp_path: Path) -> None:
    kinds = (("mlp", 3, (3, 3)), ("mlp", "auto", (50, 50)), ("linear", 3, None), ("nearest_centroid", 3, None))
    for kind, epochs, counted in kinds:
        progress = Progress(disable=True)
        recipe = Recipe.model_validate(recipe_of(families("bert"), kind=kind, epochs=epochs))
        build_twin(recipe, tmp_path / f"{kind}-{epochs}", progress=progress)
        bars = {task.description: (task.completed, task.total) for task in progress.tasks}
        assert bars["router features"][0] == bars["router features"][1]
        assert bars.get(f"router: {kind}") == counted


def test_a_directory_with_an_unknown_kind_names_its_file(twins: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(twins("bert") / "router", tmp_path / "router")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "kind": "theirs"}))
    with pytest.raises(InputError, match=r"config.json: unknown router kind 'theirs'.*needs its plugin loaded"):
        load_router(copy)
