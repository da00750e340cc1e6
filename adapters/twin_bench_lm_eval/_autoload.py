"""Makes `twin_merged` a model name of lm-eval 0.4.13, which has no plugin mechanism.

twin_bench_lm_eval.pth calls `install` at every start of an interpreter, so that `lm_eval --model twin_merged` works
after a pip install alone. TWIN_BENCH_NO_AUTOLOAD=1 turns this off. It is a bridge to the next release of lm-eval, which
finds models by entry points (its pull requests 4013 and 4014). `register` does nothing there.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing or __future__ would take longer than everything else here
    from typing import Any

NAME = "twin_merged"
TARGET = "twin_bench_lm_eval.model:TwinMerged"


def install() -> None:
    """Arrange that `register` runs as soon as lm_eval.models has been imported. This function imports nothing."""
    sys.meta_path.insert(0, _AfterModels())  # type: ignore[arg-type]


def register() -> None:
    """Register the model by name, without importing its class.

    This must happen after the import of lm_eval.models, because lm-eval loads its own models only while the registry is
    empty.
    """
    from lm_eval.api import registry

    if not hasattr(registry, "load_plugins") and NAME not in registry.model_registry:
        registry.model_registry.register(NAME, target=TARGET)


class _AfterModels:
    """An import finder that adds a step to the import of lm_eval.models, and finds nothing else."""

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
            except Exception as error:  # lm-eval's own models must work, whatever a changed lm-eval raises here
                print(f"twin-bench: cannot register {NAME} with this lm-eval ({error})", file=sys.stderr)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
