"""The checks of what a caller gives a twin: an error names the argument, what was expected and what came."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from twin_bench.checkpoints.skeleton import position_limit
from twin_bench.errors import InputError, nearest, shown
from twin_bench.twin.finite import require_finite
from twin_bench.twin.placement import input_device

WHOLE = (torch.int64, torch.int32)
MASKS = (*WHOLE, torch.int8, torch.uint8, torch.bool, torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of token ids and types, and those of a mask."""

LARGEST_WEIGHT = 1e6
"""The largest size of a fusion weight. Hidden states of larger ones overflow in a norm, whose output is finite."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character, which no tokenizer takes."""


def require_tensor(value: Any, name: str, expected: str) -> None:
    """Raise a TypeError that names the argument unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {expected}, not {type(value).__name__} {shown(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor {expected}, not one of {value.layout}")


def checked_batch(inputs: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Return a forward's inputs without those that are None. The device is asked about their values once.

    Args:
        inputs: `input_ids`, and `attention_mask` and `token_type_ids` or None.
        model: the transformers model that takes them.

    Raises:
        TypeError: an input is no tensor.
        InputError: an input's shape, dtype, device or value.
    """
    ids = inputs["input_ids"]
    given = {name: value for name, value in inputs.items() if name == "input_ids" or value is not None}
    device = input_device(model)
    for name, value in given.items():
        require_tensor(value, name, "(batch, length)")
        if value.dtype not in (MASKS if name == "attention_mask" else WHOLE):
            raise InputError(f"{name} has the dtype {str(value.dtype).removeprefix('torch.')}, not int64")
        if value.ndim != 2 or value.shape != ids.shape:
            expected = "(batch, length)" if value is ids else f"that of input_ids, {tuple(ids.shape)}"
            raise InputError(f"{name} has the shape {tuple(value.shape)}, not {expected}")
        if value.device != device:
            raise InputError(f"{name} is on {value.device}, and the twin on {device}; move it there")
    if not len(ids):
        raise InputError("input_ids is an empty batch, (0, length); give one row at least")
    require_in_window(ids.shape[1], model.config, f"an input of {ids.shape[1]} tokens;")
    if not ids.shape[1]:
        raise InputError("an empty context: give it one token at least (the tokenizer's bos or eos)")
    types = getattr(model.config, "type_vocab_size", None) or None  # DeBERTa has 0 types, and ignores them
    _require_values(given, {"input_ids": vocabulary_size(model.config), "token_type_ids": types})
    return given


def checked_target(decoder_input_ids: Any, labels: Any, input_ids: Tensor, model: Any) -> Tensor:
    """Return what an encoder-decoder's forward is given of the targets, (batch, target length).

    Args:
        decoder_input_ids: what the decoder reads, or None.
        labels: the targets, in which -100 is padding, or None.
        input_ids: the sources, (batch, length).
        model: the transformers model that takes them.

    Raises:
        TypeError: the one that is given is no tensor.
        InputError: both or none is given, or a shape, dtype, device or value.
    """
    if (decoder_input_ids is None) == (labels is None):
        raise InputError("give decoder_input_ids, what the decoder reads, or labels, the targets: one of the two")
    name, target = ("labels", labels) if decoder_input_ids is None else ("decoder_input_ids", decoder_input_ids)
    require_tensor(target, name, "(batch, target length)")
    if target.ndim != 2 or len(target) != len(input_ids) or not target.shape[1]:
        raise InputError(f"{name} has the shape {tuple(target.shape)}, not ({len(input_ids)}, target length)")
    device = input_device(model)
    if target.dtype not in WHOLE or target.device != device:
        kind = str(target.dtype).removeprefix("torch.")
        raise InputError(f"{name} is {kind} on {target.device}, not int64 on {device}")
    require_in_window(target.shape[1], model.config, f"{name} of {target.shape[1]} tokens;")
    size = vocabulary_size(model.config)
    low, high = torch.stack((target if labels is None else target.masked_fill(target == -100, 0)).aminmax()).tolist()
    if low < 0 or (size is not None and high >= size):
        wrong = low if low < 0 else high
        raise InputError(f"token {wrong} in {name}: the model's vocabulary has {size} tokens")
    found: Tensor = target
    return found


