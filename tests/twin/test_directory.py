"""The directory format: PEFT reads it, damage is found, nothing is half-written."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from tests.support.dense import batch
from tests.support.models import tiny_tokenizer
from twin_bench import InputError, TwinModel
from twin_bench.checkpoints.tokenizers import save_tokenizer
from twin_bench.twin.builder import build_twin
from twin_bench.twin.directory import load_parts, read_manifest, verify
from twin_bench.twin.recipe import Recipe


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def built(request: pytest.FixtureRequest, twins: Any) -> Path:
    return twins(request.param)


def test_peft_loads_each_expert_as_it_is(built: Path) -> None:
    """PEFT's model/ + experts/NAME equals the twin with weight 1 on it, but for the 1-D tensors in their own file."""
    twin = TwinModel.from_pretrained(built)
    inputs = batch(3)
    for index, name in enumerate(twin.expert_names):
        adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(built / "model"), built / "experts" / name).eval()
        for layer in twin.fusion.layers:
            layer.vectors = layer.bias_vectors = None
        weights = torch.eye(len(twin.expert_names))[index]
        with torch.no_grad(), twin.fusion.fuse(weights):
            ours = twin.model.base_model(**inputs).last_hidden_state
            theirs = adapted(**inputs).last_hidden_state
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_layout(built: Path) -> None:
    assert {p.name for p in built.iterdir()} == {"twin.json", "model", "experts", "router"}
    for name in json.loads((built / "twin.json").read_text())["experts"]:
        assert {p.name for p in (built / "experts" / name).iterdir()} == {
            *("adapter_config.json", "adapter_model.safetensors"),
            *("vectors.safetensors", "head.safetensors"),
        }
        assert str(built) not in (built / "experts" / name / "adapter_config.json").read_text()


@pytest.mark.parametrize("file", ["model/model.safetensors", "experts/cola/head.safetensors", "router/config.json"])
def test_an_edited_file_is_found(built: Path, tmp_path: Path, file: str) -> None:
    copy = shutil.copytree(built, tmp_path / "twin")
    data = bytearray((copy / file).read_bytes())
    data[-1] ^= 1
    (copy / file).write_bytes(bytes(data))
    with pytest.raises(InputError, match=f"{file}: edited or damaged"):
        TwinModel.from_pretrained(copy)
    (copy / file).unlink()
    with pytest.raises(InputError, match=f"{file}: missing"):
        TwinModel.from_pretrained(copy)


def test_a_newer_format_or_no_twin_is_refused(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "twin")
    manifest = json.loads((copy / "twin.json").read_text())
    (copy / "twin.json").write_text(json.dumps({**manifest, "format_version": 4}))
    with pytest.raises(InputError, match="upgrade twin-bench"):
        TwinModel.from_pretrained(copy)
    del manifest["sha256"]
    (copy / "twin.json").write_text(json.dumps({**manifest, "format_version": 1, "experts": ["../cola"]}))
    with pytest.raises(InputError, match="letters, digits"):
        TwinModel.from_pretrained(copy)
    (copy / "twin.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        TwinModel.from_pretrained(copy)
    with pytest.raises(InputError, match="twin-bench build"):
        TwinModel.from_pretrained(tmp_path / "nothing")


def test_the_version_that_built_a_twin_is_information_only(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "twin")
    manifest = json.loads((copy / "twin.json").read_text())
    assert manifest["format_version"] == 3
    del manifest["sha256"]
    (copy / "twin.json").write_text(json.dumps({**manifest, "format_version": 1, "twin_bench": "0.0.1"}))
    verify(copy, read_manifest(copy))
    assert load_parts(copy).digests == load_parts(built).digests


def test_a_twin_of_the_first_format_still_loads(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "twin")
    manifest = json.loads((copy / "twin.json").read_text())
    del manifest["sha256"]
    (copy / "twin.json").write_text(json.dumps({**manifest, "format_version": 1}))
    assert load_parts(copy).digests == load_parts(built).digests
    (copy / "twin.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="its own sha256 does not match"):
        read_manifest(copy)


@pytest.mark.parametrize(
    "change", [{"max_length": 7}, {"experts": ["rte", "cola"]}, {"seed": 12}], ids=["window", "order", "seed"]
)
def test_an_edited_setting_is_found(built: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """The experts' order decides which column of the weights is whose."""
    manifest = json.loads((built / "twin.json").read_text())
    assert {key: manifest[key] for key in change} != change
    (tmp_path / "twin.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(InputError, match=r"twin\.json: edited or damaged"):
        read_manifest(tmp_path)


def test_every_flip_of_a_bit_in_twin_json_is_found_or_harmless(built: Path, tmp_path: Path) -> None:
    file = tmp_path / "twin.json"
    whole, expected = (built / "twin.json").read_bytes(), read_manifest(built)
    for place in range(0, len(whole), 11):
        for bit in range(8):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with contextlib.suppress(InputError):
                assert read_manifest(tmp_path) == expected


def test_a_file_that_is_not_listed_is_found(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "twin")
    (copy / "model" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: not listed in twin\.json"):
        verify(copy, read_manifest(copy))


def test_a_failed_build_leaves_nothing(families: Any, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({**families("bert").recipe, "experts": {"cola": str(tmp_path / "missing")}})
    with pytest.raises(InputError):
        build_twin(recipe, tmp_path / "twin")
    assert list(tmp_path.iterdir()) == []


def test_a_build_is_reproducible_bit_for_bit(families: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        torch.manual_seed(len(name) * 17 + ord(name[0]))
        build_twin(Recipe.model_validate(families("bert").recipe), tmp_path / name)
    first, second = (json.loads((tmp_path / name / "twin.json").read_text()) for name in ("one", "two"))
    assert first == second
    with pytest.raises(InputError, match="exists already"):
        build_twin(Recipe.model_validate(families("bert").recipe), tmp_path / "one")


@pytest.mark.parametrize(("content", "says"), [(b"[1]", "no JSON object"), (b"{", "not JSON"), (b"\xff{}", "not JSON")])
def test_a_twin_json_that_is_none_is_damaged(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "twin.json").write_bytes(content)
    with pytest.raises(InputError, match=f"twin.json: damaged, {says}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("offline", [True, False])
def test_a_tokenizer_is_written_alike_however_it_was_loaded(tmp_path: Path, offline: bool) -> None:
    """transformers writes whether HF_HUB_OFFLINE was set, which changed a twin's digest."""
    tiny_tokenizer("bert").save_pretrained(tmp_path / "first")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "first", local_files_only=offline)
    save_tokenizer(loaded, tmp_path / "second")
    again = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert (
        not {"local_files_only", "is_local"}
        & json.loads((tmp_path / "second" / "tokenizer_config.json").read_text()).keys()
    )
    assert again("the cat")["input_ids"] == loaded("the cat")["input_ids"]
