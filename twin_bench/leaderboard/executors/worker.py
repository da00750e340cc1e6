"""The work of a worker process: it checks that it sees what the command sees, and computes lines."""

from __future__ import annotations

import functools
import os
import pickle
import platform
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from rich.progress import Progress

from twin_bench.errors import InputError, NotFiniteError, UnsuitedError, first_line
from twin_bench.files import require_writable
from twin_bench.leaderboard.ready import Ready, RunOptions, made_ready
from twin_bench.leaderboard.scoring import cells_of
from twin_bench.leaderboard.suite import Suite
from twin_bench.merging.plugins import load_plugins
from twin_bench.results.cells import installed_versions
from twin_bench.twin.device import usable_device


@dataclass(frozen=True)
class Ticket:
    """What a worker is given of a run, and what it must find.

    - `suite`, `out`, `options`: the run.
    - `plugins`: files that are imported first.
    - `folder`: the working directory, to which relative paths belong.
    - `mark`: a file in `out` that the command has written, and its text.
    - `inputs`: the digests of weights and rows.
    - `versions`: of the packages that take part in a score.
    - `threads`: the number of threads of a product. The last bits of a score depend on it.
    - `started`: when the run began.
    """

    suite: Suite
    out: Path
    options: RunOptions
    plugins: tuple[str, ...]
    folder: str
    mark: tuple[str, str]
    inputs: Mapping[str, Any]
    versions: Mapping[str, str]
    threads: int
    started: str


class Outcome(NamedTuple):
    """How a call ended, the reason, and the traceback of an error.

    A line is `done`, `skipped` because its method does not suit the experts, or `failed`. A worker that can't take part
    in the run is `refused`.
    """

    kind: Literal["done", "skipped", "failed", "refused"]
    reason: str = ""
    trace: str = ""


def joined(ticket: bytes) -> Outcome:
    """Make this process ready for a run: open the experts, and take the digests of weights and rows.

    It is refused where it sees other files than the command, or has other versions or no such device.
    """
    try:
        _ready(ticket)
    except (InputError, OSError) as error:
        return Outcome("refused", f"worker {os.getpid()} on {platform.node()}: {error}")
    return Outcome("done")


def computed(ticket: bytes, protocol: str, label: str) -> Outcome:
    """Compute the cells of a line that are not there yet, and write them."""
    try:
        ready = _ready(ticket)
        asked, entry = next((p, e) for p, e in ready.work if (p, e.label) == (protocol, label))
        for _ in cells_of(ready.run, entry, asked):
            pass
    except (UnsuitedError, NotFiniteError) as error:
        return Outcome("skipped", str(error))
    except Exception as error:
        said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
        return Outcome("failed", said, traceback.format_exc())
    return Outcome("done")


@functools.lru_cache(maxsize=2)  # a run, and one inside it that tunes options
def _ready(pickled: bytes) -> Ready:
    """Return the run of a ticket, made ready in this process."""
    ticket: Ticket = pickle.loads(pickled)
    _check_place(ticket)
    torch.set_num_threads(ticket.threads)
    load_plugins(ticket.plugins)
    usable_device(ticket.options.device)
    ready = made_ready(ticket.suite, ticket.out, ticket.options, Progress(disable=True), _no_trial)
    different = sorted(key for key in ticket.inputs if ready.run.inputs.get(key) != ticket.inputs[key])
    if different:
        raise InputError(
            f"the suite's {', '.join(different)} are not those that the command sees; put them on a folder that all "
            "machines share"
        )
    return replace(ready, run=replace(ready.run, started=ticket.started))


def _check_place(ticket: Ticket) -> None:
    """Raise an InputError unless the working directory, the directory of results and the packages are the command's."""
    if not os.path.isdir(ticket.folder):
        raise InputError(f"{ticket.folder}: no such folder, and the command runs in it; share it with all machines")
    os.chdir(ticket.folder)
    name, text = ticket.mark
    mark = ticket.out / name
    if not mark.is_file() or mark.read_text(encoding="utf-8") != text:
        raise InputError(f"--out {ticket.out}: not the folder that the command sees; name one that all machines share")
    require_writable(mark.with_name(f"{name}-{platform.node()}-{os.getpid()}"))
    for package, version in ticket.versions.items():
        found = installed_versions().get(package)
        if found != version:
            raise InputError(f"{package} is {found or 'not installed'}, and the command has {version}; install that")


def _no_trial(_: Suite) -> NoReturn:
    """Refuse to tune: the command has chosen all options before it asks for a line."""
    raise RuntimeError("a worker was asked for a line whose options are not chosen")
