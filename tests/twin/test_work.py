"""A build that is killed goes on from its tensors, and several processes compute what one does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from twin_bench import InputError
from twin_bench.checkpoints.sources import open_sources
from twin_bench.cli import main
from twin_bench.files import StoredTensors, digest_file
from twin_bench.locks import written_by_one
from twin_bench.merging.linear_algebra import truncated_svd
from twin_bench.merging.registry import MergeMethod
from twin_bench.twin import workers
from twin_bench.twin.builder import build_twin
from twin_bench.twin.exclusive.vector import exact_difference
from twin_bench.twin.recipe import Recipe
from twin_bench.twin.work import work_on
from twin_bench.twin.workers import Job, Worker

MATRICES = 14
"""How many matrices each expert of the family changes: seven in each of two blocks."""


def recipe_of(family: Any, **changes: Any) -> Recipe:
    return Recipe.model_validate({**family.recipe, "router": None, **changes})


def work_of(recipe: Recipe, directory: Path, *, threads: int | None = None) -> Any:
    """Return the work of a build with one process, or with workers of so many threads each."""
    return work_on(directory, recipe, torch.device("cpu"), threads or torch.get_num_threads())


def digests(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): digest_file(path) for path in directory.rglob("*") if path.is_file()}


def hidden(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*"))


@pytest.fixture(autouse=True)
def all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tensors of small parameters too, without waiting for the disk."""
    monkeypatch.setattr("twin_bench.twin.work.SMALLEST", 0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Return a function that counts the SVDs from now on, and interrupts the build at the last one that is allowed."""

    def count(allowed: int = 10**6, error: type[BaseException] = KeyboardInterrupt) -> list[int]:
        done = [0]

        def decompose(*arguments: Any, **options: Any) -> Any:
            if done[0] == allowed:
                raise error("here")
            done[0] += 1
            return truncated_svd(*arguments, **options)

        for module in ("exclusive.vector", "kept_svd"):
            monkeypatch.setattr(f"twin_bench.twin.{module}.truncated_svd", decompose)
        return done

    return count


@pytest.mark.parametrize("exclusive", [{"density": 0.5}, {"budget": 0.3, "bits": 8}])
def test_a_build_that_is_interrupted_goes_on(
    matrix_family: Any, tmp_path: Path, counted: Callable[..., list[int]], exclusive: dict[str, Any]
) -> None:
    recipe = recipe_of(matrix_family, exclusive=exclusive)
    build_twin(recipe, tmp_path / "whole")
    counted(MATRICES + 3)
    with pytest.raises(KeyboardInterrupt):
        build_twin(recipe, tmp_path / "twin", resumable=True)
    assert not (tmp_path / "twin").exists()
    assert len(hidden(tmp_path)) == 1
    done = counted()
    build_twin(recipe, tmp_path / "twin", resumable=True)
    assert done == [3 * MATRICES - (MATRICES + 3)]
    assert digests(tmp_path / "twin") == digests(tmp_path / "whole")
    assert not hidden(tmp_path)


def test_a_damaged_tensor_is_computed_again(
    matrix_family: Any, tmp_path: Path, counted: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(matrix_family)
    build_twin(recipe, tmp_path / "whole")
    counted(5)
    with pytest.raises(KeyboardInterrupt):
        build_twin(recipe, tmp_path / "twin", resumable=True)
    for file in hidden(tmp_path)[0].glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
    counted()
    build_twin(recipe, tmp_path / "twin", resumable=True)
    assert digests(tmp_path / "twin") == digests(tmp_path / "whole")
    assert "its checksum does not match its content" in caplog.text


def test_other_inputs_begin_anew_and_wrong_ones_leave_nothing(
    matrix_family: Any, tmp_path: Path, counted: Callable[..., list[int]]
) -> None:
    counted(5)
    with pytest.raises(KeyboardInterrupt):
        build_twin(recipe_of(matrix_family), tmp_path / "twin", resumable=True)
    (first,) = hidden(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        build_twin(recipe_of(matrix_family, seed=1), tmp_path / "twin", resumable=True)
    (second,) = hidden(tmp_path)
    assert first != second
    file = Path(matrix_family.recipe["experts"]["bbq"]) / "model.safetensors"
    with work_of(recipe_of(matrix_family, seed=1), tmp_path / "twin") as same:
        assert same.folder == second
    times = file.stat()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with work_of(recipe_of(matrix_family, seed=1), tmp_path / "twin") as other:
        assert other.folder not in (first, second)
    counted(5, InputError)
    with pytest.raises(InputError, match="here"):
        build_twin(recipe_of(matrix_family), tmp_path / "twin", resumable=True)
    assert not hidden(tmp_path)


THREE = ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight")
"""Parameters of which three SVDs are made, of three experts: the norm is no matrix, nobody changes the output layer."""


def half_built(recipe: Recipe, directory: Path, names: Iterable[str] = THREE) -> None:
    """Compute parameters as a worker does, and end as an interrupt does."""
    with work_of(recipe, directory) as work:
        worker = Worker(Job(recipe, None, work, "cpu"))
        for name in names:
            worker.compute(name)
        raise KeyboardInterrupt


@pytest.mark.parametrize("cached", [False, True])
def test_a_worker_computes_what_the_build_takes(
    matrix_family: Any, tmp_path: Path, counted: Callable[..., list[int]], cached: bool
) -> None:
    recipe = recipe_of(matrix_family)
    build_twin(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        half_built(recipe, tmp_path / "twin")
    done = counted()
    build_twin(recipe, tmp_path / "twin", resumable=True, feature_cache=tmp_path / "cache" if cached else None)
    assert done == [3 * MATRICES - 3]
    assert digests(tmp_path / "twin") == digests(tmp_path / "whole")


def test_differences_are_made_once(matrix_family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker has kept is taken without its difference, also where an expert does not change a matrix."""
    recipe, made = recipe_of(matrix_family), list[str]()

    def difference(theirs: torch.Tensor, base: torch.Tensor, name: str) -> torch.Tensor:
        if base.ndim == 2:
            made.append(name)
        return exact_difference(theirs, base, name)

    names = open_sources(recipe.base_model, recipe.experts).skeleton.backbone
    with pytest.raises(KeyboardInterrupt):
        half_built(recipe, tmp_path / "twin", names)
    monkeypatch.setattr("twin_bench.twin.exclusive.vector.exact_difference", difference)
    build_twin(recipe, tmp_path / "twin", resumable=True)
    assert not made
    build_twin(recipe, tmp_path / "whole", resumable=True)
    assert len(made) == 3 * sum(len(shape) == 2 for shape in names.values())
    assert digests(tmp_path / "twin") == digests(tmp_path / "whole")


def test_other_threads_begin_anew(matrix_family: Any, tmp_path: Path) -> None:
    """They round differently, and a build that goes on is the same to the last bit."""
    recipe, before, found = recipe_of(matrix_family), torch.get_num_threads(), list[Path]()
    for own, each in ((1, 1), (2, 2), (2, 1), (1, 1)):
        torch.set_num_threads(own)
        try:
            with work_of(recipe, tmp_path / "twin", threads=each) as work:
                found.append(work.folder)
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[3]
    assert len(set(found)) == 3


def test_a_build_that_ends_meanwhile_is_found_before_anything_is_computed(
    matrix_family: Any, tmp_path: Path, counted: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twin_bench.twin.builder.check_limits", lambda *_: (tmp_path / "twin").mkdir())
    done = counted()
    with pytest.raises(InputError, match="twin: exists already"):
        build_twin(recipe_of(matrix_family), tmp_path / "twin", resumable=True)
    assert (done, hidden(tmp_path)) == ([0], [])


def test_a_refused_recipe_leaves_no_folder(matrix_family: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="slerp"):
        build_twin(recipe_of(matrix_family, shared={"method": "slerp"}), tmp_path / "new/er/twin", resumable=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_build_what_one_does(matrix_family: Any, tmp_path: Path) -> None:
    recipe = {key: value for key, value in matrix_family.recipe.items() if key != "router"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    build_twin(Recipe.model_validate(recipe), tmp_path / "whole")
    assert main(["build", str(tmp_path / "recipe.yaml"), str(tmp_path / "twin"), "--workers", "2", "-q"]) == 0
    assert digests(tmp_path / "twin") == digests(tmp_path / "whole")
    assert not hidden(tmp_path)


class LostPool(ThreadPoolExecutor):
    """A pool whose processes are ended from outside."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(1)

    def submit(self, *arguments: Any, **options: Any) -> Any:
        lost: Future[None] = Future()
        lost.set_exception(BrokenProcessPool("ended"))
        return lost


def test_a_worker_that_is_killed_is_told_and_its_work_kept(
    matrix_family: Any, tmp_path: Path, counted: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(matrix_family)
    with pytest.raises(KeyboardInterrupt):
        half_built(recipe, tmp_path / "twin")
    monkeypatch.setattr(workers, "ProcessPoolExecutor", LostPool)
    kept = len(list(hidden(tmp_path)[0].iterdir()))
    with pytest.raises(InputError, match=r"--workers 2: a worker was ended.* if each has as many threads again"):
        build_twin(recipe, tmp_path / "twin", workers=2)
    assert len(list(hidden(tmp_path)[0].iterdir())) == kept


def test_two_builds_into_one_directory_at_once_are_refused(
    matrix_family: Any, tmp_path: Path, counted: Callable[..., list[int]]
) -> None:
    """The second one would remove what the first one has computed, and find the directory there at its own end."""
    counted(5)
    with pytest.raises(KeyboardInterrupt):
        build_twin(recipe_of(matrix_family), tmp_path / "twin", resumable=True)
    (work,) = hidden(tmp_path)
    counted()
    with written_by_one(tmp_path / "twin"):
        for resumable in (True, False):
            with pytest.raises(InputError, match="twin: another process writes it now; wait, or give another name"):
                build_twin(recipe_of(matrix_family, seed=1), tmp_path / "twin", resumable=resumable)
        assert work.exists()
        build_twin(recipe_of(matrix_family, seed=1), tmp_path / "other")
    build_twin(recipe_of(matrix_family), tmp_path / "twin", resumable=True)
    assert not hidden(tmp_path)


def test_svds_are_kept_once(matrix_family: Any, tmp_path: Path, counted: Callable[..., list[int]]) -> None:
    """Where a folder of SVDs is named, a build that goes on takes them from there."""
    recipe, cache = recipe_of(matrix_family), tmp_path / "cache"
    build_twin(recipe, tmp_path / "whole")
    counted(MATRICES + 3)
    with pytest.raises(KeyboardInterrupt):
        build_twin(recipe, tmp_path / "twin", resumable=True, feature_cache=cache)
    assert len(list((cache / "svd").glob("*.safetensors"))) == MATRICES + 3
    (work,) = hidden(tmp_path)
    assert not [file for file in work.glob("*.safetensors") if "B" in StoredTensors(file)]
    done = counted()
    build_twin(recipe, tmp_path / "twin", resumable=True, feature_cache=cache)
    assert done == [3 * MATRICES - (MATRICES + 3)]
    assert digests(tmp_path / "twin") == digests(tmp_path / "whole")


def test_a_method_whose_code_changes_begins_anew(
    causal_families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a plugin that is corrected after a build was killed: what the old code computed is not taken."""
    recipe = Recipe.model_validate(causal_families("llama").recipe)
    folders = set()
    for code in ("before", "after", "before"):
        monkeypatch.setattr(MergeMethod, "identity", property(lambda self, code=code: [self.name, code]))
        with work_of(recipe, tmp_path / "twin") as work:
            folders.add(work.folder)
    assert len(folders) == 2
