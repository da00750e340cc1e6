"""A twin directory, opened to be written in another form: everything but the shared expert's weights is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twin_bench.checkpoints.checkpoint import stored_apart
from twin_bench.checkpoints.skeleton import Skeleton, read_config, skeleton_of
from twin_bench.data.task import TaskType
from twin_bench.twin.directory import load_parts, read_manifest
from twin_bench.twin.parts import Parts


@dataclass(frozen=True)
class StoredTwin:
    """A twin in `directory`: the content of its twin.json, and its parts. The shared expert's weights are not read.

    `config` and `skeleton` are the shared expert's. A parameter that the class ties to another, and that `model/`
    stores with values of its own, is not tied in the skeleton.
    """

    directory: Path
    manifest: Mapping[str, Any]
    config: Any
    skeleton: Skeleton
    parts: Parts

    @property
    def model(self) -> Path:
        """The folder of the shared expert."""
        return self.directory / "model"

    @property
    def task_type(self) -> TaskType:
        """What the twin's models do."""
        return self.skeleton.task_type

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, in the order of the fusion weights."""
        return tuple(self.parts.exclusive)


def open_twin(directory: Path) -> StoredTwin:
    """Open a twin directory, and verify the checksums of all files.

    Raises:
        InputError: there is no twin, its format is newer, or a file is missing, edited or damaged.
    """
    parts = load_parts(directory)
    manifest, config = read_manifest(directory), read_config(directory / "model")
    skeleton = skeleton_of(config, manifest["task_type"])
    apart = stored_apart(directory / "model", skeleton)
    if apart:
        skeleton = skeleton_of(config, manifest["task_type"], apart)
    return StoredTwin(directory, manifest, config, skeleton, parts)
