"""Merge methods of other packages: found by their entry points, and left out with a word where they are broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.interpreter import python

GOOD = """
from twin_bench.merging import TaskVectors, merge_method

@merge_method(title="Half", paper="", track="data-free")
def half(vectors: TaskVectors, *, scaling: float = 0.5):
    \"\"\"theta_0 + scaling * sum_t tau_t.\"\"\"
    return vectors.merged(lambda name, base, taus: base + scaling * taus.sum(dim=0))
"""
PLUGINS = {
    "good": {
        "good_plugin/__init__.py": "",
        "good_plugin/half.py": GOOD,
        "good_plugin/__main__.py": "raise SystemExit(3)",
    },
    "broken": {"broken_plugin.py": "def f(:"},
    "track": {"track_plugin.py": GOOD.replace("data-free", "routed").replace("def half", "def third")},
    "double": {"double_plugin.py": GOOD.replace("def half", "def ties")},
}
ASK = """
import torch, twin_bench
base, expert = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
methods = twin_bench.methods()
from twin_bench.merging.registry import find_method
print(twin_bench.merge("half", base, {"a": expert})["w"].item(), "third" in methods, methods["ties"].origin, len(methods))
print(find_method("half").identity != ["half"], find_method("ties").identity == ["ties"])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of installed packages: one good plugin, and three that are broken in their own ways."""
    folder = tmp_path_factory.mktemp("site")
    for name, files in PLUGINS.items():
        for file, text in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(text)
        information = folder / f"{name}_plugin-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[twin_bench.methods]\n{name} = {name}_plugin\n")
    return folder


def test_plugins_add_methods_and_broken_ones_are_left_out(site: Path) -> None:
    done = python("-c", ASK, path=[site])
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    value, third, origin, count = first.split()
    assert (value, third, origin) == ("2.0", "False", "twin_bench.merging.methods.ties.ties")
    own = len(python("-c", "import twin_bench; print(*twin_bench.methods())").stdout.split())
    assert int(count) == own + 1
    assert second == "True True"
    for name, reason in (
        ("broken", "syntax"),
        ("track", "unknown track 'routed'"),
        ("double", "two methods are named"),
    ):
        (line,) = (line for line in done.stderr.splitlines() if f"(entry point {name})" in line)
        assert reason in line
        assert "left out" in line
