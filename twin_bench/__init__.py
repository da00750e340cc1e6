"""twin-bench: twin-merged models inside evaluation harnesses, and a leaderboard of merge methods.

`merge` and `methods` are the merge methods, `TwinModel` the model that fuses experts per input. `merge_method` and
`TaskVectors` are what a new merge method is written with, `router_kind` and `Router` a new router, `metric` a new
metric, and `task` with `Classification`, `GenerativeTask` and `Item` a new task. `load_leaderboard` reads results as
data frames, and `compare` compares methods on the same rows. A user's mistake raises `InputError`.

`import twin_bench` imports no other module. A name below is imported when it is first asked for (PEP 562), because
torch and transformers take seconds to import.
"""

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes longer than everything else here, and an interrupt may fall into it
    from typing import Any

    from twin_bench.data.classification import Classification
    from twin_bench.data.generative import GenerativeTask, Item
    from twin_bench.data.metrics import metric
    from twin_bench.data.registry import task
    from twin_bench.errors import InputError
    from twin_bench.merging.by_name import merge
    from twin_bench.merging.registry import merge_method, methods
    from twin_bench.merging.task_vectors import TaskVectors
    from twin_bench.results.compare import compare
    from twin_bench.results.stored import load_leaderboard
    from twin_bench.twin.model import TwinModel
    from twin_bench.twin.routers.base import Router
    from twin_bench.twin.routers.registry import router_kind

__all__ = [
    "Classification",
    "GenerativeTask",
    "InputError",
    "Item",
    "Router",
    "TaskVectors",
    "TwinModel",
    "compare",
    "load_leaderboard",
    "merge",
    "merge_method",
    "methods",
    "metric",
    "router_kind",
    "task",
]

_HOMES = {
    "Classification": "twin_bench.data.classification",
    "GenerativeTask": "twin_bench.data.generative",
    "InputError": "twin_bench.errors",
    "Item": "twin_bench.data.generative",
    "Router": "twin_bench.twin.routers.base",
    "TaskVectors": "twin_bench.merging.task_vectors",
    "TwinModel": "twin_bench.twin.model",
    "compare": "twin_bench.results.compare",
    "load_leaderboard": "twin_bench.results.stored",
    "merge": "twin_bench.merging.by_name",
    "merge_method": "twin_bench.merging.registry",
    "methods": "twin_bench.merging.registry",
    "metric": "twin_bench.data.metrics",
    "router_kind": "twin_bench.twin.routers.registry",
    "task": "twin_bench.data.registry",
}


def __getattr__(name: str) -> "Any":
    """Import the module that `name` lives in and return it; AttributeError for a name that is not exported."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """Return the module's names, those that are not imported yet among them."""
    return sorted({*globals(), *__all__})
