"""A model's skeleton: the names and shapes of its parameters, without its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers import logging as transformers_logging

from twin_bench.compat import Conv1D, own_names
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError, first_line

AUTO_MODEL: dict[TaskType, Any] = {
    "sequence_classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True)
class Skeleton:
    """Names and shapes of a model's parameters, the backbone's apart from the head's.

    `backbone` maps the names of the parameters that are merged to their shapes. `head` holds the names of the task
    head's parameters: everything outside the base model for a sequence classifier (classifier, score), nothing for
    a language model. `head_output` names the head's weight that has one row for each label.
    `transposed` names the weights of Conv1D layers, which are stored as (in, out). `embeddings` names the embedding
    tables. `prefix` begins the names of the backbone's parameters in a model with a head, such as "bert.". `own_name`
    maps the name under which a checkpoint stores a tensor to the model's own name for it.
    `tied` maps the further names of a parameter that has several to its first name. Its names in `backbone` are those
    that the checkpoints at hand store apart. `buffers` holds the shapes of tensors that a checkpoint stores and nobody
    trains, such as BART's final_logits_bias.
    """

    task_type: TaskType
    prefix: str
    backbone: Mapping[str, torch.Size]
    head: frozenset[str]
    head_output: str | None
    transposed: frozenset[str]
    embeddings: frozenset[str]
    own_name: Callable[[str], str]
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, torch.Size] = field(default_factory=dict)

    def names(self, parameter: str) -> list[str]:
        """Return the names under which a checkpoint may store a parameter: its own, then those that are tied to it."""
        further = [name for name, first in self.tied.items() if first == parameter and name not in self.backbone]
        known = [parameter, *further, *([self.tied[parameter]] if parameter in self.tied else [])]
        return [name for one in known for name in (one, one.removeprefix(self.prefix))]


def read_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of the model in `directory`. InputError if it can't be read."""
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds of errors for missing and damaged files.
        raise InputError(f"{directory}: no readable config.json ({first_line(error)})") from None


def skeleton_of(config: Any, task_type: TaskType, untied: Collection[str] = ()) -> Skeleton:
    """Return the skeleton of a model of `config`, from its class built on the meta device.

    `untied` are names that the class ties to another parameter, and that are parameters of their own nevertheless.
    """
    model = meta_model(config, task_type, num_labels=2)
    if task_type == "seq2seq_lm":
        _require_text_to_text(model)
    prefix = f"{model.base_model_prefix}."
    first: dict[int, str] = {}
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # Marian's positions: no checkpoint has them
    every = {name: one for name, one in model.named_parameters(remove_duplicate=False) if name not in computed}
    tied = {name: first[id(one)] for name, one in every.items() if first.setdefault(id(one), name) != name}
    parameters = {name: one.shape for name, one in every.items() if name not in tied or name in untied}
    head = frozenset(n for n in parameters if task_type == "sequence_classification" and not n.startswith(prefix))
    three_labels = dict(meta_model(config, task_type, num_labels=3).named_parameters()) if head else {}
    output = (n for n in sorted(head) if parameters[n] != three_labels[n].shape and len(parameters[n]) == 2)
    return Skeleton(
        task_type=task_type,
        prefix=prefix,
        backbone={name: shape for name, shape in parameters.items() if name not in head},
        head=head,
        head_output=next(output, None),
        transposed=_weights_of(model, Conv1D),
        embeddings=_weights_of(model, nn.Embedding),
        own_name=own_names(model),
        tied=tied,
        buffers={
            name: buffer.shape
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point() and name in model.state_dict()
        },
    )


def _require_text_to_text(model: Any) -> None:
    """Raise an InputError that names the class of an encoder-decoder which twins can't fuse per row."""
    config = model.config
    whole = getattr(config, "is_encoder_decoder", False) and hasattr(model.get_encoder(), "config")
    sizes = (getattr(config, name, None) for name in ("vocab_size", "num_hidden_layers"))
    reasons = {
        "it has no encoder and decoder of one config, as T5 and BART have": not whole
        or not all(isinstance(size, int) for size in sizes),
        "its layers are mixtures of experts": bool(getattr(config, "num_experts", 0)),
        "its attention has rows in the place of tokens": hasattr(config, "attention_window"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"{type(model).__name__} can't be served: {reason}")


def meta_model(config: Any, task_type: TaskType, *, num_labels: int) -> Any:
    """Return the transformers model of `config` on the meta device: its modules and shapes, without memory for weights.

    Code that comes with the model is run if the config is of that code itself, which `read_config` was told to run.
    InputError if transformers has no such class for the model type, or its config makes no model.
    """
    config = copy.deepcopy(config)
    config.num_labels = num_labels
    own_code = type(config).__module__.startswith("transformers_modules.")
    try:
        with torch.device("meta"):
            return AUTO_MODEL[task_type].from_config(config, trust_remote_code=own_code)
    except ValueError as error:
        raise InputError(f"model type {config.model_type!r} has no {task_type} class: {first_line(error)}") from None
    except Exception as error:  # A setting is of the wrong kind or size: any line of the model's code may raise.
        raise InputError(
            f"model type {config.model_type!r}: its config.json makes no model ({first_line(error)}); correct it"
        ) from None


CLASSIFIER_TOKENS = 128
"""The default maximum length of a classifier's input in tokens, as in the Twin-Merging paper."""


def default_max_length(config: Any, task_type: TaskType) -> int:
    """Return the default maximum length of an input in tokens: 128 for a classifier, else the model's window."""
    window = context_window(config)
    return min(CLASSIFIER_TOKENS, window) if task_type == "sequence_classification" else window


def context_window(config: Any) -> int:
    """Return the number of tokens that an input of a model is cut to, 2048 if its config does not say it."""
    return _positions(config) or 2048


def position_limit(config: Any) -> int | None:
    """Return the largest number of tokens that a model can read, None if its config does not limit it.

    The positions of T5 and XLNet are relative, whatever T5's n_positions says. So are DeBERTa's, unless its embeddings
    have absolute ones besides.
    """
    relative = getattr(config, "is_encoder_decoder", False) and hasattr(config, "relative_attention_num_buckets")
    return _positions(config) if getattr(config, "position_biased_input", True) and not relative else None


def _positions(config: Any) -> int | None:
    """Return the number of positions in a config, None if it has none. XLNet's -1 stands for no limit."""
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    positions = next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)
    if positions <= 0:
        return None
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):  # Their positions start after pad_token_id.
        positions -= config.pad_token_id + 1
    return positions


def _weights_of(model: nn.Module, kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kind))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars, and its warning that a head is newly initialised: heads are set later."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
