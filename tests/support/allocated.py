"""What torch allocates on a CPU: the most bytes that a block holds at one time, beside what it found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


class Allocated:
    """The most bytes that the tensors of a block hold at one time, temporary ones of operations included: `peak`."""

    peak = 0

    def __enter__(self) -> Allocated:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        tree = self._profile.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
        sizes = [(event.start_time_ns, event.extra_fields.alloc_size) for event in _allocations(tree)]
        held = 0
        for _, size in sorted(sizes, key=lambda one: one[0]):
            held += size
            self.peak = max(self.peak, held)


def _allocations(events: Any) -> Iterator[Any]:
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event
        yield from _allocations(event.children)
