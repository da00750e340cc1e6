"""Files: atomic writes, folders that appear whole, checksums. Everything that is written goes through this module.

A file is written in a temporary folder of its own, flushed to the disk and renamed, so that a reader sees the old file
or the new one and two processes never share a temporary name. A temporary folder is locked while its writer lives: what
a killed run has left is not, and the next writer of the same name removes it. A record is JSON that says
which format it has and which checksum its content has; a file of tensors says the same in its metadata.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from twin_bench.errors import InputError, first_line

if TYPE_CHECKING:
    from torch import Tensor

DECISIVE = (".safetensors", ".bin", ".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".py")
"""The suffixes of a model folder's files that can decide an answer: weights, configs, tokenizers, code."""

OWN_PACKAGE = "twin_bench"
TEMPORARY = ".twin-bench-partial"
"""What the names of temporary folders end with."""
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""The numbers of errors that come from writing alone."""

_log = logging.getLogger(__name__)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file atomically: it is there whole or not at all, also after a power failure.

    A symbolic link is followed. A device or a pipe, which can't be replaced, is written to as it is.
    """
    if file.exists() and not file.is_file():
        with file.open("wb") as stream:
            stream.write(content)
        return
    with write_stream(file) as stream:
        stream.write(content)


@contextmanager
def write_stream(file: Path) -> Iterator[BinaryIO]:
    """Give a stream whose bytes become the file at the end of the block, atomically. An error leaves nothing behind."""
    with _replacing(file) as temporary, temporary.open("wb") as stream:
        yield stream


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(file, text.encode("utf-8"))


def write_json(file: Path, value: Any, *, indent: int = 2) -> None:
    """Write plain data as JSON, atomically."""
    write_text(file, json.dumps(value, indent=indent) + "\n")


def write_json_lines(file: Path, rows: Iterator[Any] | list[Any]) -> None:
    """Write one JSON value a line, atomically."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; InputError that names it where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: can't be read as JSON ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def write_record(file: Path, content: Mapping[str, Any], *, format_number: int) -> None:
    """Write plain data with the number of its format and its checksum, atomically."""
    plain = json.loads(json.dumps(dict(content)))  # what is read back: keys of mappings become text
    write_json(file, {"format": format_number, "sha256": digest(plain), "content": plain})


def read_record(file: Path, *, format_number: int) -> dict[str, Any] | None:
    """Return what `write_record` wrote; None where there is no file, or one of another format.

    A damaged file is None as well, with a warning that names it: whoever asks computes its content again.
    """
    try:
        stored = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _warn_damaged(file, first_line(error))
        return None
    if not isinstance(stored, dict) or stored.get("format") != format_number:
        _log.info("%s: not of format %s; its content is computed again", file, format_number)
        return None
    content = stored.get("content")
    if not isinstance(content, dict) or stored.get("sha256") != digest(content):
        _warn_damaged(file, "its checksum does not match its content")
        return None
    return content


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], *, format_number: int, notes: Mapping[str, str] | None = None
) -> None:
    """Write tensors with the number of their format, notes and their checksum, atomically."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    notes = {"twin_bench_format": str(format_number), **(notes or {})}
    with _replacing(file) as temporary:
        save_file(contiguous, temporary, metadata={**notes, "sha256": digest_tensors(contiguous, notes)})


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of a safetensors file, each read when it is asked for, and the file's `notes`."""

    def __init__(self, file: Path) -> None:
        from safetensors import safe_open

        self._file = file
        with safe_open(file, framework="pt") as stored:
            self._names = tuple(stored.keys())
            self.notes: dict[str, str] = dict(stored.metadata() or {})

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._file, framework="pt") as stored:
            return stored.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_tensors(file: Path, *, format_number: int) -> StoredTensors | None:
    """Return the tensors that `write_tensors` wrote, their checksum verified; None as for `read_record`."""
    from safetensors import SafetensorError

    try:
        stored = StoredTensors(file)
        if stored.notes.get("twin_bench_format") != str(format_number):
            return None
        said = stored.notes.pop("sha256", None)
        if said == digest_tensors(stored, stored.notes):
            return stored
        _warn_damaged(file, "its checksum does not match its content")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        _warn_damaged(file, first_line(error))
    return None


