"""The model that `lm_eval --model twin_merged` names."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from twin_bench.data.task import TaskType
from twin_bench.errors import InputError
from twin_bench.twin.directory import read_manifest
from twin_bench.twin.model import TwinModel
from twin_bench_lm_eval.base import ServedTwin
from twin_bench_lm_eval.errors import one_line_errors

one_line_errors()


class TwinMerged(LM):  # type: ignore[misc]
    """A factory: `TwinMerged(pretrained=MY_TWIN, ...)` returns the model that serves the twin's task type.

    It is a subclass of lm-eval's LM because lm-eval expects a model class and calls its `create_from_arg_string`. It
    has no instances of its own.
    """

    def __new__(cls, pretrained: str | Path | None = None, **arguments: Any) -> ServedTwin:  # type: ignore[misc]
        """Return a ClassifierTwin, CausalTwin or Seq2SeqTwin of `pretrained`. The arguments are that class's."""
        if pretrained is None:
            raise InputError("twin_merged: name a twin directory: --model_args pretrained=MY_TWIN")
        return _class_for(read_manifest(Path(str(pretrained)))["task_type"])(pretrained, **arguments)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> ServedTwin:
        """Return the model of the arguments that lm-eval's command line gives.

        The protocol is added to `arg_dict` where it is not named. lm-eval prints these arguments above its table and
        stores them in the results, and a score is read with its protocol.
        """
        arg_dict.setdefault("protocol", "standard")
        model: ServedTwin = super().create_from_arg_obj(arg_dict, additional_config)
        return model


def serving(twin: TwinModel, *, task: str | None, batch_size: int | str, max_length: int | None) -> ServedTwin:
    """Return the lm-eval model of a twin in memory. `task` is the expert of all its requests, if one is."""
    told = {} if twin.task_type == "sequence_classification" else {"task": task}  # a classifier's rows name it
    served: ServedTwin = _class_for(twin.task_type)(twin=twin, batch_size=batch_size, max_length=max_length, **told)
    return served


def _class_for(task_type: TaskType) -> Any:
    """Return the class that serves a kind of twin. The other kinds are not imported."""
    module, name = _CLASSES[task_type]
    return getattr(importlib.import_module(f"twin_bench_lm_eval.{module}"), name)


_CLASSES: dict[TaskType, tuple[str, str]] = {
    "sequence_classification": ("classifier", "ClassifierTwin"),
    "causal_lm": ("causal", "CausalTwin"),
    "seq2seq_lm": ("seq2seq", "Seq2SeqTwin"),
}
