"""What a block of code took: seconds, peak memory, and whether other processes kept the machine busy meanwhile."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from dataclasses import dataclass
from typing import Self

import psutil

INTERVAL = 0.005
"""The seconds between two readings of the process's memory."""
BUSY = 0.1
"""The machine was busy if other processes took more than this part of its cores."""


@dataclass(frozen=True)
class Taken:
    """How long something took, and its peak memory in bytes. None stands for what was not measured."""

    seconds: float | None = None
    peak_bytes: int | None = None

    def after(self, earlier: Taken) -> Taken:
        """Return what `earlier` and this took one after the other: the sum of seconds, the larger of the peaks.

        A part of it that was not measured leaves the whole unmeasured.
        """
        seconds = None if self.seconds is None or earlier.seconds is None else self.seconds + earlier.seconds
        peaks = self.peak_bytes, earlier.peak_bytes
        return Taken(seconds, None if peaks[0] is None or peaks[1] is None else max(peaks[0], peaks[1]))


class Meter:
    """Measures its `with` block. `taken` holds the result once the block has ended.

    The peak is the largest memory above what the process held when the block began. It is the resident memory, which a
    thread reads every 5 ms, plus what torch has allocated on the device if that is cuda. The two peaks are added up,
    also where they came at different moments.

    Resident memory includes the pages of memory-mapped files, so weights of a checkpoint count once they are read, and
    not when they are opened. A peak that lasts less than 5 ms may be missed. Memory that was freed before the block and
    that the C library has kept is first given back to the system, which only glibc can. Otherwise it would be used
    again without being counted, and a method's peak would depend on what ran before it.
    """

    def __init__(self, device: str = "cpu") -> None:
        """Prepare to measure. `device` is a torch device's name, on which the block allocates."""
        self.taken = Taken()
        self._device = device if device.startswith("cuda") else None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        """Begin: read what is held now, and start the thread."""
        _give_back()
        self._process = psutil.Process()
        self._held = self._largest = self._process.memory_info().rss
        self._allocated = 0
        if self._device:
            import torch  # slow to import, and only needed where it is in use

            torch.cuda.reset_peak_memory_stats(self._device)
            self._allocated = torch.cuda.memory_allocated(self._device)
        self._thread = threading.Thread(target=self._sample, name="twin-bench-meter", daemon=True)
        self._thread.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """End, also after an error: stop the thread and set `taken`."""
        seconds = time.perf_counter() - self._started
        self._ended.set()
        self._thread.join()
        peak = max(self._largest, self._process.memory_info().rss) - self._held
        if self._device:
            import torch

            peak += torch.cuda.max_memory_allocated(self._device) - self._allocated
        self.taken = Taken(seconds, peak)

    def _sample(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._largest = max(self._largest, self._process.memory_info().rss)


def _give_back() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class OtherWork:
    """Watches during its `with` block how much of the machine other processes take.

    `share` holds the result once the block has ended: the processor time that others took, as a fraction of what all
    cores could give in that time. Children of this process are not others. The system counts in hundredths of a second,
    so the share of a block of less than a second says little.
    """

    share: float = 0.0

    def __enter__(self) -> Self:
        """Begin: read the counters."""
        self._before = counters()
        return self

    def __exit__(self, *_: object) -> None:
        """End, also after an error: read the counters again and set `share`."""
        self.share = others_share(self._before, counters(), psutil.cpu_count() or 1)

    @property
    def busy(self) -> bool:
        """Whether others took more than a tenth of the cores."""
        return self.share > BUSY


@dataclass(frozen=True)
class Counters:
    """Readings at one moment, in seconds: the clock, the processor time of the whole system, and that of our own."""

    clock: float
    system: float
    own: float


def others_share(before: Counters, after: Counters, cores: int) -> float:
    """Return the fraction of `cores` that others took between two readings: (system - own) / (clock x cores).

    It is 0 where the counters, which are read one after the other, give less than nothing.
    """
    span = after.clock - before.clock
    others = (after.system - before.system) - (after.own - before.own)
    return max(0.0, others) / (span * cores) if span > 0 else 0.0


def counters() -> Counters:
    """Read the counters. A virtual machine's stolen time counts as taken by others."""
    times = psutil.cpu_times()._asdict()
    # Guests are in `user` and `nice` already, and a core that waits for a disk does nothing.
    idle = ("idle", "iowait", "guest", "guest_nice")
    system = sum(seconds for kind, seconds in times.items() if kind not in idle)
    return Counters(time.perf_counter(), system, _own_seconds())


def _own_seconds() -> float:
    """Return the processor time of this process and of its children, those that have ended included."""
    own = psutil.Process()
    found = own.cpu_times()
    seconds = found.user + found.system + found.children_user + found.children_system
    for child in own.children(recursive=True):
        try:
            theirs = child.cpu_times()
        except psutil.Error:  # It has ended since, and is counted once this process has waited for it.
            continue
        seconds += theirs.user + theirs.system + theirs.children_user + theirs.children_system
    return float(seconds)
