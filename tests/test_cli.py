"""The twin-bench command: what it loads, what it lists, and how it ends."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import signal
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.support.interpreter import HEAVY, ROOT, loaded_by, python
from twin_bench import cli
from twin_bench.errors import InputError
from twin_bench.paths import tasks_directory


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes a module a command, as an adapter's entry point does."""
    points: list[importlib.metadata.EntryPoint] = []

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        assert group == cli.GROUP
        return points

    def added(name: str, module: object = None) -> None:
        if module is not None:
            monkeypatch.setitem(sys.modules, f"{name}_of_a_plugin", module)
        points.append(importlib.metadata.EntryPoint(name, f"{name}_of_a_plugin", cli.GROUP))

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    return added


def command(run: Any = lambda options: None) -> Any:
    return SimpleNamespace(SUMMARY="wave", add_arguments=lambda parser: parser.add_argument("--often"), run=run)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command line that must end with status 2 and one line; return the line."""
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("arguments", [["tasks"], ["--help"], ["--version"], ["build", "x"], ["bild"]])
def test_nothing_heavy_is_loaded_before_it_is_needed(arguments: list[str]) -> None:
    assert not loaded_by(f"from twin_bench.cli import main; main({arguments})") & HEAVY


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "tasks"])
def test_a_commands_help_loads_nothing_heavy(name: str) -> None:
    code = f"""
from twin_bench.cli import main
try:
    main(['{name}', '--help'])
except SystemExit as end:
    assert not end.code
"""
    assert not loaded_by(code) & HEAVY


def test_tasks_is_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks"]) == 0
    assert capsys.readouterr().out == f"{tasks_directory()}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], add: Any) -> None:
    add("wave", command())
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    listed = [line.split()[0] for line in shown.partition("commands:\n")[2].splitlines() if line.startswith("  ")]
    assert listed == [*cli.COMMANDS, "wave"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"twin-bench {importlib.metadata.version('twin-bench')}\n"


@pytest.mark.parametrize("module", ["twin_bench", "twin_bench.cli"])
def test_python_m_is_the_command(module: str) -> None:
    assert python("-m", module, "tasks").stdout == f"{tasks_directory()}\n"


@pytest.mark.parametrize("name", ["leaderboard", "bench"])
def test_a_module_and_its_command_are_the_same(name: str) -> None:
    asked = python("-m", f"twin_bench.{name}", "--help"), python("-m", "twin_bench", name, "--help")
    assert asked[0].stdout == asked[1].stdout != ""
    assert python("-m", f"twin_bench.{name}", "--nonsense").stderr.startswith(
        f"error: twin-bench {name}: unknown option"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bild"], "unknown command 'bild'; did you mean 'build'?"),
        (["--verson"], "unknown option '--verson'; did you mean '--version'?"),
        (["methods", "--markdow"], "twin-bench methods: unknown option '--markdow'; did you mean '--markdown'?"),
        (["leaderboard", "--limt=3"], "unknown option '--limt'; did you mean '--limit'?"),
        (["leaderboard", "--limit", "-3"], "argument --limit"),
        (["bench", "--twn", "x"], "unknown option '--twn'; did you mean '--twin'?"),  # and not: --twin is missing
        (["bench", "--twin", "x"], "required: --data"),
        (["build", "recipe.yaml"], "required: DIRECTORY"),
        (["tasks", "all"], "unrecognized arguments: all"),
        (["tasks", "-x"], "unrecognized arguments: -x"),
        ([], "no command is named"),
        (["-v"], "no command is named"),
        (["-q", "tasks", "-v"], "give -v or -q, not both"),
        (["build", "no-such.yaml", "out"], "no-such.yaml"),
        (["merge", "no-such.yaml", "out"], "no-such.yaml"),
        (["convert", "no-such.gguf", "out"], "no-such.gguf"),
        (["leaderboard", "--suite", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in error_of(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_an_adapters_command_runs(add: Any) -> None:
    seen: list[argparse.Namespace] = []
    add("wave", command(seen.append))
    assert cli.main(["-v", "wave", "--often", "2", "-v"]) == 0
    assert [(options.often, options.verbose, options.quiet) for options in seen] == [("2", 2, False)]


def test_an_adapters_command_that_cannot_be_loaded(capsys: pytest.CaptureFixture[str], add: Any) -> None:
    add("wave")  # there is no such module
    add("half", SimpleNamespace(SUMMARY="it can't run", add_arguments=print))
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("  wave")] == [
        "  wave         (can't be loaded from wave_of_a_plugin: No module named 'wave_of_a_plugin')"
    ]
    assert any(line.startswith("  half") and "it has no run" in line for line in lines)
    assert "wave: the command can't be loaded from wave_of_a_plugin" in error_of(capsys, "wave")
    assert "half: the command can't be loaded" in error_of(capsys, "half")
    assert "did you mean 'wave'?" in error_of(capsys, "waev")


def test_the_librarys_own_commands_stay_its_own(capsys: pytest.CaptureFixture[str], add: Any) -> None:
    add("tasks", command(lambda options: print("mine")))
    assert cli.main(["tasks"]) == 0
    assert capsys.readouterr().out == f"{tasks_directory()}\n"


def test_the_commands_that_are_declared_can_be_loaded_without_their_harness() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][cli.GROUP]
    for name, module in declared.items():
        assert name not in cli.COMMANDS
        assert not loaded_by(f"import {module} as c; c.SUMMARY, c.add_arguments, c.run") & HEAVY


def test_the_core_names_no_adapter_in_an_import() -> None:
    sources = [ROOT / "twin_bench" / name for name in ("__init__.py", "cli.py", "doctor.py", "console.py")]
    for source in [*sources, *(ROOT / "twin_bench" / "commands").glob("*.py")]:
        assert "import twin_bench_" not in source.read_text()
        assert "from twin_bench_" not in source.read_text()


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (InputError("two\nlines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "x.yaml"), 2, "error: x.yaml: No such file or directory\n"),
        (OSError("the disk is full"), 2, "error: the disk is full\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_how_errors_end(error: BaseException, status: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert cli.reporting_errors(fail) == status
    assert capsys.readouterr().err == says


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.reporting_errors(lambda: print(1 / 0))


INTERRUPTIBLE = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""A shell's background job ignores interrupts, and so does what it starts: the tests may run in one."""


