"""What the .pth file does at an interpreter's start."""

from functools import partial

import pytest

from tests.support.interpreter import NAMES, START, python, side_by_side


def test_the_name_is_there_and_lm_evals_own_are_too():
    show = "print(*(get_model(name).__name__ for name in ('twin_merged', 'hf', 'dummy')))"
    done = python("-c", f"{START}\nfrom lm_eval.api.registry import get_model\n{show}")
    assert (done.stdout, done.returncode) == ("TwinMerged HFLM DummyLM\n", 0), done.stderr


FIRST = (
    "import lm_eval",
    "import lm_eval.models.dummy",
    "import importlib.util as u; u.find_spec('lm_eval.models')",
)


@pytest.fixture(scope="module")
def started():
    """Return what an interpreter that imports each of FIRST says."""
    return dict(
        zip(FIRST, side_by_side(*(partial(python, "-c", START + first + NAMES) for first in FIRST)), strict=True)
    )


@pytest.mark.parametrize("first", FIRST)
def test_it_does_not_matter_what_is_imported_first(first, started):
    assert started[first].stdout == "True True\n", started[first].stderr


def test_the_switch_turns_it_off():
    done = python("-c", START + NAMES, TWIN_BENCH_NO_AUTOLOAD="1")
    assert done.stdout == "True False\n", done.stderr


def test_a_later_lm_eval_with_plugins_is_left_alone():
    later = "import lm_eval.api.registry as r; r.load_plugins = print"
    done = python("-c", START + later + NAMES)
    assert done.stdout == "True False\n", done.stderr


def test_an_lm_eval_that_refuses_keeps_its_own_models():
    refusing = """
import lm_eval.api.registry as r
register = r.Registry.register
def refuse(self, name, target):
    return 1 / 0 if name == 'twin_merged' else register(self, name, target=target)
r.Registry.register = refuse
"""
    done = python("-c", START + refusing + NAMES)
    assert done.stdout == "True False\n", done.stderr
    assert "cannot register twin_merged with this lm-eval (division by zero)" in done.stderr


def test_a_missing_package_does_not_disturb_an_interpreters_start():
    hide = "import sys; sys.modules['twin_bench_lm_eval'] = None"
    done = python("-c", f"{hide}\n{START}\nprint('up')")
    assert (done.stdout, done.stderr) == ("up\n", "")


def test_the_start_imports_nothing_but_the_hook_and_costs_under_a_millisecond():
    measure = "import os, sys, time; before = set(sys.modules); start = time.process_time()"
    show = "print(time.process_time() - start); print(*sorted(set(sys.modules) - before))"
    seconds, modules = [], ""
    for _ in range(5):
        # -S: no .pth has imported anything yet; and compiled once, as in an installed package
        done = python("-S", "-c", f"{measure}\n{START}\n{show}", PYTHONDONTWRITEBYTECODE="")
        took, modules = done.stdout.splitlines()
        seconds.append(float(took))
    assert modules == "twin_bench_lm_eval twin_bench_lm_eval._autoload"
    assert min(seconds) < 0.001
