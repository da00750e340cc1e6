"""Exclusive vectors on disk: what is read is what was written, and what a version doesn't know is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.dense import batch
from tests.support.families import built
from twin_bench import InputError, TwinModel
from twin_bench.contenders.storage import data_bytes, twin_bytes
from twin_bench.files import digest
from twin_bench.twin.directory import load_parts, read_manifest
from twin_bench.twin.exclusive.files import exclusive_files

pytestmark = pytest.mark.versions

SETTINGS: dict[str, dict[str, Any]] = {
    "8 bits": {"rank": 4, "bits": 8},
    "4 bits": {"budget": 0.2, "bits": 4},
    "sign_mask": {"kind": "sign_mask", "density": 0.3},
}


@pytest.fixture(scope="module", params=SETTINGS)
def twin(request: Any, families: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    settings = SETTINGS[request.param]
    recipe = {**families("bert").recipe, "exclusive": settings, "router": None}
    return settings, built(recipe, tmp_path_factory.mktemp("kind") / "twin")


def resealed(directory: Path, **changes: Any) -> None:
    """Write twin.json with changed keys, and its checksum anew."""
    manifest = {**json.loads((directory / "twin.json").read_text()), **changes}
    del manifest["sha256"]
    (directory / "twin.json").write_text(json.dumps({**manifest, "sha256": digest(manifest)}))


def test_files_and_bytes_are_those_of_the_kind(twin: tuple[dict[str, Any], Path]) -> None:
    settings, directory = twin
    manifest, folder = read_manifest(directory), directory / "experts" / "cola"
    assert manifest["format_version"] == 3
    assert manifest["exclusive"] == settings
    assert exclusive_files(settings) == ("exclusive.json", "exclusive.safetensors", "vectors.safetensors")
    assert {file.name for file in folder.iterdir()} == {*exclusive_files(settings), "head.safetensors"}
    header = json.loads((folder / "exclusive.json").read_text())
    assert {"kind": header["kind"], "bits": header.get("bits")} == {
        "kind": settings.get("kind", "svd"),
        "bits": settings.get("bits"),
    }
    parts = load_parts(directory).exclusive
    tensors = [directory / "experts" / name for name in parts]
    own = [data_bytes(folder / file) for folder in tensors for file in exclusive_files(settings)[1:]]
    assert manifest["bytes"]["exclusive"] == sum(own) == sum(vector.nbytes() for vector in parts.values())
    assert manifest["parameters"]["exclusive"] == sum(vector.numbers() for vector in parts.values())
    heads = sum(data_bytes(folder / "head.safetensors") for folder in tensors)
    assert twin_bytes(directory, "standard", routed=False) == manifest["bytes"]["shared"] + sum(own) + heads
    if "budget" in settings:
        whole = manifest["bytes"]["shared"]
        assert all(vector.nbytes() <= settings["budget"] * whole for vector in parts.values())


def test_every_protocol_without_a_router_answers(twin: tuple[dict[str, Any], Path]) -> None:
    """Under `paper` the biases come from the true task, and a kind without a density is not cut."""
    directory = twin[1]
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
    standard = TwinModel.from_pretrained(directory)(**batch(2), fusion_weights=weights, task="stsb").logits
    paper = TwinModel.from_pretrained(directory, protocol="paper")(**batch(2), fusion_weights=weights, task="stsb")
    torch.testing.assert_close(paper.logits[1], standard[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(paper.logits[0], standard[0], rtol=1e-4)


def test_a_missing_file_is_named(twin: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(twin[1], tmp_path / "twin")
    files = {name: sum_ for name, sum_ in read_manifest(copy)["files"].items() if "exclusive.json" not in name}
    resealed(copy, files=files)
    with pytest.raises(InputError, match=r"experts/cola/exclusive.json is not listed"):
        load_parts(copy)


def test_an_unknown_kind_is_refused(twin: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(twin[1], tmp_path / "twin")
    resealed(copy, exclusive={"kind": "wavelets", "density": 0.1})
    with pytest.raises(InputError, match=r"twin\.json: exclusive vectors of kind 'wavelets', .* upgrade twin-bench"):
        TwinModel.from_pretrained(copy)
    resealed(copy, exclusive={"kind": 3})
    with pytest.raises(InputError, match="damaged, exclusive is"):
        TwinModel.from_pretrained(copy)


@pytest.mark.parametrize("version", [1, 2])
def test_a_twin_of_an_older_format_answers_bit_for_bit(twins: Any, tmp_path: Path, version: int) -> None:
    """A truncated SVD is stored as it always was, but for the version."""
    copy = shutil.copytree(twins("bert"), tmp_path / "twin")
    manifest = json.loads((copy / "twin.json").read_text())
    assert "bytes" not in manifest
    assert manifest["exclusive"] == {"density": 0.5}
    assert sorted(file.name for file in (copy / "experts" / "cola").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "vectors.safetensors",
    ]
    if version == 2:
        resealed(copy, format_version=2)
    else:
        del manifest["sha256"]
        (copy / "twin.json").write_text(json.dumps({**manifest, "format_version": 1}))
    for protocol in ("standard", "paper"):
        old, new = (TwinModel.from_pretrained(one, protocol=protocol) for one in (copy, twins("bert")))
        weights = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
        answers = [twin(**batch(2), fusion_weights=weights, task="cola").logits for twin in (old, new)]
        assert torch.equal(*answers)


@pytest.mark.parametrize("settings", [{"density": "much"}, {}, None])
def test_damaged_settings_are_named(twins: Any, tmp_path: Path, settings: Any) -> None:
    copy = shutil.copytree(twins("bert"), tmp_path / "twin")
    resealed(copy, exclusive=settings)
    with pytest.raises(InputError, match=r"twin\.json: exclusive"):
        load_parts(copy)
