"""Files appear whole or not at all, and what is read back is what was written."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.faults import full_disk
from twin_bench.errors import InputError
from twin_bench.files import (
    digest_files,
    read_record,
    read_tensors,
    remove_abandoned,
    require_writable,
    write_bytes,
    write_record,
    write_tensors,
    written_at_once,
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deep" / "file"
    write_bytes(file, b"old")

    def full(handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_a_record_of_another_format_or_a_damaged_one_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "record.json"
    assert read_record(file, format_number=1) is None
    content = {"score": 0.1 + 0.2, "name": "é", "list": [1, None, True]}
    write_record(file, content, format_number=1)
    assert read_record(file, format_number=1) == content
    assert read_record(file, format_number=2) is None
    assert not caplog.records
    text = file.read_text()
    for damaged in (text.replace("true", "false"), text[:-20], "[]", "", text.replace('"sha256": "', '"sha256": "0')):
        file.write_text(damaged)
        assert read_record(file, format_number=1) is None
    assert (
        sum(record.levelno == logging.WARNING and "computed again" in record.message for record in caplog.records) == 4
    )


def test_every_flip_of_a_bit_in_a_record_is_found_or_harmless(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    content = {"score": 12.5, "method": "ties", "n": 3}
    write_record(file, content, format_number=1)
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert read_record(file, format_number=1) in (None, content)


def test_tensors_are_read_one_by_one_after_their_checksum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "t.safetensors"
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1], dtype=torch.int64), "none": torch.empty(0)}
    write_tensors(file, tensors, format_number=3, notes={"rows": "12"})
    stored = read_tensors(file, format_number=3)
    assert stored is not None
    assert stored.notes["rows"] == "12"
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {n: t.tolist() for n, t in tensors.items()}
    assert "c" not in stored
    assert read_tensors(file, format_number=4) is None
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = read_tensors(file, format_number=3)
        assert found is None or {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in tensors.items()}
    assert caplog.records


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError), written_at_once(tmp_path / "out") as folder:
        fail(folder)
    assert not list(tmp_path.iterdir())
    with written_at_once(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InputError, match="exists already"), written_at_once(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "vocab.txt", "merges.txt", "spiece.model", "sub/chat.jinja", "code.py"]
)
def test_a_models_digest_holds_all_that_decides_an_answer(tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_text("a model")
    (tmp_path / "tokenizer.json").write_text("{}")
    before = digest_files(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a")
    added = digest_files(tmp_path)
    (tmp_path / name).write_text("b")
    assert len({before, added, digest_files(tmp_path)}) == 3
    (tmp_path / "README.md").write_text("another word")
    (tmp_path / name).write_text("a")
    assert digest_files(tmp_path) == added


def test_a_record_is_plain_json(tmp_path: Path) -> None:
    write_record(tmp_path / "r.json", {"a": 1}, format_number=7)
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["format"] == 7
    assert stored["content"] == {"a": 1}


def test_a_link_is_followed_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real" / "file", tmp_path / "link", tmp_path / "pipe"
    write_bytes(real, b"old")
    link.symlink_to(real)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert [path.name for path in real.parent.iterdir()] == ["file"]
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(pipe.read_bytes)
        write_bytes(pipe, b"through")
        assert read.result(timeout=30) == b"through"
    assert pipe.is_fifo()


def test_permissions_are_those_of_a_new_file(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_bytes(tmp_path / "file", b"x")
        with written_at_once(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700


def test_a_record_with_numbers_for_keys_is_read_back(tmp_path: Path) -> None:
    write_record(tmp_path / "r.json", {"epochs": {2: 0.5, 10: 0.25}}, format_number=1)
    assert read_record(tmp_path / "r.json", format_number=1) == {"epochs": {"2": 0.5, "10": 0.25}}


KILLED = """
import os, signal, sys
from pathlib import Path
from twin_bench.files import write_stream, written_at_once
root = Path(sys.argv[1])
with written_at_once(root / "twin") as folder, write_stream(root / "cell.json") as stream:
    (folder / "half").write_text("x")
    stream.write(b"x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_has_left_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert [re.sub("-.{8}[.]", "-X.", name) for name in left] == [
        ".cell.json-X.twin-bench-partial",
        ".twin-X.twin-bench-partial",
    ]
    (tmp_path / ".twin-mine").mkdir()  # anybody's folder of a like name stays
    write_bytes(tmp_path / "other", b"x")
    assert len(list(tmp_path.iterdir())) == 4
    write_bytes(tmp_path / "cell.json", b"whole")
    with written_at_once(tmp_path / "twin"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".twin-mine", "other", "cell.json", "twin"}


def test_what_a_living_writer_works_on_stays(tmp_path: Path) -> None:
    """Two runs build the same twin: neither may take the other's folder for abandoned."""
    with written_at_once(tmp_path / "twin") as first:
        (first / "weights").write_text("x")
        with contextlib.suppress(RuntimeError), written_at_once(tmp_path / "twin"):
            raise RuntimeError
        assert (first / "weights").is_file()
    assert (tmp_path / "twin" / "weights").is_file()


def test_a_full_disk_names_what_was_to_be_written(tmp_path: Path) -> None:
    """safetensors raises an error of its own there."""
    tensors = {"a": torch.zeros(100_000)}
    for write in (
        lambda: write_bytes(tmp_path / "file", b"x" * 100_000),
        lambda: write_tensors(tmp_path / "file", tensors, format_number=1),
    ):
        with full_disk(50_000), pytest.raises(OSError, match="File too large") as raised:
            write()
        assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
        assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "index.html")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "index.html").mkdir()
    with pytest.raises(InputError, match=r"index\.html: a folder stands where a file is to be written"):
        require_writable(tmp_path / "index.html")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="can't be written"):
        require_writable(tmp_path / "file" / "index.html")


WRITING = """
import os, sys, time
from pathlib import Path
import safetensors.torch, torch
from twin_bench.files import write_tensors
fsync, root = os.fsync, Path(sys.argv[1])
def slow(handle):
    (root / "ready").touch()
    while not (root / "go").exists():
        time.sleep(0.01)
    fsync(handle)
os.fsync = slow
write_tensors(root / "kept" / "state", {"a": torch.arange(5.0)}, format_number=1)
"""


def test_tensors_that_another_process_writes_are_not_taken_for_abandoned(tmp_path: Path) -> None:
    """safetensors renames a file of its own over the one that it is asked to write."""
    with subprocess.Popen([sys.executable, "-c", WRITING, str(tmp_path)]) as writer:
        while not (tmp_path / "ready").exists():
            assert writer.poll() is None
            time.sleep(0.01)
        remove_abandoned(tmp_path)
        write_tensors(tmp_path / "kept" / "state", {"a": torch.zeros(2)}, format_number=1)
        (tmp_path / "go").touch()
        assert writer.wait() == 0
    stored = read_tensors(tmp_path / "kept" / "state", format_number=1)
    assert stored is not None
    assert stored["a"].tolist() == [0, 1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["state"]


def test_a_temporary_folder_that_is_removed_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = tempfile.mkdtemp

    def removed_once(**options: Any) -> str:
        made.append(real(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", removed_once)
    write_bytes(tmp_path / "file", b"x")
    assert len(made) == 2
    assert (tmp_path / "file").read_bytes() == b"x"
