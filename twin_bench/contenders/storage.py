"""What a method keeps for inference, in bytes, in the dtypes in which it is stored on a disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from twin_bench.checkpoints.checkpoint import Checkpoint
from twin_bench.checkpoints.sources import Sources
from twin_bench.protocols import ProtocolName

LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, in so many bytes."""


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors in their own dtypes."""
    return sum(tensor.nbytes for tensor in tensors)


def base_bytes(sources: Sources) -> int:
    """Return the bytes of the base model in the dtypes in which it is stored: one model without a head.

    It is what `Contender.stored_bytes` is compared with. A classifier's base model has no head of its own. The output
    layer of a language model is no head, and counts.
    """
    return model_bytes(sources, sources.base)


def model_bytes(sources: Sources, model: Checkpoint) -> int:
    """Return the bytes of one whole model without its head: parameters, and buffers that a checkpoint stores.

    A LoRA adapter counts as the whole model that it makes, in the dtypes of the base model.
    """
    total = bytes_of(sources.buffers.values())
    for name, shape in sources.skeleton.backbone.items():
        stored = sources.base if name in model.low_rank else model
        total += shape.numel() * stored.dtype(name).itemsize
    return total


def head_bytes(sources: Sources) -> int:
    """Return the bytes of all experts' heads, which every method keeps that answers all tasks."""
    return sum(bytes_of(expert.head().values()) for expert in sources.experts.values() if sources.skeleton.head)


def twin_bytes(directory: Path, protocol: ProtocolName, *, routed: bool) -> int:
    """Return the bytes of a twin directory's tensors that a protocol uses, the headers of the files not counted.

    Under `standard` and `routed` they are the shared expert, the exclusive vectors, the heads and the router, which is
    left out unless `routed`. Under `paper` they are what the authors' evaluation reads: another router, and for a
    classifier the pretrained biases as well, for a language model the experts' LoRA factors in place of the exclusive
    vectors.
    """
    paper = directory / "router" / "paper"
    folders = [directory / "model"]
    if protocol != "paper" or not (paper / "lora.safetensors").is_file():
        folders += (directory / "experts").iterdir()
    if protocol == "paper":
        folders.append(paper)
    elif routed:
        folders.append(directory / "router")
    return sum(map(folder_bytes, folders))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the tensors in a folder's own safetensors files, those of its subfolders not counted."""
    return sum(map(data_bytes, folder.glob("*.safetensors")))


def data_bytes(file: Path) -> int:
    """Return the bytes of the tensors in a safetensors file: all of it but the header and the header's length."""
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(LENGTH_BYTES), "little")
    return file.stat().st_size - LENGTH_BYTES - header
