"""Merge by each method that is named and print what each took: run by test_memory.py in a process of its own.

Anonymous memory is what counts. The inputs' pages are mapped from files: they are the page cache's, and the kernel
takes them back when it is short of memory. `total`, the kernel's own high-water mark, counts those that a merge holds
as well.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

from twin_bench.errors import UnsuitedError
from twin_bench.merging.export import merge_to_directory
from twin_bench.merging.linear_algebra import right_singular, rows_of
from twin_bench.merging.recipe import MergeRecipe

STATUS = Path("/proc/self/status")


def resident(kind: str) -> int:
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(kind))


class Peak:
    """The largest anonymous memory of a block, sampled by a thread, and the kernel's peak of all resident memory."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        self._before = resident("RssAnon"), resident("VmRSS")
        self._largest = self._before[0]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.anonymous = self._largest - self._before[0]
        self.total = resident("VmHWM") - self._before[1]

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self._largest = max(self._largest, resident("RssAnon"))


def main(recipe: str, out: str, width: str, merges: str) -> None:
    # BLAS and LAPACK keep buffers of their own, a few MB that do not grow with the matrix: they are taken here.
    right_singular(rows_of(torch.randn(int(width), int(width))))
    peaks: dict[str, dict[str, int] | None] = {}
    for merge in ({"method": "pretrained"}, *json.loads(merges)):  # a first round, which imports and warms up
        method = merge["method"]
        settings = {**json.loads(recipe), "merge": merge}
        try:
            with Peak() as peak:
                merge_to_directory(MergeRecipe.model_validate(settings), Path(out) / method)
            peaks[method] = {"anonymous": peak.anonymous, "total": peak.total}
        except UnsuitedError:
            peaks[method] = None
    print(json.dumps(peaks))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*sys.argv[1:])
