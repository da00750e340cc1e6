"""Executors: the table is the local one's whoever computes it, what dies is tried again, what fails is a failed row."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from tests.support.asked import answers, ask_directly
from tests.support.board_figures import figures
from tests.support.pretend_workers import PretendWorkers
from twin_bench.cli import main
from twin_bench.config import parse
from twin_bench.errors import InputError
from twin_bench.leaderboard.executors import Given, Local
from twin_bench.leaderboard.executors.worker import Ticket, joined
from twin_bench.leaderboard.harness import Job
from twin_bench.leaderboard.run import RunOptions, run_suite
from twin_bench.leaderboard.suite import Suite
from twin_bench_lm_eval.harness import LmEval

TWIN = {"exclusive": {"rank": 1}, "router": {"epochs": 1}}


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    return ask_directly(monkeypatch)


@pytest.fixture
def given(tiny: dict[str, Any]) -> Callable[..., Suite]:
    def suite(*methods: Any, **changes: Any) -> Suite:
        small = {"tasks": ["cola", "mnli"], "rows": 12, "calibration_rows": 4, "methods": list(methods)}
        return parse(Suite, {**tiny, **small, **changes}, "suite")

    return suite


def test_the_table_is_the_local_one_bit_for_bit(given: Any, tmp_path: Path, jobs: list[tuple[str, str]]) -> None:
    """A method that draws, a twin under two protocols, a method that does not suit, and every expert on every task."""
    suite = given("dare_ties", {"twin": TWIN}, "arrow", protocol=["standard", "routed"], seeds=2)
    options = RunOptions(matrix=True)
    expected = figures(run_suite(suite, tmp_path / "local", options, executor=Local(Given())), tmp_path / "local")
    once = Counter(jobs)
    jobs.clear()
    with PretendWorkers() as workers:
        board = run_suite(suite, tmp_path / "out", options, executor=workers)
    found = figures(board, tmp_path / "out")
    assert found == expected
    assert {cell.method for cell in board.cells} >= {"pretrained", "experts", "constant", "dare_ties", "twin"}
    assert all(found.values())
    assert Counter(jobs) == once  # no cell twice, also where protocols have the same cells
    assert workers.ended == workers.started == 2
    names = [{file.relative_to(out).as_posix() for file in out.rglob("*.parquet")} for out in tmp_path.iterdir()]
    assert names[0] == names[1]
    assert not [file for file in (tmp_path / "out").iterdir() if file.name.startswith(".workers")]


def test_options_are_tuned_by_the_workers_and_chosen_alike(given: Any, tmp_path: Path, jobs: Any) -> None:
    suite, options = given({"ta": {"method": "task_arithmetic"}}, tasks=["mnli"], rows=6), RunOptions(tune=True)
    expected = figures(run_suite(suite, tmp_path / "local", options), tmp_path / "local")
    with PretendWorkers() as workers:
        found = figures(run_suite(suite, tmp_path / "out", options, executor=workers), tmp_path / "out")
    assert found == expected
    assert "standard,ta+tuned,data-free" in found["cells"]
    assert ("standard", "ta+tuned.0") in workers.calls
    with PretendWorkers(lambda *line: line == ("standard", "ta+tuned.1")) as workers:
        board = run_suite(suite, tmp_path / "bad", options, executor=workers)
    (failed,) = board.skipped
    assert (failed.method, failed.failed) == ("ta+tuned", True)  # no choice is made among the others
    assert failed.reason.startswith("ta+tuned.1: its worker has died 3 times")


def test_a_worker_that_dies_is_replaced_and_its_line_is_tried_again(given: Any, tmp_path: Path, jobs: Any) -> None:
    def dies(*line: str) -> bool:
        seen[line] += 1
        return (line == ("standard", "average") and seen[line] < 3) or line == ("standard", "ties")

    seen: Counter[Any] = Counter()
    suite = given("average", "ties", "task_arithmetic")
    with PretendWorkers(dies) as workers:
        board = run_suite(suite, tmp_path, executor=workers)
    assert {cell.method for cell in board.cells} == {
        "pretrained", "experts", "constant", "average", "task_arithmetic"
    }  # fmt: skip
    assert seen["standard", "average"] == 3
    assert seen["standard", "ties"] == 3
    assert workers.ended == workers.started
    (failed,) = board.skipped
    assert (failed.method, failed.failed) == ("ties", True)
    assert "its worker has died 3 times" in failed.reason
    assert "--retry" in failed.reason
    with PretendWorkers(lambda *line: not line) as workers, pytest.raises(InputError, match="before they were ready"):
        run_suite(suite, tmp_path / "never", executor=workers)


def test_a_line_that_fails_is_a_failed_row_until_it_is_retried(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = True

    def score(_: Any, contender: Any, job: Job) -> Any:
        if broken and job.name == "standard-ties" and job.asked.task.name == "mnli":
            raise RuntimeError("the card is full\nof other things")
        return answers(contender, job)

    monkeypatch.setattr(LmEval, "score", score)
    suite = given("ties", "average")
    with PretendWorkers() as workers:
        board = run_suite(suite, tmp_path, executor=workers)
    assert {cell.method for cell in board.cells} == {"pretrained", "experts", "constant", "average"}
    (failed,) = board.skipped
    assert failed.failed
    assert failed.reason.startswith("RuntimeError: the card is full (")
    (record,) = (tmp_path / "failed").rglob("*.json")
    assert str(record) in failed.reason
    assert "in score" in json.loads(record.read_text())["content"]["traceback"]
    first = figures(board, tmp_path)
    assert "Failed: ties (standard): RuntimeError: the card is full (" in first["remarks"]
    broken = False
    with PretendWorkers() as workers:
        assert figures(run_suite(suite, tmp_path, executor=workers), tmp_path) == first
        assert not workers.calls  # nothing is computed, and no process is started for it
    with PretendWorkers(retry=True) as workers:
        again = run_suite(suite, tmp_path, executor=workers)
    assert not again.skipped
    assert "ties" in {cell.method for cell in again.cells}
    assert not list((tmp_path / "failed").rglob("*.json"))


def test_a_bound_that_fails_ends_the_run(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(*_: Any) -> Any:
        raise ZeroDivisionError("no rows")

    monkeypatch.setattr(LmEval, "score", score)
    with PretendWorkers() as workers, pytest.raises(InputError, match=r"(pretrained|experts): ZeroDivisionError: no r"):
        run_suite(given("average"), tmp_path, executor=workers)
    assert workers.ended == workers.started > 0


def test_one_bar_shows_what_all_workers_do(given: Any, tmp_path: Path, jobs: Any) -> None:
    with PretendWorkers() as workers, Progress(disable=False, console=None) as progress:
        run_suite(given("average", "ties"), tmp_path, executor=workers, progress=progress)
        (task,) = progress.tasks
    assert (task.completed, task.total) == (8, 8)


def ticket_of(suite: Suite, out: Path) -> Ticket:
    """Return the ticket that workers of a run were given."""
    tickets = []

    class Kept(PretendWorkers):
        def start(self, number: int) -> Any:
            worker = super().start(number)
            call = worker.call
            worker.call = lambda function, ticket, *line: [tickets.append(ticket), call(function, ticket, *line)][1]  # type: ignore[method-assign]
            return worker

    with Kept() as workers:
        run_suite(suite, out, executor=workers)
    found: Ticket = pickle.loads(tickets[0])
    (out / found.mark[0]).write_text(found.mark[1])
    return found


def test_a_worker_that_sees_other_files_is_refused(given: Any, tmp_path: Path, jobs: Any, data: Path) -> None:
    rows = Path(shutil.copytree(data, tmp_path / "rows"))
    ticket = ticket_of(given("average", data=str(rows)), tmp_path / "out")

    def refusal(**changes: Any) -> str:
        fields = {**vars(ticket), **changes}
        outcome = joined(pickle.dumps(Ticket(**fields)))
        assert outcome.kind == "refused"
        assert outcome.reason.startswith(f"worker {os.getpid()} on ")
        assert "\n" not in outcome.reason
        return outcome.reason

    assert joined(pickle.dumps(ticket)).kind == "done"
    assert "--out" in refusal(out=tmp_path / "elsewhere")
    assert "not the folder that the command sees" in refusal(mark=(ticket.mark[0], "another run's"))
    assert "no such folder" in refusal(folder=str(tmp_path / "none"))
    assert "torch is 2" in refusal(versions={"torch": "1.0"})
    assert "device 'cuda:77'" in refusal(options=RunOptions(device="cuda:77"))
    assert "none.py: No such file" in refusal(plugins=(str(tmp_path / "none.py"),))
    (rows / "mnli" / "validation.jsonl").write_text((data / "mnli" / "train.jsonl").read_text())
    assert "the suite's rows, suite_rows are not those that the command sees" in refusal(started="later")
    (rows / "mnli" / "validation.jsonl").unlink()
    assert "validation.jsonl: no such file" in refusal(started="even later")


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nowhere", "127.0.0.1:port"])
def test_a_cluster_that_cannot_be_reached_is_refused_at_once(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        address = address.format(port=closed.getsockname()[1])
        started = time.monotonic()
        arguments = ["--suite", "demo", "--out", str(tmp_path), "--executor", "ray", "--address", address]
        assert main(["leaderboard", *arguments]) == 2
    assert time.monotonic() - started < 10
    assert f"--address {address}: no Ray cluster can be reached there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--workers", "2"], "--workers: --executor local does not take it"),
        (["--retry"], "--retry: --executor local does not take it"),
        (["--executor", "processes", "--address", "auto"], "--address: --executor processes does not take it"),
        (["--executor", "processes", "--gpus-per-worker", "1"], "--gpus-per-worker: --executor processes"),
        (["--executor", "threads"], "invalid choice: 'threads'"),
        (["--executor", "ray"], "pip install 'twin-bench[ray]'"),
    ],
)
def test_an_option_that_an_executor_does_not_take(
    flags: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # it can't be imported
    assert main(["leaderboard", "--suite", "demo", "--out", str(tmp_path), *flags]) == 2
    assert says in capsys.readouterr().err
