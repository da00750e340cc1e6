"""Where the files beside the code are: in a checkout next to the package, in an installed wheel inside it."""

from __future__ import annotations

from pathlib import Path


def tasks_directory() -> Path:
    """Return the directory of the harness tasks, for `lm_eval --include_path`."""
    return _directory("tasks")


def leaderboards_directory() -> Path:
    """Return the directory of suite files, published figures and results."""
    return _directory("leaderboards")


def shipped_suites() -> dict[str, Path]:
    """Return the file of each suite that comes with the package, by its name."""
    return {file.stem: file for file in sorted(leaderboards_directory().glob("*.yaml"))}


def _directory(name: str) -> Path:
    package = Path(__file__).resolve().parent
    # pyproject.toml tells a checkout from site-packages, where a directory `tasks` would be someone else's.
    in_checkout = (package.parent / "pyproject.toml").is_file()
    return (package.parent if in_checkout else package) / name
