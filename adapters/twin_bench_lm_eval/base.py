"""The base class of the models that lm-eval is given, and checks of their arguments."""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from lm_eval.api.model import LM

from twin_bench.errors import InputError, nearest
from twin_bench.files import digest
from twin_bench.twin.device import AUTO, fastest_device
from twin_bench.twin.memory import memory_limit
from twin_bench.twin.model import TwinModel


class Request(Protocol):
    """The attributes of an lm-eval Instance that are used here."""

    args: tuple[Any, ...]
    doc: dict[str, Any]
    task_name: str | None
    doc_id: int | None


Document = tuple[str | None, int | None]
"""The name of an lm-eval task, and the number of one of its documents."""


class ServedTwin(LM):  # type: ignore[misc]
    """A twin as an lm-eval model: a `ClassifierTwin`, a `CausalTwin` or a `Seq2SeqTwin`.

    It keeps what lm-eval's results do not have. `fusion_weights` are those of each document's first request, one for
    each expert. `model_seconds` is the time that the twin has taken: to route, to run and, a classifier's, to encode.
    """

    def __init__(self, **options: Any) -> None:
        """Make a model that has answered nothing. The options are those of lm-eval's model."""
        super().__init__(**options)
        self.fusion_weights: dict[Document, tuple[float, ...]] = {}
        self.model_seconds = 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time that passes to `model_seconds`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.model_seconds += time.perf_counter() - begun

    def keep(self, requests: Iterable[Request], weights: Iterable[tuple[float, ...]]) -> None:
        """Keep the fusion weights of requests. Of a document's requests the first ones' are kept."""
        for request, own in zip(requests, weights, strict=True):
            self.fusion_weights.setdefault((request.task_name, request.doc_id), own)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Raise an InputError: a twin can't be used with --use_cache.

        lm-eval's cache key holds only the request's method and text. It does not hold the model, so answers of another
        twin would be served, or answers of this twin from before its router was changed. It does not hold the task
        either, so two tasks that ask about the same text would share one answer. lm-eval reads the cache before it
        asks the model, so the model can only refuse.
        """
        raise InputError(
            "twin_merged: --use_cache serves answers by text alone, also another twin's and another task's; "
            "leave it out"
        )


def provenance(twin: TwinModel) -> dict[str, str]:
    """Return what lm-eval's results say of a twin's origin, under the names that HFLM gives them.

    A twin has no revision of a hub but the one that HFLM names by default. Its `model_sha` is a digest of the shared
    expert, the experts and the router, and empty for a twin that was never stored.
    """
    return {
        "model_revision": "main",
        "model_sha": digest(dict(twin.digests)) if twin.digests else "",
        "twin_bench_version": importlib.metadata.version("twin-bench"),
        "protocol": twin.protocol,
    }


def usable(device: str | None) -> str:
    """Return the device to use: the fastest one for None and `auto`, the CPU for a CUDA device that is not there."""
    if device is None or device == AUTO:
        return fastest_device()
    return "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device


def places(
    device: str | None,
    parallelize: Any = False,
    device_map: Any = None,
    max_memory_per_gpu: int | str | None = None,
    max_cpu_memory: int | str | None = None,
    offload_folder: str | None = None,
) -> dict[str, Any]:
    """Return what arguments of HFLM's say of devices, as `from_pretrained` takes it. A `device_map` names several."""
    memory_settings = {
        "max_memory_per_gpu": max_memory_per_gpu,
        "max_cpu_memory": max_cpu_memory,
        "offload_folder": offload_folder,
    }
    if not parallelize and device_map is None:
        for name, value in memory_settings.items():
            if value is not None:
                raise InputError(f"twin_merged: {name} is for several devices; give parallelize=True with it")
        return {"device": usable(device)}
    memory: dict[int | str, int | str] = {}
    if max_memory_per_gpu is not None:
        memory = dict.fromkeys(range(torch.cuda.device_count()), max_memory_per_gpu)
    if max_cpu_memory is not None:
        memory["cpu"] = max_cpu_memory
    chosen = "auto" if device_map is None else device_map
    return {"device_map": chosen, "max_memory": memory or None, "offload_folder": offload_folder}


def memory(size: Any, *, several: bool) -> int | None:
    """Return the argument `max_memory` in bytes. InputError for no size, and where there are `several` devices."""
    if size is not None and (several or isinstance(size, Mapping)):
        raise InputError(
            f"twin_merged: max_memory={size}: it is one device's memory, such as 40GB; the memory of devices is "
            "max_memory_per_gpu and max_cpu_memory"
        )
    return memory_limit(size)


def positive(name: str, value: Any) -> int:
    """Return an argument's value as a positive whole number. Raise an InputError that names it for anything else."""
    if not str(value).isdecimal() or int(value) == 0:
        raise InputError(f"twin_merged: {name}={value}; expected a positive whole number")
    return int(value)


def require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raise an InputError that names an argument whose value is not a known one."""
    if value not in known:
        raise InputError(f"twin_merged: {name}={value}{nearest(value, known)}")
