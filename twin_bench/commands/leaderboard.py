"""twin-bench leaderboard, which is also python -m twin_bench.leaderboard."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from twin_bench.commands.report import add_comparison, report
from twin_bench.console import add_device, add_dtype, add_plugins, positive
from twin_bench.paths import shipped_suites

if TYPE_CHECKING:
    from twin_bench.leaderboard.run import RunOptions
    from twin_bench.leaderboard.suite import Suite
    from twin_bench.results.cells import Board

SUMMARY = "run a suite of merge methods and print its table; with no arguments, the embedded demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--suite",
        default="demo",
        help=f"a suite: a YAML file, or one that comes with twin-bench: {', '.join(shipped_suites())} (default: demo)",
    )
    parser.add_argument(
        "--methods",
        help="run these methods only: the suite's labels or method names, with commas between them. The pretrained "
        "model and the experts run in any case, and what earlier runs have scored stays in the table",
    )
    parser.add_argument(
        "--out", metavar="DIRECTORY", type=Path, default=Path("results"), help="where results go (default: results)"
    )
    parser.add_argument(
        "--harness",
        default="lm-eval",
        help="the harness that scores: lm-eval, helm, or one that a plugin adds (default: lm-eval)",
    )
    add_device(parser, default=None)
    add_dtype(parser)
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=_positive_or_auto,
        help="inputs in a forward pass; auto finds what fits a GPU (default: what the suite says, or 32)",
    )
    add_plugins(parser)
    parser.add_argument(
        "--include-path", metavar="DIRECTORY", help="a folder of lm-eval's task files (default: what the suite says)"
    )
    parser.add_argument(
        "--router",
        metavar="FILE",
        help='rows {"text", "task": EXPERT} that routers are trained on, or a directory of them '
        "(default: what the suite says, or its tasks' own training rows)",
    )
    parser.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        default=None,
        help="run tasks of lm-eval's that run code which the model writes",
    )
    parser.add_argument("--limit", metavar="N", type=positive, help="score only the first N rows of each task")
    _add_more(parser)
    _add_executor(parser)
    add_comparison(parser)


def _add_more(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ask for more than the suite's cells, or for less."""
    parser.add_argument(
        "--tune",
        action="store_true",
        help="add a row NAME+tuned: the method with options chosen on held-out training rows, never on scored ones",
    )
    parser.add_argument(
        "--matrix", action="store_true", help="score every expert on every task as well, for a table of its own"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="score nothing: print cells, rows, an estimate of the time, and what difference these rows could show",
    )
    parser.add_argument(
        "--with-speed",
        action="store_true",
        help="also measure the twin's speed beside the plain model's, as twin-bench bench does; let nothing else run",
    )
    parser.add_argument(
        "--log-samples",
        action="store_true",
        help="keep the rows' texts in DIRECTORY/samples, beside the answers of the cells that this run scores",
    )


def _add_executor(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where lines of the table are computed."""
    parser.add_argument(
        "--executor",
        choices=("local", "processes", "ray"),
        default="local",
        help="where models are made and scored: one after the other in this process, in processes of this machine, or "
        "on a Ray cluster (default: local). Scores do not depend on it",
    )
    parser.add_argument(
        "--workers", metavar="N", type=positive, help="so many processes (default: 2; with ray, what the cluster has)"
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the Ray cluster; auto is one that runs on this machine (default: RAY_ADDRESS, or Ray's own choice)",
    )
    parser.add_argument(
        "--gpus-per-worker",
        metavar="N",
        type=float,
        help="GPUs of each Ray worker; 0.5 lets two share one (default: 1 where the cluster has GPUs)",
    )
    parser.add_argument("--retry", action="store_true", help="compute again what failed in a worker of an earlier run")


def run(options: argparse.Namespace) -> None:
    """Run the suite, write its results and print its table; InputError for what is wrong with the suite."""
    from twin_bench.config import replaced
    from twin_bench.console import progress_bars
    from twin_bench.files import require_writable
    from twin_bench.leaderboard.executors import EXECUTORS, Given
    from twin_bench.leaderboard.forecast import described
    from twin_bench.leaderboard.run import RunOptions, plan_suite, run_suite
    from twin_bench.leaderboard.suite import read_suite
    from twin_bench.merging.plugins import load_plugins
    from twin_bench.report.files import FILES
    from twin_bench.results.stored import FILE, write_board
    from twin_bench.twin.device import AUTO

    load_plugins(options.plugin)
    suite = read_suite(options.suite)
    suite = replaced(
        suite,
        dtype=options.dtype,
        batch_size=options.batch_size,
        include_path=options.include_path,
        router={**suite.router, "data": options.router} if options.router else None,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
    )
    wanted = RunOptions(
        only=None if options.methods is None else [name.strip() for name in options.methods.split(",")],
        limit=options.limit,
        harness=options.harness,
        tune=options.tune,
        matrix=options.matrix,
        device=options.device or suite.device or AUTO,
        log_texts=options.log_samples,
        compare_to=options.compare_to,
    )
    if options.with_speed:
        _check_speed(suite, wanted)
    given = Given(options.workers, options.address, options.gpus_per_worker, options.retry)
    executor = EXECUTORS[options.executor](given)
    for file in (FILE, *FILES):
        require_writable(options.out / file)
    if options.plan:
        with progress_bars(options) as progress:
            planned = plan_suite(suite, options.out, wanted, progress=progress)
        print(described(planned, suite.name))
        return
    with executor, progress_bars(options) as progress:
        board = run_suite(suite, options.out, wanted, progress=progress, executor=executor)
    write_board(board._replace(identity={**board.identity, "command": options.command_line}), options.out)
    if options.with_speed:  # it takes minutes: whoever interrupts it has the table by twin-bench report
        _measure_speed(board, options.out)
    report(options.out, compare_to=options.compare_to, wide=options.wide)


def _check_speed(suite: Suite, wanted: RunOptions) -> None:
    """Raise an InputError unless there will be a twin, and its experts' rows are in one folder by their names."""
    from twin_bench.contenders.twins import TwinMethod
    from twin_bench.errors import InputError

    entries = suite.entries(None if wanted.only is None else list(wanted.only))
    if not any(isinstance(entry.method, TwinMethod) and entry.runs_under("standard") for entry in entries):
        raise InputError("--with-speed measures a twin under protocol standard, and none is to be run; leave it out")
    places = {(str(suite.data_of(name)), task.split) for name, task in suite.kinds.items()}
    named = all(task.expert in (None, name) for name, task in suite.kinds.items())
    if len(places) > 1 or not named or suite.data is None:
        raise InputError(
            "--with-speed reads {expert}/{split}.jsonl of one folder, and these tasks have others; run twin-bench bench"
        )


def _measure_speed(board: Board, out: Path) -> None:
    """Run the benchmark on the board's first twin and the rows of its experts' tasks, and write what it measures."""
    from twin_bench.bench.run import bench
    from twin_bench.files import write_json
    from twin_bench.results.stored import SPEED

    cell = next((cell for cell in board.cells if "twin" in cell.notes and cell.protocol == "standard"), None)
    if cell is None:  # it was skipped, and the table says why
        return
    task = board.identity["tasks"][cell.task]
    place, device = Path(task["directory"]), board.identity["device"]
    measured = bench(out / cell.notes["twin"], place, split=task["split"], device=device)
    write_json(out / SPEED, {"method": cell.method, **measured})


def _positive_or_auto(text: str) -> int | str:
    return text if text == "auto" else positive(text)
