"""Digests of large files, remembered: a model's weights are read once for them, and not whenever they are checked.

A record in the cache's folder says which digest a file had at its path, with its size and its times. A file that has
others is read again. What changes a file's bytes and none of these is a fault of the disk: `anew` finds it.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from twin_bench.files import digest, digest_file, read_record, write_record

FORMAT = 1
"""The number of what a record holds."""
LEAST = 2**20
"""The bytes of the smallest file whose digest is remembered. A smaller one is read sooner than its record is made."""
SETTLED = 2.0
"""The seconds after a change in which another one may leave the file's times as they are."""


def cache_root() -> Path:
    """Return TWIN_BENCH_CACHE, or ~/.cache/twin-bench."""
    return Path(os.environ.get("TWIN_BENCH_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "twin-bench"))


def known_digest(file: Path, *, anew: bool = False) -> str:
    """Return the sha256 of a file's content: the remembered one, if the file is as it was and `anew` is not set.

    Raises OSError for a file that can't be read.
    """
    path = file.resolve()
    status = path.stat()
    if status.st_size < LEAST:
        return digest_file(path)
    record = cache_root() / "digests" / f"{digest(str(path))}.json"
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    known = None if anew else read_record(record, format_number=FORMAT)
    if known is not None and known.get("state") == state:
        return str(known["sha256"])
    begun = time.time()
    found = digest_file(path)
    after = path.stat()
    unchanged = [after.st_size, after.st_mtime_ns, after.st_ctime_ns, after.st_ino] == state
    if unchanged and max(after.st_mtime, after.st_ctime) < begun - SETTLED:
        with contextlib.suppress(OSError):  # where nothing can be kept the file is read each time
            write_record(record, {"path": str(path), "state": state, "sha256": found}, format_number=FORMAT)
    return found