@pytest.mark.parametrize("swallow", ["raise", "raise ImportError('twice')", "raise OSError('closed')"])
def test_an_interrupt_while_a_command_is_imported(swallow: str, tmp_path: Path) -> None:
    code = f"""
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except BaseException:
    {swallow}
"""
    (tmp_path / "slow.py").write_text(code)
    run = "import sys, twin_bench.cli as cli\ncli.COMMANDS = {'slow': 'slow'}\nsys.exit(cli.main(['slow']))"
    done = python("-c", INTERRUPTIBLE + run, path=[tmp_path])
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


@pytest.mark.parametrize("module", ["twin_bench", "twin_bench.leaderboard", "twin_bench.bench"])
def test_an_interrupt_while_the_command_line_is_imported(module: str, tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    )
    run = "import runpy, sys\nsys.argv = ['x', 'tasks']\n"
    run += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    done = python("-c", INTERRUPTIBLE + run, path=[tmp_path])
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_the_command_is_the_one_that_can_be_interrupted() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"twin-bench": "twin_bench.__main__:main"}


@pytest.mark.parametrize(
    ("number", "status", "says"), [("SIGINT", 130, "interrupted\n"), ("SIGTERM", 143, "terminated\n")]
)
def test_a_signal_while_a_command_works_lets_it_clean_up(number: str, status: int, says: str) -> None:
    code = (
        INTERRUPTIBLE
        + f"NUMBER = signal.{number}\n"
        + """
import os, signal, sys, time, types, twin_bench.cli as cli
def run(options):
    try:
        os.kill(os.getpid(), NUMBER)
        time.sleep(60)
    finally:
        print("cleaned up")
sys.modules["works"] = types.SimpleNamespace(SUMMARY="", add_arguments=lambda parser: None, run=run)
cli.COMMANDS = {"works": "works"}
sys.exit(cli.main(["works"]))
"""
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr, done.stdout) == (status, says, "cleaned up\n")


