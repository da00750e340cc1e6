"""A first recipe and a first suite, of the experts, rows and lm-eval task files that a folder holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twin_bench.checkpoints.found import Found
from twin_bench.config import as_yaml, commented
from twin_bench.data.rows import read_router_rows
from twin_bench.data.task import CLASSIFIERS, TaskInput
from twin_bench.errors import InputError
from twin_bench.leaderboard.drafts import SCORED, Draft, of_rows, of_task_files
from twin_bench.leaderboard.suite import NAME

ROWS = ("rows", "data")
"""The folders that rows are looked for in."""
ROUTER = "router.jsonl"
"""The file of a router's rows that is written where no folder holds them as a router reads them."""
METHODS = ("average", "task_arithmetic", "ties", "dare_ties")
"""The methods of a first suite, beside twin."""


@dataclass(frozen=True)
class Start:
    """The text of a recipe and of a suite, and the rows {"text", "task"} of a router, if it needs a file of them.

    `tasks` are the names of those that can be run.
    """

    recipe: str
    suite: str
    router: Sequence[dict[str, str]]
    tasks: Sequence[str]


def starting(folder: Path, found: Found, plugins: Sequence[Path] = ()) -> Start:
    """Return what to write to a folder for the experts that were found, with plugins that are imported already.

    Raises InputError for rows that can't be read, and for classifiers of which no task can be run.
    """
    rows = next((folder / name for name in ROWS if (folder / name).is_dir()), None)
    by_rows = [] if rows is None else of_rows(rows, found)
    by_file = {} if found.kind in CLASSIFIERS else of_task_files(folder, found)
    files = {draft.name for draft in by_file.values()}
    drafts = [*(draft for draft in by_rows if draft.name not in files), *by_file.values()]
    if found.kind in CLASSIFIERS:
        _require_tasks(folder, found, drafts)
    names = [expert.name for expert in found.experts]
    trained = sorted((row for d in by_rows for row in d.trained), key=lambda row: names.index(row.task))
    data = _router_data(rows, names, trained)
    models = _models(folder, found, plugins)
    return Start(
        _recipe(folder, models, data),
        _suite(folder, found, models, drafts, _data(rows, drafts, files), _include_path(folder, by_file), data),
        [_router_row(row) for row in trained] if data == ROUTER else [],
        [draft.name for draft in drafts if not draft.why],
    )


def _require_tasks(folder: Path, found: Found, drafts: Sequence[Draft]) -> None:
    if all(draft.why for draft in drafts):
        layout = " or ".join(f"{folder / name / '{task}' / SCORED[0]}.jsonl" for name in ROWS)
        why = "".join(f"; {draft.name}: {draft.why}" for draft in drafts)
        raise InputError(f"no rows of a task: expected {layout}, with {{task}} named like one of the experts{why}")


def _router_data(rows: Path | None, names: Sequence[str], trained: Sequence[TaskInput]) -> str | None:
    """Return what a recipe says of its router's rows: the folder where it can read them as they are, else ROUTER.

    It is None where an expert has no training rows.
    """
    if rows is None or {row.task for row in trained} != set(names):
        return None
    try:
        return rows.name if list(read_router_rows(rows, names).train) == list(trained) else ROUTER
    except InputError:
        return ROUTER


def _router_row(row: TaskInput) -> dict[str, str]:
    pair = {} if row.text_pair is None else {"text_pair": row.text_pair}
    return {"text": row.text, **pair, "task": row.task}


def _data(rows: Path | None, drafts: Iterable[Draft], files: Iterable[str]) -> str | None:
    """Return the folder of the suite's rows, if one of its tasks reads it."""
    used = any(not draft.why and draft.name not in files for draft in drafts)
    return rows.name if rows is not None and used else None


def _include_path(folder: Path, files: Iterable[Path]) -> str | None:
    """Return the folder that all task files are in, if there are any."""
    parents = [str(file.parent) for file in files]
    return _relative(Path(os.path.commonpath(parents)), folder) if parents else None


def _relative(path: Path, folder: Path) -> str:
    """Return a path as a file in `folder` names it: relative if it is inside."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _models(folder: Path, found: Found, plugins: Sequence[Path]) -> list[str]:
    """Return the lines of a recipe's or a suite's plugins, base model and experts."""
    base = Path(found.base_model)
    files = [_relative(file, folder) for file in plugins]
    lines = [f"plugins: {as_yaml(files)}  # Python files, which are imported"] if files else []
    lines += [f"base_model: {as_yaml(_relative(base, folder) if base.is_dir() else found.base_model)}", "experts:"]
    for expert in found.experts:
        what = "an adapter" if expert.is_adapter else "a full checkpoint"
        lines.append(f"  {as_yaml(expert.name)}: {as_yaml(_relative(expert.folder, folder))}  # {what}")
    return [*lines, *(f"  # left out: {commented(f'{name}: {why}')[4:]}" for name, why in found.left_out.items())]


def _recipe(folder: Path, models: Sequence[str], data: str | None) -> str:
    router = [
        "# No router: not every expert has training rows. Write them to a file, and uncomment the next line.",
        '# router: {data: router.jsonl, layer: auto}  # rows {"text": ..., "task": EXPERT}',
    ]
    if data is not None:
        router = [
            "router:",
            f"  data: {data}  # the experts' training rows; labels are not read",
            "  layer: auto  # the hidden state that the router reads: the best one on held-out rows",
        ]
    return _text(
        "# A twin of these experts. All keys: docs/lm-eval.md.",
        f"#   twin-bench build {folder / 'recipe.yaml'} my-twin",
        *models,
        "shared: {method: task_arithmetic, scaling: 0.3}  # how the experts are merged; others: twin-bench methods",
        "exclusive: {density: 0.1}  # the fraction of each matrix's rank that is kept; or {rank: 8}",
        *router,
    )


def _suite(
    folder: Path,
    found: Found,
    models: Sequence[str],
    drafts: Sequence[Draft],
    data: str | None,
    included: str | None,
    router: str | None,
) -> str:
    """Return a suite's text. The rows `router` are named in it where the tasks lack training rows of an expert."""
    runnable = [draft for draft in drafts if not draft.why]
    owners = {draft.expert for draft in runnable}
    everyone = {expert.name for expert in found.experts}
    own = everyone <= {row.task for draft in runnable for row in draft.trained}
    routed = router is not None or (found.kind not in CLASSIFIERS and everyone <= owners)
    name = folder.resolve().name
    lines = [line for draft in drafts for line in draft.lines()]
    if not runnable:
        lines = ["  arc_easy: {expert: null}  # a task of lm-eval's that no expert was trained for; add yours", *lines]
    twin = "  - twin: {router: {layer: auto}}"
    if not routed:
        twin = f"  #{twin[1:]}  # it needs training rows of every expert: see router in docs/suites.md"
    return _text(
        "# Merge methods compared on your tasks. All keys: docs/suites.md. What is called a guess, check.",
        f"#   twin-bench leaderboard --suite {folder / 'suite.yaml'} --out results",
        f"name: {as_yaml(name if NAME.fullmatch(name) else 'mine')}",
        *models,
        *([f"data: {data}  # {{task}}/{{train,validation}}.jsonl"] if data else []),
        *([f"include_path: {as_yaml(included)}  # lm-eval's task files"] if included else []),
        "tasks:",
        *lines,
        *([f"router: {{data: {router}}}  # the rows that routers are trained on"] if router and not own else []),
        "methods:  # all of them: twin-bench methods",
        *(f"  - {method}" for method in METHODS),
        twin,
    )


def _text(*lines: str) -> str:
    return "\n".join(lines) + "\n"
