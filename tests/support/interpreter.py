"""An interpreter of its own, with the plugin as an installed package has it."""

import os
import subprocess
import sys
from pathlib import Path

import twin_bench_lm_eval

ADAPTERS = Path(twin_bench_lm_eval.__file__).resolve().parents[1]
ROOT = ADAPTERS.parent
PTH = ADAPTERS / "twin_bench_lm_eval.pth"

# What site.py does with the .pth, in an interpreter where no installed copy of it has been at work.
START = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != '_AfterModels']
exec(open({str(PTH)!r}).read())
"""
NAMES = """
from lm_eval.api.registry import model_registry
import lm_eval.models
print('hf' in model_registry, 'twin_merged' in model_registry)
"""


def python(*arguments, path=(), **environment):
    """Run Python on the checkout, with no rows and the hub out of reach."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("TWIN_BENCH")}
    paths = os.pathsep.join(map(str, [*path, ROOT, ADAPTERS]))
    return subprocess.run(
        [sys.executable, *arguments],
        env=keep | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


HEAVY = frozenset(
    [
        "torch",
        "transformers",
        "peft",
        "pandas",
        "numpy",
        "rich",
        "pydantic",
        "yaml",
        "safetensors",
        "lm_eval",
        "helm",
        "datasets",
    ]
)
"""Packages that take long to import; all that torch and transformers bring is among what they take."""


def loaded_by(code):
    """Return which of HEAVY, and which of this project's modules, an interpreter of its own has after `code`."""
    done = python("-c", f"import sys\n{code}\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    modules = done.stdout.splitlines()[-1].split()
    return {name for name in modules if name in HEAVY or name.startswith("twin_bench")}
