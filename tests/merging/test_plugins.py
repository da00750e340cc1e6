"""Methods of other packages, found by their entry points, and the methods and metrics of a user's files."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import twin_bench
from tests.support.interpreter import ROOT, python
from twin_bench.cli import main
from twin_bench.data import metrics
from twin_bench.errors import InputError
from twin_bench.merging.plugins import load_plugins
from twin_bench.merging.registry import REGISTRY, find_method

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
half = twin_bench.merge("half", base, {"a": expert})["w"].item()
print(half, "third" in methods, methods["ties"].origin, len(methods))
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
    own = sum(method.origin.startswith("twin_bench.") for method in twin_bench.methods().values())
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


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The documents' method, as a file outside the checkout. The registry is put back afterwards."""
    monkeypatch.setattr("twin_bench.merging.registry.REGISTRY", dict(twin_bench.methods()))
    text = (ROOT / "docs" / "merging.md").read_text()
    code = text.partition("    # my_method.py\n")[2].partition("\n`--plugin")[0]
    file = tmp_path / "my_method.py"
    file.write_text(textwrap.dedent(code))
    return file


def test_the_documented_method_merges(documented: Path, families: Any, tmp_path: Path) -> None:
    family = families("bert")
    recipe = {key: family.recipe[key] for key in ("base_model", "experts")} | {
        "merge": {"method": "strongest", "scaling": 0.5}
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(tmp_path / "merge.yaml"), str(tmp_path / "out"), "--plugin", str(documented)]) == 0
    base = dict(family.base.bert.named_parameters())
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in base.items():
        taus = [dict(m.bert.named_parameters())[name] - tensor for m in family.experts.values()]
        strongest = max(taus, key=lambda tau: float(tau.norm()))
        torch.testing.assert_close(merged[name], tensor.detach() + 0.5 * strongest.detach())


def test_a_suite_names_its_plugins_and_a_changed_one_is_scored_again(
    documented: Path, families: Any, tmp_path: Path
) -> None:
    family = families("bert")
    recipe = {**family.recipe, "plugins": ["my_method.py"], "shared": {"method": "strongest"}, "router": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["build", str(tmp_path / "recipe.yaml"), str(tmp_path / "twin")]) == 0
    assert json.loads((tmp_path / "twin" / "twin.json").read_text())["shared"]["method"] == "strongest"
    before = find_method("strongest").identity
    documented.write_text(documented.read_text().replace("argmax", "argmin"))
    load_plugins([documented])
    assert find_method("strongest").identity[0] == before[0] == "strongest"
    assert find_method("strongest").identity != before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file or directory; name a Python file"),
        ("def f(:", "can't be imported: SyntaxError"),
        ("1 / 0", "can't be imported: ZeroDivisionError: division by zero"),
        (GOOD.replace("def half", "def ties"), "can't be imported: two methods are named ties"),
        (GOOD.replace("data-free", "routed"), "can't be imported: method half: unknown track 'routed'"),
    ],
)
@pytest.mark.parametrize("named", ["flag", "suite"])
def test_a_plugin_that_fails_is_one_line(
    tmp_path: Path, text: str | None, says: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    if named == "flag":
        assert main(["methods", "--plugin", str(file)]) == 2
    else:
        suite = {"name": "s", "base_model": "b", "experts": "e", "data": "d", "plugins": [str(file)]}
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
        assert main(["leaderboard", "--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert f"plugin {file}: " in line
    assert says in line
    assert not (tmp_path / "out").exists()


def test_a_plugin_that_is_no_python_file(tmp_path: Path) -> None:
    (tmp_path / "method.txt").write_text(GOOD)
    with pytest.raises(InputError, match=r"method\.txt: no Python file; its name must end in \.py"):
        load_plugins([tmp_path / "method.txt"])
    assert "half" not in REGISTRY


@pytest.fixture
def brier(tmp_path: Path) -> Iterator[Path]:
    """The documents' metric, as a file outside the checkout. The registry is put back afterwards."""
    before = dict(metrics.METRICS)
    code = (
        (ROOT / "docs" / "metrics.md").read_text().partition("    # my_metric.py\n")[2].partition("\nThe function")[0]
    )
    file = tmp_path / "my_metric.py"
    file.write_text(textwrap.dedent(code))
    yield file
    metrics.REGISTRY.clear()
    metrics.REGISTRY.update(before)


def test_the_documented_metric_scores_and_a_changed_file_replaces_it(brier: Path) -> None:
    load_plugins([brier])
    found = metrics.find_metric("brier")
    assert (found.answers, found.higher_is_better, found.percent) == ("probabilities", False, False)
    # (0.25^2 + 0.25^2 and 1 + 1) / 2, in its own unit
    rows = [0, 1], [[0.75, 0.25], [1, 0]]
    assert found.score(*rows) == (0.125 + 2) / 2
    assert found.standard_error(*rows) > 0
    brier.write_text(brier.read_text().replace("percent=False", "percent=True"))
    load_plugins([brier])
    changed = metrics.find_metric("brier")
    assert changed.score(*rows) == 100 * found.score(*rows)
    name, digest = changed.identity
    assert (name, len(digest)) == ("brier", 64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("", ""), r"two metrics are named brier: in twin_bench_plugin_my_metric_\w+ and twin_bench_plugin_other_\w+"),
        (("def brier", "def acc"), "two metrics are named acc: in twin_bench.data.metrics and"),
        (("def brier", "def accuracy"), "two metrics are named accuracy: in twin_bench.data.metrics and"),
        (('"probabilities"', '"probability"'), "metric brier: unknown answers 'probability'; did you mean 'prob"),
        (("percent=", "percentage="), "TypeError: metric.. got an unexpected keyword argument 'percentage'"),
    ],
)
def test_a_metric_that_can_not_be_registered(brier: Path, change: tuple[str, str], says: str) -> None:
    load_plugins([brier])
    other = brier.with_name("other.py")
    other.write_text(brier.read_text().replace(*change))
    with pytest.raises(InputError, match=rf"^plugin .*other.py: can't be imported: {says}"):
        load_plugins([other])


def test_a_metric_that_fails_is_one_line(brier: Path) -> None:
    head = "from twin_bench import metric\n\n@metric(labels=2)\n"
    brier.write_text(f"{head}def odds(r, a):\n    return r.sum() / (a == 0).sum() or 1 / 0")
    load_plugins([brier])
    assert metrics.score("odds", [1, 1], [0, 0]) == 100
    with pytest.raises(InputError, match=r"^metric odds can't be computed: ZeroDivisionError: division by zero$"):
        metrics.score("odds", [0, 0], [0, 0])
    with pytest.raises(InputError, match=r"^task mnli: odds is a metric of 2 labels"):
        metrics.find_metric("odds").require(3, "task mnli")
