"""Features kept on disk: the same to the last bit, and never those of another model, layer or list of rows."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from twin_bench import InputError, TwinModel
from twin_bench.files import read_tensors
from twin_bench.twin.builder import build_twin
from twin_bench.twin.cache import FORMAT, backbone_digest
from twin_bench.twin.paper import AdapterStack, PaperFactors, install_paper_layers
from twin_bench.twin.recipe import Recipe

TEXTS = [("the cat sat on a big red dog", None), ("why who", "a bird"), ("the cat sat on a big red bird", None)] * 2


def built(family: Any, root: Path, name: str, **changes: Any) -> Path:
    recipe = {**family.recipe, "router": {**family.recipe["router"], "layer": 1}, **changes}
    build_twin(Recipe.model_validate(recipe), root / name)
    return root / name


@pytest.fixture(scope="module")
def directories(families: Any, causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("feature-cache")
    bert = families("bert")
    return {
        "llama": built(causal_families("llama"), root, "llama"),
        "bert": built(bert, root, "bert"),
        "lower rank": built(bert, root, "rank", exclusive={"rank": 2}),
        "other shared expert": built(bert, root, "shared", shared={"method": "task_arithmetic", "scaling": 0.3}),
    }


@contextmanager
def forwards(twin: TwinModel) -> Iterator[list[int]]:
    """Collect the rows of every forward of the backbone."""
    ran: list[int] = []

    def count(_: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        ran.append(len(inputs["input_ids"]))

    hook = twin.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    yield ran
    hook.remove()


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hit_is_bit_for_bit_what_the_model_says_and_does_not_run_it(
    directories: dict[str, Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    without, first, second = (TwinModel.from_pretrained(directories[kind], dtype=dtype) for _ in range(3))
    rows = without.encode(TEXTS)
    expected = without.route_all(rows, batch_size=2)
    assert not torch.equal(expected[0], expected[1])
    first.feature_cache = second.feature_cache = tmp_path / "features"
    with forwards(first) as ran:
        assert torch.equal(first.route_all(rows, batch_size=2), expected)
    assert ran
    with forwards(second) as ran:
        assert torch.equal(second.route_all(rows, batch_size=2), expected)
        assert torch.equal(second.route_all(rows[::-1], batch_size=2), expected.flip(0))
    assert not ran


@pytest.mark.parametrize(
    "other",
    [
        "shared expert",
        "protocol",
        "layer",
        "rows",
        "order",
        "token types",
        "batch size",
        "dtype",
        "conversion",
        "overrides",
    ],
)
def test_whatever_decides_a_feature_misses(directories: dict[str, Path], tmp_path: Path, other: str) -> None:
    one = TwinModel.from_pretrained(directories["bert"])
    one.feature_cache = tmp_path
    rows, layers, batch_size = one.encode(TEXTS[:3]), [1], 2
    one.features_of(rows, layers, batch_size=batch_size)
    options: dict[str, Any] = {"protocol": "paper"} if other == "protocol" else {}
    options |= {"dtype": "bfloat16"} if other == "dtype" else {}
    kind = "other shared expert" if other == "shared expert" else "bert"
    twin = TwinModel.from_pretrained(directories[kind], **options)
    if other == "conversion":
        twin = one.to(torch.bfloat16)
        twin.feature_cache = None
    if other == "overrides":
        twin.router_overrides = {"embeddings.LayerNorm.bias": torch.ones(24)}
    layers = [2] if other == "layer" else layers
    retyped = [{**row, "token_type_ids": [1] * len(row["input_ids"])} for row in rows]
    rows = {"rows": rows[:2], "order": rows[::-1], "token types": retyped}.get(other, rows)
    batch_size = 3 if other == "batch size" else batch_size
    expected = twin.features_of(rows, layers, batch_size=batch_size)
    twin.feature_cache = tmp_path
    with forwards(twin) as ran:
        (found,) = twin.features_of(rows, layers, batch_size=batch_size)
    assert sum(ran) == len(rows)
    assert torch.equal(found, expected[0])


def test_what_does_not_decide_a_feature_hits(directories: dict[str, Path], tmp_path: Path) -> None:
    """Other exclusive vectors, another protocol without overrides, and another router on the same layer."""
    one = TwinModel.from_pretrained(directories["bert"])
    one.feature_cache = tmp_path
    rows = one.encode(TEXTS)
    soft = one.route_all(rows)
    routed = TwinModel.from_pretrained(directories["bert"], protocol="routed")
    smaller = TwinModel.from_pretrained(directories["lower rank"])
    assert smaller.router is not None
    smaller.router.config = dataclasses.replace(smaller.router.config, top_k=1)
    for twin in (routed, smaller):
        twin.feature_cache = tmp_path
        with forwards(twin) as ran:
            found = twin.route_all(rows)
        assert not ran
        assert torch.equal(found.argmax(dim=1), soft.argmax(dim=1))
    assert set(found.flatten().tolist()) == {0.0, 1.0}
    with forwards(one) as ran:
        last = one.features_of(rows, [-1], batch_size=2)
        assert ran
        ran.clear()
        assert torch.equal(one.features_of(rows, [2], batch_size=2)[0], last[0])  # of a model of two blocks
        assert not ran


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "another tensor"])
def test_a_damaged_file_is_computed_anew(
    directories: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    twin = TwinModel.from_pretrained(directories["bert"])
    rows = twin.encode(TEXTS)
    twin.feature_cache = tmp_path
    expected = twin.route_all(rows)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    torn = {"truncated": whole[:-40], "empty": b"", "one bit": flipped}.get(damage)
    file.write_bytes(whole.replace(b'"features"', b'"featured"') if torn is None else torn)
    with caplog.at_level(logging.WARNING), forwards(twin) as ran:
        assert torch.equal(twin.route_all(rows), expected)
    assert ran
    (record,) = caplog.records
    assert f"{file}: damaged" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert list(tmp_path.glob("*.safetensors")) == [file]
    stored = read_tensors(file, format_number=FORMAT)
    assert stored is not None
    assert stored.keys() == safetensors.torch.load(whole).keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in safetensors.torch.load(whole).items())


def test_a_directory_that_can_t_be_made(directories: dict[str, Path], tmp_path: Path) -> None:
    twin = TwinModel.from_pretrained(directories["bert"])
    (tmp_path / "file").write_text("")
    twin.feature_cache = tmp_path / "file" / "features"
    with pytest.raises(InputError, match=r"features can't be kept there \(Not a directory\)"):
        twin.route_all(twin.encode(TEXTS))


def test_features_that_find_no_room_are_used_all_the_same(
    directories: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = TwinModel.from_pretrained(directories["bert"])
    rows = twin.encode(TEXTS)
    expected = twin.route_all(rows)
    twin.feature_cache = tmp_path

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert torch.equal(twin.route_all(rows), expected)
    assert "can't be kept ([Errno 28] No space left on device" in caplog.text
    assert not list(tmp_path.glob("*.safetensors"))


def test_builds_share_their_features(families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another build on the same shared expert and rows runs no row for its router, which is the same to the bit."""
    recipe = families("bert").recipe
    auto = {**recipe, "router": {**recipe["router"], "layer": "auto"}}
    wanted = {**recipe, "router": {**recipe["router"], "layer": -1}, "exclusive": {"rank": 3}}
    read: list[int] = []
    features = TwinModel.features

    def counted(twin: TwinModel, inputs: Any, layers: Any) -> Any:
        read.append(len(inputs["input_ids"]))
        return features(twin, inputs, layers)

    monkeypatch.setattr(TwinModel, "features", counted)
    build_twin(Recipe.model_validate(wanted), tmp_path / "without")
    alone = sum(read)
    build_twin(Recipe.model_validate(auto), tmp_path / "first", feature_cache=tmp_path / "features")
    read.clear()
    build_twin(Recipe.model_validate(wanted), tmp_path / "with", feature_cache=tmp_path / "features")
    rows = {json.loads(line)["text"] for line in Path(recipe["router"]["data"]).read_text().splitlines()}
    assert sum(read) <= alone - len(rows)  # the rest probes the twin itself: a few rows by themselves
    for name in ("twin.json", "router/router.safetensors", "experts/cola/adapter_model.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_factors_that_the_shared_expert_runs_through_are_in_its_digest(causal_families: Any) -> None:
    """Under `paper` a language model's shared expert is W_0 + B_s A_s: other factors, other features."""
    name = "model.layers.0.mlp.up_proj.weight"
    model = copy.deepcopy(causal_families("llama").base)
    stack = AdapterStack(torch.randn(2, 3, 24), torch.randn(2, 40, 3), 1.0)
    install_paper_layers(model, PaperFactors({name: stack}, 0.3, None, 1))
    before = backbone_digest(model.model, {})
    assert backbone_digest(copy.deepcopy(model).model, {}) == before
    model.model.layers[0].mlp.up_proj.A[0] *= 2
    assert backbone_digest(model.model, {}) != before
