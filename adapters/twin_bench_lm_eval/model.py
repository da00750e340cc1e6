"""The model that `lm_eval --model twin_merged` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM

from twin_bench.errors import InputError
from twin_bench.twin.directory import read_manifest
from twin_bench.twin.model import TwinModel
from twin_bench_lm_eval.errors import one_line_errors

one_line_errors()


class TwinMerged(LM):  # type: ignore[misc]
    """A twin directory; making one makes an instance of the subclass that serves its task type."""

    def __new__(cls, pretrained: str | Path | None = None, **arguments: Any) -> TwinMerged:
        """Choose the subclass by `task_type` in `pretrained`/twin.json; a subclass makes itself."""
        served_by = _serving_class(pretrained) if cls is TwinMerged else cls
        instance: TwinMerged = super().__new__(served_by)
        return instance

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse --use_cache.

        lm-eval keys its cache on the request's method and text alone: not on the model, so another twin's
        answers (or this one's, before its router was changed) would be served, and not on the task, so
        two tasks that ask about the same text would share one answer. Refusing is all that a model can do:
        the cache is looked up before the model is asked.
        """
        raise InputError(
            "twin_merged: --use_cache serves answers by text alone, also another twin's and another task's; "
            "leave it out"
        )


def _serving_class(pretrained: str | Path | None) -> type[TwinMerged]:
    if pretrained is None:
        raise InputError("twin_merged: name a twin directory: --model_args pretrained=MY_TWIN")
    task_type = read_manifest(Path(str(pretrained)))["task_type"]
    if task_type == "sequence_classification":
        from twin_bench_lm_eval.classifier import ClassifierTwin

        return ClassifierTwin
    from twin_bench_lm_eval.causal import CausalTwin

    return CausalTwin


def serving(twin: TwinModel, *, task: str, batch_size: int, max_length: int | None) -> TwinMerged:
    """Return the lm-eval model of a twin that is loaded already, for the requests of one task."""
    from twin_bench.twin.causal import TwinCausalLM
    from twin_bench.twin.classifier import TwinClassifier
    from twin_bench_lm_eval.causal import CausalTwin
    from twin_bench_lm_eval.classifier import ClassifierTwin

    if isinstance(twin, TwinClassifier):
        return ClassifierTwin(twin=twin, batch_size=batch_size, max_length=max_length)
    assert isinstance(twin, TwinCausalLM)
    return CausalTwin(twin=twin, task=task, batch_size=batch_size, max_length=max_length)


def usable(device: str | None) -> str | None:
    """Return the device to use: the CPU for a CUDA device that is not there, which lm-eval asks for unasked."""
    return "cpu" if str(device).startswith("cuda") and not torch.cuda.is_available() else device


def positive(name: str, value: Any) -> int:
    """Return a positive whole number given as an argument; InputError that names it for anything else."""
    if not str(value).isdecimal() or int(value) == 0:
        raise InputError(f"twin_merged: {name}={value}; expected a positive whole number")
    return int(value)