def vocabulary_size(config: Any) -> int | None:
    """Return the number of tokens that a model knows, None if it has no vocabulary, as CANINE, which hashes them."""
    size: int | None = getattr(config, "vocab_size", None)
    return size


def require_in_window(length: int, config: Any, message: str) -> None:
    """Raise an InputError that begins with `message` if the model of a config has fewer positions than `length`."""
    window = position_limit(config)
    if window is not None and length > window:
        raise InputError(f"{message} the model's window is {window}")


def _require_values(given: Mapping[str, Tensor], limits: Mapping[str, int | None]) -> None:
    """Raise an InputError for a token, a type or an entry of the mask out of its range, or a row without tokens."""
    limited = [name for name in given if limits.get(name) is not None]
    found = [torch.stack(given[name].long().aminmax()) for name in limited]
    mask = given.get("attention_mask")
    if mask is not None:
        found.append(torch.stack([((mask == 0) | (mask == 1)).all(), (mask != 0).any(dim=1).all()]).long())
    known = torch.stack(found).tolist() if found else []
    for name, (low, high) in zip(limited, known, strict=False):
        limit = limits[name]
        if limit is not None and (low < 0 or high >= limit):
            wrong = low if low < 0 else high
            if name == "input_ids":
                raise InputError(f"token {wrong} in a context: the model's vocabulary has {limit} tokens")
            raise InputError(f"{name} holds {wrong}; the model has {limit} types, numbered from 0")
    if mask is not None:
        zero_or_one, attended = known[-1]
        if not zero_or_one:
            low, high = torch.stack(mask.float().aminmax()).tolist()
            raise InputError(f"attention_mask has {low:g} to {high:g}; it is 1 on tokens and 0 on padding")
        if not attended:
            raise InputError("an empty context: attention_mask is 0 on a whole row; give it one token at least")


def require_weights(weights: Any, rows: int, experts: Sequence[str]) -> None:
    """Check given fusion weights. They need neither be positive nor sum to 1.

    Raises:
        TypeError: they are no tensor.
        InputError: their shape, their dtype, or a value that is not finite or over `LARGEST_WEIGHT` in size.
    """
    require_tensor(weights, "fusion_weights", "(rows, experts)")
    expected = (rows, len(experts))
    if tuple(weights.shape) != expected:
        raise InputError(f"fusion_weights is {tuple(weights.shape)}, not (rows, experts) = {expected}")
    if weights.dtype == torch.bool or weights.dtype.is_complex:
        kind = str(weights.dtype).removeprefix("torch.")
        raise InputError(f"fusion_weights has the dtype {kind}, and not one of real numbers")
    require_finite(weights, "fusion_weights", f"give each of {', '.join(experts)} a finite number")
    if weights.numel() and weights.abs().max() > LARGEST_WEIGHT:
        raise InputError(f"fusion_weights has {weights.abs().max():g}; the largest size is {LARGEST_WEIGHT:g}")


def require_ids(ids: Any, what: str, vocabulary: int | None) -> None:
    """Check a row of token ids, a sequence of whole numbers. They may be numpy's.

    Raises:
        TypeError: no sequence.
        InputError: an empty row, what is no whole number, or a token outside the vocabulary.
    """
    if isinstance(ids, Tensor):
        ids = ids.tolist() if ids.ndim == 1 else None
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        raise TypeError(f"a {what} must be a list of token ids, not {type(ids).__name__} {shown(ids)}")
    if not len(ids):
        raise InputError(f"an empty {what}: give it one token at least (a context: the tokenizer's bos or eos)")
    if set(map(type, ids)) != {int}:
        for one in ids:
            if whole(one) is None:
                raise InputError(f"{shown(one)} in a {what}: a token's id is a whole number")
    if vocabulary is not None and (min(ids) < 0 or max(ids) >= vocabulary):
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise InputError(f"token {shown(wrong)} in a {what}: the model's vocabulary has {vocabulary} tokens")


