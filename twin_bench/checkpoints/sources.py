"""The inputs of a merge: the base model, the experts and the tokenizer, opened and checked for compatibility."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig

from twin_bench.checkpoints.adapter import open_expert
from twin_bench.checkpoints.checkpoint import Checkpoint, open_checkpoint, stored_apart, stored_buffers
from twin_bench.checkpoints.hub import WHOLE_VOCABULARIES, HubId, model_directory, on_hub
from twin_bench.checkpoints.quantization import Quantization, quantization_config
from twin_bench.checkpoints.skeleton import (
    Skeleton,
    meta_model,
    quiet_transformers,
    read_config,
    skeleton_of,
)
from twin_bench.compat import seq2seq_classes
from twin_bench.data.glue import GLUE
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError, first_line
from twin_bench.files import read_json

_log = logging.getLogger(__name__)

Labels = Mapping[str, Sequence[Sequence[str | int]]]
"""The labels of each expert's tasks, each in the order of its ids, and none for a regression."""
EXPERT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def require_expert_name(name: str) -> None:
    """Raise an InputError unless `name` can be the name of a folder and of a torch module."""
    if not EXPERT_NAME.fullmatch(name):
        raise InputError(f"expert name {name!r}: use letters, digits, - and _ only")
    if hasattr(nn.ModuleDict, name):
        raise InputError(f"expert name {name!r} is an attribute of torch's ModuleDict; rename the expert")


def require_expert_names(names: Iterable[str]) -> None:
    """Raise an InputError unless `names` can be the names of folders beside each other: some systems ignore case."""
    known: dict[str, str] = {}
    for name in names:
        require_expert_name(name)
        other = known.setdefault(name.lower(), name)
        if other != name:
            raise InputError(f"experts {other!r} and {name!r} differ in case alone; rename one")


@dataclass(frozen=True)
class Sources:
    """The opened inputs of a merge: config, tokenizer, and checkpoints whose tensors are read when asked for.

    `generation` is the base model's generation config, or None if it has none. `buffers` are the base model's tensors
    that nobody trains. Every merge keeps them.
    """

    config: Any
    tokenizer: Any
    skeleton: Skeleton
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    generation: GenerationConfig | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


