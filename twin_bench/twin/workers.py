"""The tensors of a build, computed by several processes. Each keeps them in the build's `Work`, tensor by tensor."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress

from twin_bench.checkpoints.sources import Labels, Sources, open_sources
from twin_bench.merging.device import exact_device
from twin_bench.merging.plugins import load_plugins
from twin_bench.processes import deaf_to_interrupts, end_with_the_command
from twin_bench.twin.exclusive import exclusive_vector
from twin_bench.twin.recipe import Recipe
from twin_bench.twin.shared import merged_parameters
from twin_bench.twin.work import Work, WorkerLostError


@dataclass(frozen=True)
class Job:
    """What each worker computes from: the recipe, the labels of the experts' tasks, the work, the device.

    `plugins` are the files that a command imports besides those of the recipe. `threads` is how many each worker has.
    """

    recipe: Recipe
    labels: Labels | None
    work: Work
    device: str
    plugins: tuple[str, ...] = ()
    threads: int = 1


class Worker:
    """Computes the tensors of single parameters: the shared expert's, and the factors of every expert."""

    def __init__(self, job: Job, number: int = 0) -> None:
        """Open the inputs. Of several GPUs, the worker takes that of its number, in a circle."""
        load_plugins([*job.recipe.plugins, *job.plugins])
        torch.set_num_threads(job.threads)
        device = torch.device(job.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", number % torch.cuda.device_count())
        recipe = job.recipe
        trust: Any = {"allow_pickle": recipe.allow_pickle, "trust_remote_code": recipe.trust_remote_code}
        self._sources: Sources = open_sources(recipe.base_model, recipe.experts, labels=job.labels, **trust)
        self._merged = merged_parameters(recipe, self._sources, device)
        self._recipe, self._device, self._work = recipe, device, job.work

    def compute(self, name: str) -> None:
        """Compute and keep a parameter's tensors. InputError for what is wrong with one of the inputs.

        Exclusive vectors are left to the build itself where a parameter's depend on the others, as in a budget.
        """
        shared = {name: self._work.parameter(name, self._sources.skeleton.backbone[name], lambda: self._merged[name])}
        settings = self._recipe.exclusive
        if settings.truncation == (None, None) or settings.from_layer is not None:
            return
        for task, expert in self._sources.experts.items():
            exclusive_vector(
                expert,
                shared,
                kind=settings.kind,
                name=task,
                seed=self._recipe.seed,
                device=exact_device(self._device),
                keep=self._work.tensors,
                **settings.options(),
            )


def compute_tensors(job: Job, names: Sequence[str], workers: int, progress: Progress) -> None:
    """Compute the tensors of parameters in `workers` processes. Largest first is the best order of `names`.

    Raises:
        InputError: what is wrong with the recipe's inputs.
        WorkerLostError: a process was ended from outside, most often because memory ran out.
    """
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(job, context.Value("i", 0)))
    try:
        with deaf_to_interrupts():
            waiting = [pool.submit(_compute, name) for name in names]
        for done in progress.track(as_completed(waiting), len(names), description=f"tensors in {workers} processes"):
            done.result()
    except BrokenProcessPool:
        raise WorkerLostError(
            f"--workers {workers}: a worker was ended, most often because memory ran out; run the command again with "
            f"fewer workers; what was computed is kept, and is taken if each has as many threads again ({job.threads})"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
            child.join()


def threads_each(workers: int) -> int:
    """Return how many threads each of several workers has, so that together they have as many as this process."""
    return max(1, torch.get_num_threads() // workers)


_worker: Worker | None = None
"""This process' own worker, if it was started as one."""


def _begin(job: Job, started: Any) -> None:
    global _worker
    end_with_the_command()
    with started.get_lock():
        number = started.value
        started.value += 1
    _worker = Worker(job, number)


def _compute(name: str) -> None:
    assert _worker is not None
    _worker.compute(name)