def whole(value: Any) -> int | None:
    """Return a whole number, which may be numpy's, as an int, and None for anything else. True and False are none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def require_count(value: Any, name: str, least: int = 1) -> int:
    """Return a value as an int. Raise an InputError unless it is a whole number of `least` or more, in 64 bits."""
    count = whole(value)
    if count is None or not least <= count <= sys.maxsize:
        raise InputError(f"{name} must be a whole number, {least} or more, not {shown(value)}")
    return count


def checked_run(requests: Any, batch_size: Any, max_length: Any, twin: Any) -> tuple[int, int]:
    """Return the batch size and the window with which a language model's twin answers a list of requests.

    Raises:
        TypeError: the requests are no sequence.
        InputError: `batch_size` is no count, or `max_length` is what `checked_length` refuses.
    """
    if not isinstance(requests, Sequence) or isinstance(requests, str | bytes):
        raise TypeError(f"requests must be a list, not {type(requests).__name__} {shown(requests)}")
    return require_count(batch_size, "batch_size"), checked_length(max_length, twin)


def checked_length(max_length: Any, twin: Any) -> int:
    """Return a largest number of tokens, by default the twin's. InputError if it is no count or over the window."""
    length = require_count(twin.max_length if max_length is None else max_length, "max_length")
    require_in_window(length, twin.model.config, f"max_length {length}:")
    return length


def require_known(tasks: Sequence[Any], known: Any, message: str) -> None:
    """Raise an InputError that begins with `message` if a task is not in `known`."""
    for task in tasks:
        if not isinstance(task, str) or task not in known:
            raise InputError(f"{message} {shown(task)}{nearest(str(task), known)}")


def one_hot(tasks: Sequence[str], experts: Sequence[str]) -> Tensor:
    """Return fusion weights (rows, experts), on the CPU, with weight 1 on the expert of each row's task."""
    require_known(tasks, experts, "the twin has no expert of task")
    owner = torch.tensor([experts.index(task) for task in tasks])
    return torch.nn.functional.one_hot(owner, len(experts)).float()


def tasks_of(task: Any, rows: int) -> list[Any]:
    """Return each row's task, for one task of all rows, or a sequence with each row's.

    Raises:
        TypeError: neither a name nor a sequence.
        InputError: a sequence of another length.
    """
    if task is None or isinstance(task, str):
        return [task] * rows
    if not isinstance(task, Sequence):
        raise TypeError(f"task must be a name or a list of names, not {type(task).__name__} {shown(task)}")
    if len(task) != rows:
        raise InputError(f"{len(task)} tasks for {rows} rows; give one task, or one a row")
    return list(task)


def require_encoded(encoded: Any, config: Any) -> None:
    """Check encoded rows for the model of a config. They are mappings of lists, and `input_ids` is one of them.

    Raises:
        TypeError: what is no sequence of mappings.
        InputError: a row without tokens, over the window, or with a token outside the vocabulary.
    """
    if not isinstance(encoded, Sequence) or isinstance(encoded, str | bytes):
        raise TypeError(f"encoded must be a list of rows, not {type(encoded).__name__} {shown(encoded)}")
    vocabulary = vocabulary_size(config)
    for number, row in enumerate(encoded):
        if not isinstance(row, Mapping) or "input_ids" not in row:
            raise TypeError(f"encoded: row {number} must be a mapping with input_ids, not {shown(row)}")
        require_ids(row["input_ids"], f"context (row {number})", vocabulary)
        length = len(row["input_ids"])
        require_in_window(length, config, f"an input of {length} tokens in row {number};")
        for name, values in row.items():
            if not isinstance(values, Sequence) or len(values) != length:
                raise InputError(f"encoded: {name} of row {number} is not as long as its {length} input_ids")


def require_texts(texts: Any) -> None:
    """Check rows of texts: pairs of a text, and a second text or None.

    Raises:
        TypeError: what is no sequence of pairs of texts.
        InputError: a text that has no UTF-8, because it holds half a surrogate pair.
    """
    if not isinstance(texts, Sequence) or isinstance(texts, str | bytes):
        raise TypeError(f"texts must be a list of (text, text or None), not {type(texts).__name__} {shown(texts)}")
    for number, row in enumerate(texts):
        pair = isinstance(row, tuple | list) and len(row) == 2
        if not pair or not isinstance(row[0], str) or not isinstance(row[1], str | None):
            raise TypeError(f"texts: row {number} must be (text, text or None), not {shown(row)}")
        for text in filter(None, row):
            if SURROGATE.search(text):
                raise InputError(f"texts: row {number} holds half a surrogate pair, which is no character")
