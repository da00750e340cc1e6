"""Writing safetensors files one tensor at a time. Only the tensor that is being written is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.files import write_json, write_stream

SHARD_BYTES = 5 * 10**9
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Layout(NamedTuple):
    """A tensor's dtype and shape, which a file's header states before the tensor is computed."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return self.dtype.itemsize * self.shape.numel()


def write_sharded(
    directory: Path,
    layouts: Mapping[str, Layout],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's tensors as model.safetensors, or as shards with an index.

    Args:
        directory: An existing folder.
        layouts: The dtype and shape of every tensor. A file's header precedes its tensors.
        tensors: Names and tensors in the order of `ordered(layouts)`.
        shard_bytes: The largest size of a shard in bytes. A tensor that is larger gets its own shard.

    Raises:
        InputError: A tensor has a dtype that safetensors files of dense models don't contain.
        ValueError: `tensors` does not match `layouts`.
    """
    for name, layout in layouts.items():
        if layout.dtype not in _NAMES:
            raise InputError(f"tensor {name} is {layout.dtype}; dequantise the checkpoint before merging it")
    shards = _shards(layouts, shard_bytes)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    stream = iter(tensors)
    for file, shard in zip(names, shards, strict=True):
        with write_stream(directory / file) as out:
            out.write(_header({name: layouts[name] for name in shard}))
            for name in shard:
                _write_next(out, stream, name, layouts[name])
    if next(stream, None) is not None:
        raise ValueError("there are more tensors than layouts")
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(layout.nbytes for layout in layouts.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        write_json(directory / "model.safetensors.index.json", index)


def ordered(layouts: Mapping[str, Layout]) -> list[str]:
    """Return the names in the order in which the tensors are written: wide dtypes first, which aligns every tensor."""
    return sorted(layouts, key=lambda name: -layouts[name].dtype.itemsize)


def _shards(layouts: Mapping[str, Layout], limit: int) -> list[list[str]]:
    """Return the tensors' names by shard, each shard of at most `limit` bytes unless it holds one larger tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in ordered(layouts):
        if shards[-1] and size + layouts[name].nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += layouts[name].nbytes
    return shards


def _header(layouts: Mapping[str, Layout]) -> bytes:
    """Return a file's header: the length of the JSON in 8 bytes, then the JSON, padded to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, layout in layouts.items():
        begin, end = end, end + layout.nbytes
        entries[name] = {"dtype": _NAMES[layout.dtype], "shape": list(layout.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_next(out: BinaryIO, stream: Iterator[tuple[str, Tensor]], name: str, layout: Layout) -> None:
    """Write the next tensor of `stream`. Its memory is freed on return, before the one after it is computed."""
    found, tensor = next(stream)
    if (found, tensor.dtype, tensor.shape) != (name, *layout):
        raise ValueError(f"expected tensor {name} {layout}, found {found} {tensor.dtype} {tuple(tensor.shape)}")
    out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