@contextmanager
def written_at_once(directory: Path) -> Iterator[Path]:
    """Give a folder to write to. It becomes `directory` at the end of the block, or nothing does after an error.

    Raises InputError where `directory` exists already.
    """
    if directory.exists():
        raise InputError(f"{directory}: exists already; give another name, or remove it first")
    with _temporary(directory) as partial:
        yield partial
        partial.chmod(0o777 & ~_umask())
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        os.rename(partial, directory)
        _flush(directory.parent)


def remove_abandoned(directory: Path) -> None:
    """Remove the temporary folders that killed runs have left in a folder and below it."""
    for path in directory.rglob(f".*{TEMPORARY}"):
        _remove_unless_locked(path)


def require_writable(file: Path) -> None:
    """Raise an InputError unless a file can be written: its folder, which is made, takes files and no folder is there.

    It is for what is written at the end of long work.
    """
    if file.is_dir():
        raise InputError(f"{file}: a folder stands where a file is to be written; remove it, or write elsewhere")
    try:
        with _temporary(Path(os.path.realpath(file))):
            pass
    except OSError as error:
        raise InputError(f"{file}: can't be written ({error.strerror}); write elsewhere") from None


def digest(value: Any) -> str:
    """Return the sha256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_file(file: Path) -> str:
    """Return the sha256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_code(module: str) -> list[str]:
    """Return what stands in a key for the code of a module that is imported.

    It is nothing for a module of this package, whose format numbers are raised when its code changes. Of another module
    it is the digest of its file, if it has one.
    """
    file = getattr(sys.modules.get(module), "__file__", None)
    return [] if module.partition(".")[0] == OWN_PACKAGE or file is None else [digest_file(Path(file))]


def digest_files(path: Path, digest_of: Callable[[Path], str] = digest_file) -> str:
    """Return one sha256 of a file, or of the files of `DECISIVE` suffixes in a folder, by `digest_of` of each."""
    if path.is_file():
        return digest([f"{path.name}:{digest_of(path)}"])
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in DECISIVE)
    return digest([f"{file.relative_to(path).as_posix()}:{digest_of(file)}" for file in files])


def digest_tensors(tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> str:
    """Return one sha256 of tensors' names, dtypes, shapes and values, and of notes that belong to them."""
    import torch

    found = hashlib.sha256(json.dumps(notes or {}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _warn_damaged(file: Path, reason: str) -> None:
    _log.warning("%s: damaged (%s); its content is computed again", file, reason)


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """Give the name of a temporary file, which takes the place of `file` at the end of the block."""
    target = Path(os.path.realpath(file))
    with _temporary(target) as folder:
        temporary = folder / "content"
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Give a folder beside `target`, locked until the end of the block; it is removed if it is still there.

    What killed runs have left of the same target is removed first. It is a folder for a single file, too: safetensors
    renames a file of its own over the one that it is asked to write, and no lock on that would stay.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in target.parent.glob(f".{glob.escape(target.name)}-????????{TEMPORARY}"):
        _remove_unless_locked(abandoned)
    with named_where_full(target):
        path, handle = _made_and_locked(target)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)


def _made_and_locked(target: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=TEMPORARY, dir=target.parent))
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # until it is locked, another writer takes it for abandoned
        with contextlib.suppress(OSError):  # a file system without locks: nobody gets one, and nothing is removed
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.exists():
            return path, handle
        os.close(handle)


def _remove_unless_locked(path: Path) -> None:
    """Remove a temporary folder unless its writer lives, which holds a lock on it."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


@contextmanager
def named_where_full(target: Path) -> Iterator[None]:
    """Have the error of a disk that is full, or can't be written, name what was to be written.

    safetensors raises its own error, which is no OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in CANNOT_WRITE and (error.filename is None or TEMPORARY in str(error.filename)):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number and int(number[1]) in CANNOT_WRITE:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(target)) from error
        raise


def _umask() -> int:
    """Return the permissions that this process' new files lack. The system tells them only when they are set."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """Ask the system to write a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
