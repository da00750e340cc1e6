"""What `import twin_bench` gives, and that it waits for nothing."""

from __future__ import annotations

import pytest

import twin_bench
from tests.support.interpreter import HEAVY, loaded_by

AUTOLOAD = "_autoload"  # what the .pth of an installed plugin imports at every start


def test_importing_it_imports_nothing() -> None:
    assert loaded_by("import twin_bench") - {"twin_bench_lm_eval", f"twin_bench_lm_eval.{AUTOLOAD}"} == {"twin_bench"}


def test_a_users_error_is_there_without_torch() -> None:
    assert not loaded_by("from twin_bench import InputError; InputError('x')") & HEAVY


@pytest.mark.parametrize("module", ["paths", "errors", "files", "cli", "doctor", "bench", "bench.__main__"])
def test_modules_on_the_way_to_a_command_wait_for_nothing(module: str) -> None:
    assert not loaded_by(f"import twin_bench.{module}") & HEAVY


def test_the_names_are_their_homes_own() -> None:
    from twin_bench.data import metrics
    from twin_bench.errors import InputError
    from twin_bench.merging import by_name, registry, task_vectors
    from twin_bench.twin.model import TwinModel

    assert twin_bench.InputError is InputError
    assert twin_bench.TwinModel is TwinModel
    assert twin_bench.merge is by_name.merge
    assert twin_bench.methods is registry.methods
    assert twin_bench.merge_method is registry.merge_method
    assert twin_bench.metric is metrics.metric
    assert twin_bench.TaskVectors is task_vectors.TaskVectors


def test_every_exported_name_is_listed_and_found() -> None:
    assert set(twin_bench.__all__) <= set(dir(twin_bench))
    assert all(getattr(twin_bench, name) is not None for name in twin_bench.__all__)
    names: dict[str, object] = {}
    exec("from twin_bench import *", names)
    assert set(twin_bench.__all__) <= names.keys()


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'twin_bench' has no attribute 'mrge'"):
        twin_bench.mrge  # noqa: B018
    with pytest.raises(ImportError, match="mrge"):
        exec("from twin_bench import mrge")
