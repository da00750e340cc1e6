"""What a build has computed, kept on disk tensor by tensor until the twin is whole: a killed build goes on from there.

The tensors stand in a hidden folder beside the twin's. Its name ends with the digest of all that decides them to the
last bit: the recipe, the names, sizes and times of the files of base model and experts, versions, device and threads.
It is removed when the twin is written, and when the input is wrong. A build of other inputs, or with other threads, to
the same place removes it as well.
"""

from __future__ import annotations

import glob
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twin_bench.checkpoints.hub import model_directory
from twin_bench.errors import InputError
from twin_bench.files import DECISIVE, digest, read_tensors, write_tensors
from twin_bench.merging.registry import find_method
from twin_bench.twin.cache import surroundings
from twin_bench.twin.recipe import Recipe

FORMAT = 3
"""The version of what is kept. It is raised when a build computes its tensors in another way."""
SUFFIX = ".twin-bench-work"
SMALLEST = 2**18
"""The entries of a parameter from which on its tensors are kept."""
DECIDES = ("base_model", "experts", "shared", "exclusive", "seed", "plugins", "allow_pickle")
"""The keys of a recipe that decide the shared expert and the exclusive vectors."""

_log = logging.getLogger(__name__)

Compute = Callable[[], Mapping[str, Tensor]]


class WorkerLostError(InputError):
    """A process that computed tensors was ended from outside. What was computed stays."""


@dataclass(frozen=True)
class Work:
    """The tensors of one build in `folder`, or a build that keeps nothing, without a folder.

    What comes from a parameter of fewer than `smallest` entries is computed sooner than it is written and flushed, and
    is not kept. Without `writes` nothing more is kept, and what is there is taken.
    """

    folder: Path | None = None
    smallest: int = 0
    writes: bool = True

    def tensors(self, key: tuple[str, ...], entries: int, compute: Compute) -> Mapping[str, Tensor]:
        """Return the tensors of `key`, which are computed unless they are kept, and are kept then.

        A file that is damaged is computed again. Where the disk is full nothing more is kept, and a warning says so.

        Args:
            key: names the tensors in this build.
            entries: the size of the parameter that they are computed from.
            compute: computes them.
        """
        if self.folder is None or entries < self.smallest:
            return compute()
        file = self.folder / f"{digest(list(key))}.safetensors"
        stored = read_tensors(file, format_number=FORMAT)
        if stored is not None:
            return dict(stored)
        found = compute()
        try:
            if self.writes:
                write_tensors(file, found, format_number=FORMAT)
        except OSError as error:
            _log.warning("%s: can't be kept (%s); a build that is killed computes it again", file, error)
        return found

    def parameter(self, name: str, shape: torch.Size, compute: Callable[[], Tensor]) -> Tensor:
        """Return a parameter of the shared expert, as `tensors` does."""
        return self.tensors(("shared", name), shape.numel(), lambda: {name: compute()})[name]


@contextmanager
def work_on(directory: Path, recipe: Recipe, device: torch.device, threads: int) -> Iterator[Work]:
    """Give the work of a build of `recipe` to `directory`. It stays where the block is interrupted or a worker is lost.

    Args:
        directory: where the twin will be.
        recipe: what it is made of.
        device: where it is computed. Two devices round differently.
        threads: how many threads of a processor each worker has, or this process without workers. Other numbers round
            differently.
    """
    decisive = {key: value for key, value in recipe.model_dump().items() if key in DECIDES}
    decisive["method"] = find_method(recipe.shared.method).given(recipe.shared.options).identity
    inputs = {model: _files_of(model, recipe.allow_pickle) for model in (recipe.base_model, *recipe.experts.values())}
    around = surroundings(device)
    around["threads"] = around["threads"] and [around["threads"], threads]  # the build's own process computes, too
    own = digest({"format": FORMAT, "recipe": decisive, "files": inputs, "device": str(device), **around})[:16]
    folder = directory.parent / f".{directory.name}-{own}{SUFFIX}"
    for other in directory.parent.glob(f".{glob.escape(directory.name)}-????????????????{SUFFIX}"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    kept = len(list(folder.glob("*.safetensors")))
    if kept:
        _log.info("%s: %d tensors of a build that was interrupted are taken from there", folder, kept)
    try:
        yield Work(folder, SMALLEST)
    except WorkerLostError:
        raise
    except InputError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _files_of(model: str, allow_pickle: bool) -> list[tuple[str, int, int]]:
    """Return the name, the size and the time of each file of a model that can decide a tensor."""
    files = sorted(model_directory(model, allow_pickle=allow_pickle).rglob("*"))
    found = [(file.name, file.stat()) for file in files if file.is_file() and file.suffix in DECISIVE]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]
