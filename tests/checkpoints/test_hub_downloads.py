"""Models from a hub that this test serves: what is asked of it, what it refuses, and downloads that end too early."""

import json
import os
from pathlib import Path

import peft
import pytest
from huggingface_hub import constants, snapshot_download

from tests.support.hub import TOKEN, Hub, ask
from tests.support.models import tiny_classifier
from twin_bench.checkpoints import hub as module
from twin_bench.checkpoints.hub import model_directory
from twin_bench.checkpoints.sources import open_sources
from twin_bench.errors import InputError

WEIGHTS = os.urandom(300_000)
FILES = {
    "config.json": b'{"version": 1}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "consolidated.safetensors": b"the same in another format",
    "pytorch_model.bin": b"a pickle",
    "pytorch_model.bin.index.json": b'{"weight_map": {"a": "pytorch_model-1-of-2.bin"}}',
    "modeling.py": b"code",
    "onnx/config.json": b"{}",
}
KEPT = ["config.json", "model.safetensors", "pytorch_model.bin.index.json", "tokenizer.json"]
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
SHARDS = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-1.safetensors": WEIGHTS,
    "model-2.safetensors": WEIGHTS[:1000],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process asks, and an empty cache."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    monkeypatch.setattr(module, "_PAUSES", (0.01, 0.01))
    with Hub() as served:
        ask(served, tmp_path, monkeypatch)
        yield served


def refused(name, **options):
    with pytest.raises(InputError) as error:
        model_directory(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def names(folder: Path):
    return sorted(file.name for file in folder.iterdir())


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, monkeypatch):
    first = hub.add("org/model", FILES)
    hub.add("org/model", FILES | {"config.json": b'{"version": 2}'}, names=("v2", "refs/pr/1"))
    folder = model_directory("org/model", tokenizer=True)
    assert names(folder) == KEPT
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folder.name == first
    for name in ("org/model@v2", "org/model@refs/pr/1"):
        assert (model_directory(name) / "config.json").read_bytes() == b'{"version": 2}'
    asked = len(hub.log)
    assert model_directory(f"org/model@{first}") == folder == model_directory("org/model")
    assert len(hub.log) == asked, "what is in the cache is not asked for"
    assert "org/model has no revision 'v9'" in refused("org/model@v9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_directory("org/model@v2").name != first
    assert "not whole in the local cache, and HF_HUB_OFFLINE is set; unset it" in refused("org/model@v3")


def test_a_branch_that_moved_is_not_asked_for_and_the_hubs_own_command_updates_it(hub):
    hub.add("org/model", FILES)
    first = model_directory("org/model")
    second = hub.add("org/model", FILES | {"config.json": b'{"version": 2}'})
    assert model_directory("org/model") == first
    snapshot_download("org/model")  # what `hf download org/model` runs
    assert model_directory("org/model").name == second


def test_a_folder_of_a_repository_and_a_repository_that_moved(hub):
    commit = hub.add("org/many", {f"{task}/run/{name}": content for task in "ab" for name, content in FILES.items()})
    hub.moved["org/former"] = "org/many"
    for repository in ("org/many", "org/former"):
        folder = model_directory(f"{repository}/a/run@{commit}")
        assert folder.parts[-3:] == (commit, "a", "run")
        assert names(folder) == KEPT
        assert not (folder.parents[1] / "b").exists()
    assert "name the folder that has them (ORG/MODEL/FOLDER)" in refused("org/many")


@pytest.mark.parametrize(("access", "says"), [("gated", "is gated; accept its terms on"), ("private", "is private")])
def test_without_access_one_line_says_to_log_in(hub, monkeypatch, access, says):
    hub.add("org/closed", FILES, access=access)
    for token in (None, "hf_of_someone_else"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        line = refused("org/closed")
        assert says in line
        assert "log in (`hf auth login`, or set HF_TOKEN)" in line
    assert "the hub has no org/none, or it is private; check the name" in refused("org/none")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert names(model_directory("org/closed")) == KEPT
    assert all("authorization" not in headers for _, path, headers in hub.log if path.startswith("/storage"))


def test_a_hub_that_fails_and_a_connection_that_is_cut_are_tried_again(hub):
    hub.add("org/model", FILES)
    hub.faults["org/model/model.safetensors"] = [500, ("cut", 100_000)]
    assert (model_directory("org/model") / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [headers.get("range") for _, path, headers in hub.log if path.startswith("/storage")]
    assert ranges == [None, None, "bytes=100000-"]


def test_a_download_that_failed_is_finished_by_the_next_run(hub, monkeypatch):
    hub.add("org/model", SHARDS)
    hub.faults["org/model/model-2.safetensors"] = [500] * 3
    line = refused("org/model")
    assert "500" in line
    assert "run again, which keeps the files that are whole, or give a local directory" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not whole in the local cache" in refused("org/model")
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.log.clear()
    assert names(model_directory("org/model")) == sorted(SHARDS)
    assert hub.downloads("org/model") == ["model-2.safetensors"]


def test_shards_that_an_older_client_left_out_are_downloaded(hub):
    """It leaves no list of a snapshot's files, and gives out what is there."""
    hub.add("org/model", SHARDS)
    folder = model_directory("org/model")
    for listing in Path(constants.HF_HUB_CACHE).rglob("trees/*.json"):
        listing.unlink()
    (folder / "model-1.safetensors").unlink()
    assert names(model_directory("org/model")) == sorted(SHARDS)


def test_a_copy_that_lacks_other_files_is_completed_or_used_with_a_warning(hub, monkeypatch, caplog):
    hub.add("org/model", FILES | {"generation_config.json": b"{}"})
    folder = model_directory("org/model")
    (folder / "generation_config.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_directory("org/model") == folder
    if any(Path(constants.HF_HUB_CACHE).rglob("trees/*.json")):  # The client lists a snapshot's files since 2.0.
        assert "generation_config.json" in caplog.text
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert (model_directory("org/model") / "generation_config.json").is_file()


def test_a_hub_out_of_reach_is_one_line(hub):
    hub.__exit__()
    assert "its download failed" in refused("org/model")


def test_an_adapter_on_another_revision_of_the_base_is_a_warning(hub, families, tmp_path, caplog):
    hub.add("org/bert", families("bert").root / "base", names=("main", "v1", "v2"))
    settings = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier"])
    peft.get_peft_model(tiny_classifier("bert"), settings).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    own = json.loads(file.read_text()) | {"base_model_name_or_path": "org/bert"}
    for revision, base, warns in (("v1", "org/bert@v2", True), ("v1", "org/bert@v1", False), (None, "org/bert", False)):
        file.write_text(json.dumps(own | {"revision": revision}))
        caplog.clear()
        open_sources(base, {"x": str(tmp_path / "adapter")})
        assert ("an adapter on org/bert@v1, the base model is org/bert@v2" in caplog.text) == warns
