"""Makes `twin_merged` a model name of lm-eval 0.4.13, which has no plugin mechanism.

twin_bench_lm_eval.pth calls `install` at every start of an interpreter, so that a pip install alone is
enough for `lm_eval --model twin_merged`. TWIN_BENCH_NO_AUTOLOAD=1 turns it off. A later lm-eval finds the
model through its entry-point group, and `register` then leaves it alone.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # an import of typing, or of __future__, would take longer than all else here
    from typing import Any

NAME = "twin_merged"
TARGET = "twin_bench_lm_eval.model:TwinMerged"


def install() -> None:
    """Have `register` run as soon as lm_eval.models has been imported; imports nothing itself."""
    sys.meta_path.insert(0, _AfterModels())  # type: ignore[arg-type]


def register() -> None:
    """Register the model by name, its class not yet imported.

    Only after lm_eval.models: lm-eval loads its own models while the registry is empty, and not otherwise.
    """
    from lm_eval.api import registry

    if not hasattr(registry, "load_plugins") and NAME not in registry.model_registry:
        registry.model_registry.register(NAME, target=TARGET)


class _AfterModels:
    """A finder that finds nothing of its own: it adds a step to the import of lm_eval.models."""

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if name != "lm_eval.models":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: "Any") -> None:
            execute(module)
            try:
                register()
            except Exception as error:  # whatever a changed lm-eval raises, its own models must keep working
                print(f"twin-bench: cannot register {NAME} with this lm-eval ({error})", file=sys.stderr)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
