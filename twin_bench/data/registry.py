"""Every task by name, and how one of your own is registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from twin_bench.data.generative import GENERATIVE
from twin_bench.data.glue import GLUE
from twin_bench.data.task import Task
from twin_bench.errors import InputError, shown

_TASKS: dict[str, Task] = {**GLUE, **GENERATIVE}
_MODULES = dict.fromkeys(_TASKS, __name__)
TASKS: Mapping[str, Task] = _TASKS
"""Every task that a suite can name, by name: GLUE's, the four generative ones, and those of plugins."""


def task(make: Callable[[], Task]) -> Callable[[], Task]:
    """Register the task that the decorated function returns, so that suites can name it.

    Raises:
        InputError: another module's task has the name.
    """
    made = make()
    if not isinstance(made, Task):
        raise InputError(f"task {make.__name__}: expected a Task, such as Classification(...), found {shown(made)}")
    other = _MODULES.setdefault(made.name, make.__module__)
    if other != make.__module__:
        raise InputError(f"two tasks are named {made.name}: in {other} and {make.__module__}; rename one")
    _TASKS[made.name] = made
    return make