def test_the_usual_handlers_are_put_back() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["--version"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_verbose_and_quiet() -> None:
    code = """
import logging, sys, os, types, twin_bench.cli as cli
def run(options):
    for name in ("twin_bench.x", "twin_bench_of_mine", "elsewhere"):
        for say in (logging.getLogger(name).debug, logging.getLogger(name).info, logging.getLogger(name).warning):
            say(name)
    print(os.environ.get("TQDM_DISABLE"))
sys.modules["said"] = types.SimpleNamespace(SUMMARY="", add_arguments=lambda parser: None, run=run)
cli.COMMANDS = {"said": "said"}
cli.main(["said", *sys.argv[1:]])
"""
    warnings = ["WARNING twin_bench.x", "WARNING twin_bench_of_mine", "WARNING elsewhere"]
    for options, expected, bars in (
        ([], warnings, "None"),
        (["-q"], warnings, "1"),
        (["-v"], ["INFO twin_bench.x", "INFO twin_bench_of_mine", "INFO twin_bench.cli", *warnings], "None"),
        (["-vv"], ["DEBUG twin_bench.x", "DEBUG twin_bench_of_mine", *warnings], "None"),
    ):
        done = python("-c", code, *options)
        said = [line.partition(":")[0] for line in done.stderr.splitlines()]
        assert set(expected) <= set(said), done.stderr
        assert not [line for line in said if line.endswith("elsewhere") and not line.startswith("WARNING")]
        assert len(said) == len(expected) or "-vv" in options
        assert done.stdout == f"{bars}\n"


@pytest.mark.parametrize("place", ["-vv wave", "wave -vv"])
def test_very_verbose_shows_where_an_error_was_raised(place: str) -> None:
    code = """
import sys, types, twin_bench.cli as cli
from twin_bench.errors import InputError
def run(options):
    raise InputError("no such file")
sys.modules["wave"] = types.SimpleNamespace(SUMMARY="", add_arguments=lambda parser: None, run=run)
cli.COMMANDS = {"wave": "wave"}
sys.exit(cli.main(sys.argv[1:]))
"""
    plain, verbose = python("-c", code, "wave"), python("-c", code, *place.split())
    assert plain.returncode == verbose.returncode == 2
    assert plain.stderr == "error: no such file\n"
    assert verbose.stderr.startswith("error: no such file\n")
    assert "Traceback" in verbose.stderr
    assert "in run" in verbose.stderr


def test_very_verbose_shows_why_a_command_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "wave-1.dist-info").mkdir()
    (tmp_path / "wave-1.dist-info" / "METADATA").write_text("Name: wave\nVersion: 1\n")
    (tmp_path / "wave-1.dist-info" / "entry_points.txt").write_text("[twin_bench.commands]\nwave = broken_wave\n")
    (tmp_path / "broken_wave.py").write_text("import one_that_is_missing")
    done = python("-m", "twin_bench", "-vv", "wave", path=[tmp_path])
    assert done.returncode == 2
    assert "broken_wave.py" in done.stderr
    assert "wave: the command can't be loaded from broken_wave (No module named 'one_that_is_missing')" in done.stderr
    assert "Traceback" not in python("-m", "twin_bench", "wave", path=[tmp_path]).stderr


@pytest.mark.parametrize(
    ("kind", "required"),
    [
        ("recipe", {"base_model", "experts"}),
        ("merge", {"base_model", "experts", "merge"}),
        ("suite", {"name", "base_model", "experts"}),
    ],
)
def test_a_schema_names_the_keys_of_a_file(kind: str, required: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", kind]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["required"]) == required
    assert schema["additionalProperties"] is False
    if kind == "suite":
        for file in (ROOT / "leaderboards").glob("*.yaml"):
            assert yaml.safe_load(file.read_text()).keys() <= schema["properties"].keys()


def test_a_schema_of_another_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "receipt"]) == 2
    assert "invalid choice: 'receipt'" in capsys.readouterr().err
