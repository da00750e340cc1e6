"""One ordinary Hugging Face checkpoint: the model that the twin fuses for one vector of weights."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twin_bench.checkpoints.checkpoint import open_checkpoint, stored_buffers
from twin_bench.checkpoints.finite import require_no_overflow
from twin_bench.checkpoints.skeleton import meta_model
from twin_bench.checkpoints.sources import read_tokenizer
from twin_bench.checkpoints.stream import Layout, ordered, write_sharded
from twin_bench.checkpoints.tokenizers import save_tokenizer
from twin_bench.errors import InputError, nearest
from twin_bench.export.card import checkpoint_card
from twin_bench.export.fused import fused, require_present, weighted
from twin_bench.export.registry import export_format
from twin_bench.export.selection import Selection
from twin_bench.export.stored import StoredTwin
from twin_bench.files import write_text


@export_format(title="one merged checkpoint, of one vector of weights or one expert")
def hf(twin: StoredTwin, asked: Selection, root: Path, *, head: str | None = None) -> list[str]:
    """theta_s + sum_t w_t v_t in the shared expert's dtypes, with its tokenizer and a model card.

    One parameter after the other is read, fused and written. A classifier has the head of the expert that is exported,
    or the one that `head` names; with neither it is the backbone alone.
    """
    name, weights = asked.one(twin.experts)
    if head is not None and not twin.skeleton.head:
        raise InputError(f"--head {head}: a language model has no separate head; leave --head out")
    own_head = _head(twin, asked.expert if head is None else head)
    shared = open_checkpoint(twin.model, twin.skeleton)
    whole = {**own_head, **stored_buffers(twin.model, twin.skeleton)}
    layouts = {name: Layout(shared.dtype(name), shape) for name, shape in twin.skeleton.backbone.items()}
    layouts |= {name: Layout(tensor.dtype, tensor.shape) for name, tensor in whole.items()}
    experts = weighted(twin.parts.exclusive, weights)
    require_present(experts, twin.skeleton.backbone)
    prefix = twin.skeleton.prefix if twin.skeleton.head and not own_head else ""

    def stream() -> Iterator[tuple[str, Tensor]]:
        for parameter in ordered(layouts):
            tensor = whole[parameter] if parameter in whole else fused(parameter, shared[parameter], experts)
            yield (
                parameter.removeprefix(prefix),
                require_no_overflow(tensor.to(layouts[parameter].dtype), parameter, "the fusion"),
            )
            del tensor  # frees it before the next one is fused

    stored = {parameter.removeprefix(prefix): layout for parameter, layout in layouts.items()}
    write_sharded(root, stored, stream())
    _config(twin, own_head, layouts[next(iter(twin.skeleton.backbone))].dtype).save_pretrained(root)
    save_tokenizer(read_tokenizer(twin.model), root)
    if (twin.model / "generation_config.json").is_file():
        shutil.copyfile(twin.model / "generation_config.json", root / "generation_config.json")
    parameters = sum(layout.shape.numel() for layout in layouts.values())
    write_text(root / "README.md", checkpoint_card(twin, name, weights, parameters, head or asked.expert))
    return [f"{parameters:,} parameters, fused with {_told(twin, weights)}"]


def _told(twin: StoredTwin, weights: Tensor) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in zip(twin.experts, weights.tolist(), strict=True))


def _head(twin: StoredTwin, name: str | None) -> Mapping[str, Tensor]:
    """Return the head that is written: none of a language model, nor of a classifier where `name` is None."""
    if not twin.skeleton.head:
        return {}
    if name is None:
        return {}
    if name not in twin.parts.heads:
        raise InputError(f"--head {name}: the twin has no such head{nearest(name, twin.parts.heads)}")
    return twin.parts.heads[name]


def _config(twin: StoredTwin, head: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """Return the shared expert's config with the class, the labels and the dtype of what is written."""
    config = copy.deepcopy(twin.config)
    config.dtype = dtype
    if head:
        config.num_labels = head[twin.skeleton.head_output or min(head)].shape[0]
    model = meta_model(config, twin.task_type, num_labels=config.num_labels)
    config.architectures = [type(model.base_model if twin.skeleton.head and not head else model).__name__]
    return config
