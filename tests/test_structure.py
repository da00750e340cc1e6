"""The architecture: packages in layers, no import circle, no harness in the core, nothing too long, tests apart."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    {"errors", "paths", "files", "config", "compat", "console", "protocols", "measured", "processes", "locks"},
    {"data"},
    {"statistics"},
    {"checkpoints"},
    {"merging", "demo"},
    {"twin"},
    {"serving"},
    {"export"},
    {"front"},
    {"contenders"},
    {"adaptive"},
    {"results"},
    {"leaderboard"},
    {"report"},
    {"bench"},
    {"commands", "doctor"},
    {"cli", "__main__", "__init__"},
)
"""From low to high: a package imports from its own layer and lower ones. `__init__` is twin_bench itself."""
HEIGHT = {package: height for height, layer in enumerate(LAYERS) for package in layer}
ADAPTERS = ("twin_bench_lm_eval", "twin_bench_helm", "twin_bench_inspect")
HARNESSES = ("lm_eval", "helm", "inspect_ai")
FUNCTION_LINES, MODULE_LINES = 60, 400
TABLES = {"twin_bench/demo/sentences.py"}
"""Modules that hold data, for which there is no limit."""


def parsed(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file.relative_to(ROOT), ast.parse(file.read_text())


def module_of(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[parts[0] == "adapters" : len(parts) - (parts[-1] == "__init__")])


SOURCES = {module_of(file): tree for file, tree in parsed("twin_bench", "adapters")}


def imported(tree: ast.Module) -> set[str]:
    """Return the full names of all that a module imports, at the top or in a function, as `module.name`.

    A string that is a module's full name counts as well: it is there to be given to importlib.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            found |= {node.value} & SOURCES.keys()
    return found


def modules_imported(tree: ast.Module) -> set[str]:
    """Return which modules of ours a module imports. `from PACKAGE import MODULE` runs the package's own file too."""
    names = imported(tree)
    packages = {name.rpartition(".")[0] for name in names if name not in SOURCES}
    packages |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return (names | packages) & SOURCES.keys()


def package_of(module: str) -> str:
    """Return which package of the core a module is in, or its own name: `python -m` runs a module named __main__."""
    if module.endswith(".__main__"):
        return "__main__"
    return module.split(".")[1] if "." in module else "__init__"


def assert_none(found: Iterable[str]) -> None:
    listed = sorted(found)
    assert not listed, "\n" + "\n".join(listed)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: sorted(modules_imported(tree)) for module, tree in SOURCES.items()}
    circles = []
    while True:
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            circle = error.args[1][::-1]
            circles.append(" imports ".join(circle))
            graph[circle[0]].remove(circle[1])
        else:
            break
    assert_none(circles)


def test_packages_import_from_lower_layers_alone() -> None:
    core = {module: tree for module, tree in SOURCES.items() if module.split(".")[0] == "twin_bench"}
    homeless = [f"twin_bench.{package} is in no layer" for package in {*map(package_of, core)} - HEIGHT.keys()]
    upwards = [
        f"{module} imports {other}"
        for module, tree in core.items()
        for other in modules_imported(tree) & core.keys()
        if HEIGHT.get(package_of(other), 0) > HEIGHT.get(package_of(module), len(LAYERS))
    ]
    assert_none(homeless + upwards)


def test_the_core_knows_no_harness() -> None:
    assert_none(
        f"{module} imports {name}"
        for module, tree in SOURCES.items()
        for name in imported(tree)
        if module.split(".")[0] == "twin_bench" and name.split(".")[0] in ADAPTERS + HARNESSES
    )


def test_nothing_is_too_long() -> None:
    long = []
    for file, tree in parsed("twin_bench", "adapters", "tasks", "tests"):
        lines = len((ROOT / file).read_text().splitlines())
        if str(file) in TABLES:
            continue
        if lines > MODULE_LINES:
            long.append(f"{file}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{file}: {node.name} has {lines} lines")
    assert_none(long)


def test_tests_import_neither_tests_nor_private_names() -> None:
    def apart(part: str, package: str) -> bool:
        private = part.startswith("_") and not part.startswith("__")
        return private or (package == "tests" and (part.startswith("test_") or part == "conftest"))

    assert_none(
        f"{file} imports {name}"
        for file, tree in parsed("tests")
        for name in imported(tree)
        for package, *parts in [name.split(".")]
        if package in ("tests", "twin_bench", *ADAPTERS) and any(apart(part, package) for part in parts)
    )
