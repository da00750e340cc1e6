"""Digests that are remembered: a file is read once, and again when it has changed."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from twin_bench import InputError, TwinModel
from twin_bench.checkpoints import digests
from twin_bench.checkpoints.digests import known_digest
from twin_bench.files import digest_file, digest_files


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that are read for their digests. All sizes are remembered, at once."""
    names: list[str] = []
    monkeypatch.setenv("TWIN_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LEAST", 0)
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    monkeypatch.setattr(digests, "digest_file", lambda file: names.append(file.name) or digest_file(file))
    return names


def test_a_file_is_read_once(tmp_path: Path, read: list[str]) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    first = known_digest(file)
    assert [known_digest(file), known_digest(tmp_path / "." / "weights.bin")] == [first] * 2 == [digest_file(file)] * 2
    assert read == ["weights.bin"]
    assert known_digest(file, anew=True) == first
    assert len(read) == 2


def test_a_changed_file_is_read_again(tmp_path: Path, read: list[str]) -> None:
    """Of the same size, and with the time of the one before."""
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    before, status = known_digest(file), file.stat()
    time.sleep(0.02)  # the clock of a file system's times
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    assert known_digest(file) == digest_file(file) != before


def test_what_may_still_change_is_not_remembered(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    monkeypatch.setattr(digests, "SETTLED", 60.0)
    known_digest(file)
    known_digest(file)
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    monkeypatch.setattr(digests, "LEAST", 4)
    known_digest(file)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(digests, "LEAST", 0)
    (tmp_path / "cache").write_text("no folder")
    assert known_digest(file) == digest_file(file)
    assert len(read) == 4


def test_a_damaged_record_is_made_again(tmp_path: Path, read: list[str]) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    found = known_digest(file)
    (record,) = (tmp_path / "cache" / "digests").iterdir()
    record.write_text(record.read_text().replace(found[:8], "00000000"))
    assert [known_digest(file), known_digest(file)] == [found] * 2
    assert len(read) == 2


def test_a_folder_has_the_digest_of_its_bytes(tmp_path: Path, read: list[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    assert digest_files(folder, known_digest) == digest_files(folder)
    assert digest_files(folder, known_digest) == digest_files(folder)
    assert sorted(read) == ["config.json", "model.safetensors"]


def test_a_twin_is_read_once_and_an_edited_one_is_found(twins: Any, tmp_path: Path, read: list[str]) -> None:
    """A damage that leaves size and times is found where all files are to be read."""
    directory = shutil.copytree(twins("bert"), tmp_path / "twin")
    TwinModel.from_pretrained(directory)
    assert "model.safetensors" in read
    read.clear()
    TwinModel.from_pretrained(directory)
    assert not read
    TwinModel.from_pretrained(directory, verify=True)
    assert "model.safetensors" in read
    file = directory / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    time.sleep(0.02)
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"model\.safetensors: edited or damaged"):
        TwinModel.from_pretrained(directory)