def open_sources(
    base_model: str,
    experts: Mapping[str, str],
    *,
    labels: Labels | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Sources:
    """Open the base model and its experts. Only configs and the names of tensors are read.

    Args:
        base_model: A directory or a hub id.
        experts: The same for each expert, by its name.
        labels: The labels of classifiers' tasks, by expert, which their heads must have. By default GLUE's, of an
            expert that is named after one of its tasks.
        allow_pickle: Read weights from pickles (.bin) too, with `weights_only=True`.
        trust_remote_code: Let transformers run code that comes with a model.

    Raises:
        InputError: A model is not found, an expert's name is unsafe, or an expert can't be merged with the base model.
    """
    require_expert_names(experts)
    if labels is None:
        labels = {name: [GLUE[name].labels] for name in experts if name in GLUE}
    directory = model_directory(base_model, tokenizer=True, allow_pickle=allow_pickle)
    config = read_config(directory, trust_remote_code=trust_remote_code)
    folders = {name: model_directory(path, allow_pickle=allow_pickle) for name, path in experts.items()}
    task_type = _common_task_type(folders, config)
    configs: dict[str, Any] = {}
    for name, folder in folders.items():
        if not (folder / "adapter_config.json").is_file():
            configs[name] = read_config(folder, trust_remote_code=trust_remote_code)
            _require_same_architecture(name, configs[name], config)
            for own in labels.get(name, ()):
                _require_same_labels(name, configs[name], own)
        else:
            _require_same_base(name, folder, base_model)
    skeleton = _own_skeleton([directory, *(folders[name] for name in configs)], config, task_type, allow_pickle)
    buffers = stored_buffers(directory, skeleton, allow_pickle=allow_pickle)
    for name in configs:
        _require_same_buffers(name, buffers, stored_buffers(folders[name], skeleton, allow_pickle=allow_pickle))
    base = open_checkpoint(directory, skeleton, allow_pickle=allow_pickle)
    opened = {name: open_expert(folder, base, skeleton, allow_pickle=allow_pickle) for name, folder in folders.items()}
    for name, expert in opened.items():
        _require_head(name, expert, configs.get(name), config, skeleton)
        for own in labels.get(name, ()):
            _require_labels(name, expert, own, skeleton)
    tokenizer = read_tokenizer(directory, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:  # GPT-2 and Llama have none.
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return Sources(config, tokenizer, skeleton, base, opened, _generation_config(directory), buffers)


def _own_skeleton(checkpoints: Iterable[Path], config: Any, task_type: TaskType, allow_pickle: bool) -> Skeleton:
    """Return the skeleton of a model of `config`. What one of the full checkpoints stores apart is not tied in it."""
    skeleton = skeleton_of(config, task_type)
    apart = {name for each in checkpoints for name in stored_apart(each, skeleton, allow_pickle=allow_pickle)}
    return skeleton_of(config, task_type, apart) if apart else skeleton


def _require_same_buffers(name: str, base: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> None:
    """Raise an InputError if an expert has another buffer than the base model: nothing says how to merge it."""
    for key in sorted(base.keys() | expert.keys()):
        if key not in base or key not in expert or not torch.equal(base[key], expert[key]):
            raise InputError(
                f"expert {name!r}: {key} differs from the base model's; it is no parameter, so it can't be merged: "
                "give experts that leave it as it is"
            )


def read_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of the model in `directory`.

    transformers makes a tokenizer without words if the vocabulary's files are missing.

    Raises:
        InputError: The files of the vocabulary are missing, or can't be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds of errors for missing and damaged files.
        raise InputError(
            f"{directory}: its tokenizer can't be read ({first_line(error)}); expected tokenizer.json or the "
            "vocabulary's files there; save the base model's tokenizer in that folder (save_pretrained)"
        ) from None
    named = dict(getattr(tokenizer, "vocab_files_names", None) or {})  # empty for a tokenizer of bytes
    own = sorted(file for key, file in named.items() if key != "tokenizer_file")
    whole = any(any(directory.glob(pattern)) for pattern in WHOLE_VOCABULARIES)
    if named and not whole and not (own and all((directory / file).is_file() for file in own)):
        expected = " or ".join(["tokenizer.json", *([" and ".join(own)] if own else [])])
        raise InputError(
            f"{directory}: no tokenizer there, so every word would be unknown; expected {expected}; save the base "
            "model's tokenizer in that folder (save_pretrained)"
        )
    return tokenizer


def load_model(
    sources: Sources,
    parameters: Mapping[str, Tensor],
    dtype: str | None = None,
    quantization: Quantization | None = None,
) -> Any:
    """Return a transformers model that holds `parameters`, named as in the skeleton, in `dtype` or their own dtype.

    It is what transformers loads in that dtype: rotary frequencies stay float32, and so do some of T5's layers in
    float16, which `to` would round. `quantization` asks for quantised weights (see `quantization_config`).
    """
    chosen = getattr(torch, dtype) if dtype else _dtype(parameters)
    quantised = {} if quantization is None else {"quantization_config": quantization_config(quantization, chosen)}
    kind = type(meta_model(sources.config, sources.skeleton.task_type, num_labels=2))
    with quiet_transformers():
        model = kind.from_pretrained(
            None,
            config=sources.config,
            state_dict={**parameters, **sources.buffers},
            dtype=chosen,
            **quantised,
        )
    if sources.generation is not None:
        model.generation_config = sources.generation
    return model


def load_expert(sources: Sources, task: str, dtype: str | None = None) -> Any:
    """Return one expert as a transformers model with its own head, in `dtype` or its own dtype."""
    expert = sources.experts[task]
    head = expert.head()
    config = copy.deepcopy(sources.config)
    if head:
        config.num_labels = head[sources.skeleton.head_output or min(head)].shape[0]
    return load_model(replace(sources, config=config), {**expert, **head}, dtype)


def _dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in parameters.values() if tensor.is_floating_point())


def _generation_config(directory: Path) -> GenerationConfig | None:
    """Return a model's generation config, or None if it has none. InputError if it can't be read."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return None
    read_json(file)
    try:
        return GenerationConfig.from_pretrained(directory)
    except Exception as error:  # A setting is of the wrong kind.
        raise InputError(f"{file}: can't be read ({first_line(error)}); correct or remove it") from None


def _require_head(name: str, expert: Checkpoint, own: Any, config: Any, skeleton: Skeleton) -> None:
    """Raise an InputError unless a classifier's expert has the tensors of a head, of one number of labels.

    `own` is a full checkpoint's config, which says how many, and None for an adapter. `config` is the base model's.
    """
    head, where = expert.head(), f"expert {name!r}: {expert.source}"
    missing = skeleton.head - head.keys()
    if missing:
        raise InputError(
            f"{where} has no head tensor {min(missing)}; give a full checkpoint, or an adapter with the head in "
            "modules_to_save"
        )
    if skeleton.head_output is None:
        return
    output = head[skeleton.head_output].shape
    if len(output) != 2 or not output[0]:
        raise InputError(f"{where}: head tensor {skeleton.head_output} is {tuple(output)}, not (labels, width)")
    labels = output[0]
    for key, expected in meta_model(config, skeleton.task_type, num_labels=labels).named_parameters():
        if key in head and head[key].shape != expected.shape:
            raise InputError(
                f"{where}: head tensor {key} is {tuple(head[key].shape)}, and a head of {labels} labels has "
                f"{tuple(expected.shape)}; correct the expert's head"
            )
    if own and own.num_labels != labels:
        raise InputError(
            f"{where}: its head has {labels} labels, its config.json has {own.num_labels}; correct the expert"
        )


def _require_labels(name: str, expert: Checkpoint, expected: Sequence[str | int], skeleton: Skeleton) -> None:
    """Raise an InputError unless a classifier's head has as many labels as its task, and one for a regression."""
    if skeleton.head_output is None:
        return
    labels, said = expert.head()[skeleton.head_output].shape[0], len(expected) or 1
    if said != labels:
        task = "GLUE" if name in GLUE and expected == GLUE[name].labels else "its task"
        raise InputError(
            f"expert {name!r}: {expert.source}: its head has {labels} labels, {task} has {said}; correct or rename the "
            "expert"
        )


def _require_same_architecture(name: str, expert: Any, base: Any) -> None:
    """Raise an InputError if a config's setting changes what an expert computes from its weights."""
    for key in COMPUTES:
        theirs, ours = getattr(expert, key, None), getattr(base, key, None)
        if theirs != ours:
            hint = "; resize its vocabulary to the base model's" if key == "vocab_size" else ""
            raise InputError(
                f"expert {name!r}: {key} is {theirs}, the base model's is {ours}; they can't be merged{hint}"
            )


COMPUTES = (
    *("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "vocab_size"),
    *("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("activation_function", "dense_act_fn", "num_decoder_layers", "decoder_layers", "decoder_attention_heads"),
    *("relative_attention_max_distance", "scale_embedding", "scale_decoder_outputs", "decoder_start_token_id"),
)
"""The settings of a config that decide a model's results and can differ between models with the same shapes.

The vocabulary's size is included for a clear error message.
"""


def _require_same_base(name: str, adapter: Path, base_model: str) -> None:
    """Raise an InputError if an adapter names another model on the hub as its base.

    A local path names no model. If one of both is a path that ends otherwise than the other's name, this is a warning,
    and so is another revision: a branch and a commit may be the same.
    """
    settings = read_json(adapter / "adapter_config.json")
    said, revision = str(settings.get("base_model_name_or_path") or ""), settings.get("revision")
    theirs, ours = on_hub(said), on_hub(base_model)
    differ = _last_part(theirs, said) != _last_part(ours, base_model)
    if differ and all(model and "/" in model.repository and not model.folder for model in (theirs, ours)):
        raise InputError(
            f"expert {name!r}: an adapter on {said}, the base model is {base_model}; if they are the same model, "
            f"change base_model_name_or_path in {adapter / 'adapter_config.json'}"
        )
    if said and differ:
        _log.warning(
            "expert %r: an adapter on %s, the base model is %s; its shapes fit, make sure that they are the same model",
            name,
            said,
            base_model,
        )
    elif ours and revision not in (None, "main", ours.revision):
        _log.warning(
            "expert %r: an adapter on %s@%s, the base model is %s; give base_model at that revision if they differ",
            name,
            said,
            revision,
            base_model,
        )


def _last_part(model: HubId | None, name: str) -> str:
    return Path(model.repository if model else name).name.lower()


def _require_same_labels(name: str, expert: Any, labels: Sequence[str | int]) -> None:
    """Raise an InputError if an expert's config names its task's labels in another order than the task."""
    ours = [str(label).lower() for label in labels]
    theirs = [str(expert.id2label[index]).lower() for index in sorted(expert.id2label or {})]
    if sorted(ours) == sorted(theirs) and ours != theirs:
        order = "GLUE's order" if name in GLUE and labels == GLUE[name].labels else "its task's order"
        raise InputError(
            f"expert {name!r}: its labels are {', '.join(theirs)}, and {order} is {', '.join(ours)}; reorder its "
            "head's rows and id2label"
        )


def _common_task_type(folders: Mapping[str, Path], config: Any) -> TaskType:
    """Return the task type that all experts have. InputError if they differ."""
    kinds = {name: expert_task_type(name, folder, config) for name, folder in folders.items()}
    first = next(iter(kinds))
    for name, kind in kinds.items():
        if kind != kinds[first]:
            raise InputError(
                f"expert {name!r} is a {kind} model and {first!r} a {kinds[first]} one; give experts of one kind"
            )
    return kinds[first]


def expert_task_type(name: str, folder: Path, base: Any) -> TaskType:
    """Return the task type of the expert in `folder`, from its adapter's config or its architecture."""
    adapter, full = folder / "adapter_config.json", folder / "config.json"
    if adapter.is_file():
        said = read_json(adapter).get("task_type")
        if not isinstance(said, str | None):
            raise InputError(f"{adapter}: task_type is {said!r}; expected SEQ_CLS, CAUSAL_LM or SEQ_2_SEQ_LM")
        known: dict[str, TaskType] = {
            "SEQ_CLS": "sequence_classification",
            "CAUSAL_LM": "causal_lm",
            "SEQ_2_SEQ_LM": "seq2seq_lm",
        }
        if said is None:  # PEFT allows a config without task type. Then the base model's architecture decides.
            kind = _architecture_type(getattr(base, "architectures", None) or [])
            kind = kind or ("seq2seq_lm" if getattr(base, "is_encoder_decoder", False) else "sequence_classification")
            said = next(key for key, value in known.items() if value == kind)
    elif full.is_file():
        architectures = read_json(full).get("architectures") or []
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            raise InputError(f"{full}: architectures is {architectures!r}; expected a list of class names")
        said = ", ".join(architectures) or "of no architecture"
        kind = _architecture_type(architectures)
        known = {said: kind} if kind else {}
    else:
        raise InputError(f"expert {name!r}: {folder} holds no config.json and no adapter_config.json")
    if said not in known:
        raise InputError(
            f"expert {name!r}: {folder} is {said}; twins are made of sequence classifiers, causal LMs and "
            "encoder-decoders of texts"
        )
    return known[said]


def _architecture_type(architectures: Sequence[str]) -> TaskType | None:
    """Return the task type of a model whose classes have these names, None if it is none of ours."""
    if any("ForSequenceClassification" in name for name in architectures):
        return "sequence_classification"
    if seq2seq_classes().intersection(architectures):
        return "seq2seq_lm"
    if any("CausalLM" in name or name.endswith("LMHeadModel") for name in architectures):
        return "causal_lm"
    return None
