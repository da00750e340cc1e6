"""The wheel, in an environment of its own that sees this one's packages but runs none of its .pth files."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from functools import partial
from pathlib import Path

import pytest

from tests.support.interpreter import side_by_side

ROOT = Path(__file__).resolve().parents[3]
TASKS = {
    "generative": ["bbq", "cnn_dailymail", "mmlu", "truthfulqa"],
    "glue": ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"],
}
pytestmark = pytest.mark.slow


def run(*arguments, directory, **environment):
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TWIN_BENCH"))}
    done = subprocess.run(arguments, env=keep | environment, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(directory)!r}))"
    return directory / run(sys.executable, "-c", build, directory=ROOT).split()[-1]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=False, symlinks=True)
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(directory)}))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    run(*pip, str(site_packages), str(wheel), directory=directory)
    # A directory that a .pth names is searched for packages; the .pth files in it are not run.
    (site_packages / "z_this_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory


@pytest.fixture(scope="module")
def python(installed):
    def run_code(*lines, **environment):
        interpreter = installed / "bin" / "python"
        return run(str(interpreter), "-c", "\n".join(lines), directory=installed, **environment)

    return run_code


def test_what_the_wheel_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"twin_bench/tasks/glue/twin_glue.py", "twin_bench/tasks/glue/_twin_glue.yaml"} <= set(names)
    shipped = {f"twin_bench/tasks/{folder}/twin_{task}.yaml" for folder, tasks in TASKS.items() for task in tasks}
    assert shipped <= set(names)
    assert {"twin_bench/leaderboards/glue-roberta.yaml", "twin_bench/leaderboards/published/glue-roberta.yaml"} <= set(
        names
    )
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {
        "twin_bench",
        "twin_bench_helm",
        "twin_bench_inspect",
        "twin_bench_lm_eval",
        "twin_bench_lm_eval.pth",
    }
    assert {f"twin_bench/tasks/helm/{file}" for file in ("paper.conf", "small.conf", "schema_twin.yaml")} <= set(names)
    assert {f"{package}/py.typed" for package in tops - {"twin_bench_lm_eval.pth"}} <= set(names)
    assert not [name for name in names if name.endswith(".pyc")]


def test_an_installed_wheel_gives_lm_eval_its_model(python, installed):
    shown = python(
        "from lm_eval.api.registry import get_model",
        "import twin_bench",
        "print(get_model('twin_merged').__name__, get_model('hf').__name__, twin_bench.__file__)",
    )
    *classes, file = shown.split()
    assert classes == ["TwinMerged", "HFLM"]
    assert Path(file).is_relative_to(installed)


def test_the_switch_turns_it_off(python):
    names = [
        "from lm_eval.api.registry import model_registry as models",
        "import lm_eval.models",
        "print('twin_merged' in models, 'hf' in models)",
    ]
    on, off = side_by_side(partial(python, *names), partial(python, *names, TWIN_BENCH_NO_AUTOLOAD="1"))
    assert on == "True True\n"
    assert off == "False True\n"


def test_an_installed_wheel_has_its_tasks_and_its_entry_point(python, installed):
    shown = python(
        "from importlib.metadata import entry_points",
        "from lm_eval.tasks import TaskManager",
        "from twin_bench.paths import tasks_directory",
        "print(tasks_directory())",
        "manager = TaskManager(include_path=str(tasks_directory()), include_defaults=False)",
        "print(*manager.all_subtasks)",
        "print(*{e.load().__name__ for e in entry_points(group='lm_eval.models', name='twin_merged')})",
        "print(*{e.load().cnndm().name for e in entry_points(group='helm', name='twin_bench')})",
    )
    directory, tasks, entry_point, helm_entry = shown.splitlines()
    assert Path(directory).is_relative_to(installed)
    as_text = [f"flan_glue_{task}" for task in TASKS["glue"]]
    assert tasks.split() == sorted([*as_text, *(f"twin_{task}" for group in TASKS.values() for task in group)])
    assert entry_point == "TwinMerged"
    assert helm_entry == "twin_cnndm:temperature=0.3"


def test_an_installed_wheel_has_its_command_and_the_adapters(installed):
    command = str(installed / "bin" / "python")
    assert "helm-config  tell HELM of a twin" in run(command, "-m", "twin_bench", "--help", directory=installed)
    shown = run(command, "-m", "twin_bench", "helm-config", "--help", directory=installed)
    assert shown.startswith("usage: twin-bench helm-config")
