"""Seconds, peak memory and other processes' work, against blocks whose costs are known."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from twin_bench.measured import Counters, Meter, OtherWork, Taken, counters, others_share

MEGABYTE = 2**20


def test_the_peak_is_that_of_an_allocation_of_known_size() -> None:
    size = 200 * MEGABYTE
    with Meter() as meter:
        held = bytearray(size)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(0.03)
        del held
        time.sleep(0.02)
    assert meter.taken.peak_bytes == pytest.approx(size, rel=0.2)
    assert meter.taken.seconds is not None
    assert 0.05 <= meter.taken.seconds < 5


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives freed memory back")
def test_memory_that_was_freed_before_counts_when_it_is_used_again() -> None:
    def chunks() -> list[bytearray]:
        return [bytearray(b"x" * 2**16) for _ in range(1600)]

    freed = chunks()
    last = bytearray(b"x" * 2**16)  # without it the heap would shrink by itself
    del freed
    with Meter() as meter:
        held = chunks()
        time.sleep(0.02)
    assert meter.taken.peak_bytes == pytest.approx(len(held) * len(last), rel=0.2)


def test_what_torch_allocates_on_a_gpu_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    held, asked = 10**12, []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 4 * held)
    with Meter("cuda:1") as meter:
        pass
    assert asked == ["cuda:1"]
    assert meter.taken.peak_bytes == pytest.approx(3 * held, rel=0.01)


def test_its_thread_ends_also_after_an_error() -> None:
    threads, seen = threading.active_count(), []

    def fails() -> None:
        seen.append(threading.active_count())
        raise ZeroDivisionError

    meter = Meter()
    with pytest.raises(ZeroDivisionError), meter:
        fails()
    assert seen == [threads + 1]
    assert threading.active_count() == threads
    assert meter.taken.seconds is not None


def test_what_follows_something_adds_its_seconds_and_takes_the_larger_peak() -> None:
    assert Taken(2.0, 100).after(Taken(3.0, 70)) == Taken(5.0, 100)
    assert Taken(2.0, 100).after(Taken(3.0, 170)) == Taken(5.0, 170)
    assert Taken(2.0, 100).after(Taken(3.0, None)) == Taken(5.0, None)
    assert Taken(2.0, 100).after(Taken()) == Taken()


@pytest.mark.parametrize(
    ("system", "own", "share"),
    [(8.0, 8.0, 0.0), (8.0, 4.0, 0.1), (40.0, 0.0, 1.0), (7.9, 8.0, 0.0), (24.0, 10.0, 0.35)],
)
def test_others_have_what_is_not_our_own(system: float, own: float, share: float) -> None:
    """Four cores for ten seconds."""
    before, after = Counters(5.0, 100.0, 30.0), Counters(15.0, 100.0 + system, 30.0 + own)
    assert others_share(before, after, 4) == pytest.approx(share)
    assert others_share(before, before, 4) == 0


def test_the_machine_is_busy_above_a_tenth() -> None:
    watched = OtherWork()
    for share, busy in ((0.0, False), (0.1, False), (0.11, True)):
        watched.share = share
        assert watched.busy is busy


def test_our_own_counter_has_the_work_of_children() -> None:
    before, began = counters(), time.process_time()
    child = subprocess.Popen([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"])
    while time.process_time() < began + 0.2:
        pass
    child.wait()
    after = counters()
    assert 0.45 <= after.own - before.own < 2
    assert after.system - before.system >= 0.45
