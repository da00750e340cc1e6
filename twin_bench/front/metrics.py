"""Counts of a front's work, in the text format that Prometheus reads."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Metrics:
    """Requests by adapter and status, errors by kind, and the seconds of routing and of the server."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._errors: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._blocks: Counter[str] = Counter()
        self._running = 0

    def answered(self, adapter: str, status: int) -> None:
        """Count an answer of the server to a request that was forwarded under an adapter's name."""
        self._requests[adapter, status] += 1

    def failed(self, kind: str) -> None:
        """Count an error: `request`, `timeout`, `unreachable`, `malformed` or `broken_stream`."""
        self._errors[kind] += 1

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of a block to those of `routing` or `server`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - started
            self._blocks[what] += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a request as being answered during the block."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def text(self) -> str:
        """Return all counts, a line each."""
        lines = ["# TYPE twin_front_requests_total counter"]
        lines += [
            f'twin_front_requests_total{{adapter="{adapter}",status="{status}"}} {count}'
            for (adapter, status), count in sorted(self._requests.items())
        ]
        lines += ["# TYPE twin_front_errors_total counter"]
        lines += [f'twin_front_errors_total{{kind="{kind}"}} {count}' for kind, count in sorted(self._errors.items())]
        for what in ("routing", "server"):
            lines += [
                f"# TYPE twin_front_{what}_seconds summary",
                f"twin_front_{what}_seconds_sum {self._seconds[what]:.6f}",
                f"twin_front_{what}_seconds_count {self._blocks[what]}",
            ]
        lines += ["# TYPE twin_front_requests_running gauge", f"twin_front_requests_running {self._running}"]
        return "\n".join(lines) + "\n"
