"""The twin-bench command: it finds the command that is asked for, and runs it.

A command is a module with three names: `SUMMARY`, one line for --help; `add_arguments(parser)`; and `run(options)`.
Such a module imports torch, transformers and the like inside `run` only, so that --help does not wait for them.
`COMMANDS` lists the library's own. An adapter adds its commands through the entry-point group `twin_bench.commands`,
from a command's name to its module. They are looked up only where a command is not in `COMMANDS`, and for --help.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol, cast

from twin_bench.console import reporting_errors
from twin_bench.errors import InputError, first_line, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

COMMANDS: Mapping[str, str] = {
    "init": "twin_bench.commands.init",
    "build": "twin_bench.commands.build",
    "merge": "twin_bench.commands.merge",
    "leaderboard": "twin_bench.commands.leaderboard",
    "report": "twin_bench.commands.report",
    "compare": "twin_bench.commands.compare",
    "bench": "twin_bench.commands.bench",
    "methods": "twin_bench.commands.methods",
    "tasks": "twin_bench.commands.tasks",
    "convert": "twin_bench.commands.convert",
    "export": "twin_bench.commands.export",
    "serve": "twin_bench.commands.serve",
    "schema": "twin_bench.commands.schema",
    "doctor": "twin_bench.doctor",
}
"""The library's own commands, by name: the module of each."""

GROUP = "twin_bench.commands"
"""The entry-point group of the commands that adapters add."""


class Command(Protocol):
    """What a command's module holds."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments to its parser."""

    def run(self, options: argparse.Namespace) -> None:
        """Do what is asked; InputError for a user's mistake.

        `options.quiet`, `options.verbose` and `options.command_line` are always set.
        """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run twin-bench.

    Args:
        arguments: the command line without the program's name; by default this process' own.

    Returns:
        The exit status: 0 done, 2 a usage or input error, 130 interrupted, 143 ended by SIGTERM.

    Raises:
        SystemExit: with status 0, once a command's --help is printed.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    return reporting_errors(lambda: _dispatch(given))


class _Parser(argparse.ArgumentParser):
    """A parser that takes no shortened options, and whose errors are InputErrors: one line each."""

    def __init__(self, prog: str, description: str, usage: str | None = None) -> None:
        super().__init__(prog, usage, description, allow_abbrev=False)
        self.add_argument(
            "-v",
            "--verbose",
            action="count",
            default=0,
            help="say what is done; -vv also says why, and shows where an error was raised",
        )
        self.add_argument("-q", "--quiet", action="store_true", help="show no progress bars, and of messages warnings")

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Raise an InputError that names the nearest option, for the first long option that there is not.

        argparse would report a missing argument first, although it is missing because its name is misspelt.
        """
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        for argument in arguments:
            option = argument.partition("=")[0]
            if option == "--":
                return
            if option.startswith("--") and option not in known:
                self.error(f"unknown option {option!r}{nearest(option, known)}")

    def error(self, message: str) -> NoReturn:
        """Raise an InputError."""
        raise InputError(f"{self.prog}: {message} (more: {self.prog} --help)")


def _dispatch(given: Sequence[str]) -> None:
    """Split the command line at the command's name, read both sides and run the command."""
    place = next((place for place, argument in enumerate(given) if not argument.startswith("-")), len(given))
    top = _Parser(
        "twin-bench",
        "Merge models, build twins, and compare merge methods on a leaderboard.",
        "twin-bench [-h] [--version] [-v | -q] COMMAND ...",
    )
    top.add_argument("--version", action="store_true", help="print twin-bench's version")
    top.refuse_unknown(given[:place])
    if any(option in ("-h", "--help") for option in given[:place]):
        print(f"{top.format_help()}\n{_listing()}")
        return
    options = top.parse_args(given[:place])
    if options.version:
        print(f"twin-bench {_version()}")
        return
    if place == len(given):
        top.error("no command is named")
    if options.verbose:
        _show_messages(options.verbose)  # already of what is wrong with a command that can't be loaded
    name = given[place]
    command = _load(name)
    parser = _Parser(f"twin-bench {name}", command.SUMMARY)
    command.add_arguments(parser)
    parser.refuse_unknown(given[place + 1 :])
    parser.parse_args(given[place + 1 :], namespace=options)
    if options.verbose and options.quiet:
        parser.error("give -v or -q, not both")
    options.command_line = shlex.join(["twin-bench", *given])
    _run(name, command, options)


def _run(name: str, command: Command, options: argparse.Namespace) -> None:
    """Run a command with its messages and bars as -v and -q ask for them."""
    import logging
    import time

    _show_messages(options.verbose)
    if options.quiet:  # tqdm and huggingface_hub read these when they are imported
        os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    started = time.perf_counter()
    command.run(options)
    logging.getLogger(__name__).info("%s took %.1f s", name, time.perf_counter() - started)


def _show_messages(verbose: int) -> None:
    """Show log messages on stderr: everyone's warnings, and with -v and -vv what this project's packages say besides.

    Nothing is changed where messages are shown already.
    """
    import logging

    messages = logging.StreamHandler()
    messages.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("twin_bench"))
    messages.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, handlers=[messages])


def _load(name: str) -> Command:
    """Return a command's module; InputError for a name that nobody has, or an adapter's that can't be imported."""
    if name in COMMANDS:
        return cast(Command, importlib.import_module(COMMANDS[name]))
    added = _added()
    if name not in added:
        raise InputError(f"unknown command {name!r}{nearest(name, [*COMMANDS, *added])}")
    try:
        return _checked(added[name])
    except Exception as error:
        _debug_traceback(name)
        raise InputError(
            f"{name}: the command can't be loaded from {added[name].value} ({first_line(error)}); "
            "reinstall what brings it, or run twin-bench doctor"
        ) from None


def _checked(point: EntryPoint) -> Command:
    """Import an adapter's command; whatever its import raises, AttributeError where it is no command."""
    command = point.load()
    for name in ("SUMMARY", "add_arguments", "run"):
        if not hasattr(command, name):
            raise AttributeError(f"it has no {name}")
    return cast(Command, command)


def _added() -> dict[str, EntryPoint]:
    """Return the commands that adapters add, by name. One that is named like the library's own is left out."""
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=GROUP) if point.name not in COMMANDS}


def _listing() -> str:
    """Return --help's list of commands: a line each, also for one that can't be loaded."""
    summaries = {name: _load(name).SUMMARY for name in COMMANDS}
    for name, point in _added().items():
        try:
            summaries[name] = _checked(point).SUMMARY
        except Exception as error:
            _debug_traceback(name)
            summaries[name] = f"(can't be loaded from {point.value}: {first_line(error)})"
    width = max(map(len, summaries))
    lines = "\n".join(f"  {name:{width}}  {summary}" for name, summary in summaries.items())
    return f"commands:\n{lines}\n\ntwin-bench COMMAND --help tells a command's arguments."


def _debug_traceback(name: str) -> None:
    import logging

    logging.getLogger(__name__).debug("%s can't be loaded:", name, exc_info=True)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("twin-bench")
    except PackageNotFoundError:
        return "of a source tree that is not installed"


if __name__ == "__main__":
    sys.exit(main())
