"""Safetensors files written one tensor at a time: no more is in memory than the tensor that is being written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from twin_bench.errors import InputError

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
    """What a file's header says of a tensor before it is there."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """The bytes that the tensor takes."""
        return self.dtype.itemsize * self.shape.numel()


def write_sharded(
    directory: Path,
    layouts: Mapping[str, Layout],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's tensors as model.safetensors, or as shards with their index.

    Args:
        directory: a folder that exists.
        layouts: every tensor's dtype and shape: a header comes before its tensors.
        tensors: the tensors in the order of `ordered(layouts)`.
        shard_bytes: a shard's most, but for a tensor that is larger by itself.

    Raises:
        InputError: a dtype that safetensors files of dense models don't hold.
    """
    for name, layout in layouts.items():
        if layout.dtype not in _NAMES:
            raise InputError(f"tensor {name} is {layout.dtype}; dequantise the checkpoint before it is merged")
    shards = _shards(layouts, shard_bytes)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    stream = iter(tensors)
    for file, shard in zip(names, shards, strict=True):
        with (directory / file).open("wb") as out:
            out.write(_header({name: layouts[name] for name in shard}))
            for name in shard:
                _write_next(out, stream, name, layouts[name])
    if next(stream, None) is not None:
        raise ValueError("more tensors came than were announced")
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(layout.nbytes for layout in layouts.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def ordered(layouts: Mapping[str, Layout]) -> list[str]:
    """Return the names in the order in which they are written: wide dtypes first, so that each tensor is aligned."""
    return sorted(layouts, key=lambda name: -layouts[name].dtype.itemsize)


def _shards(layouts: Mapping[str, Layout], limit: int) -> list[list[str]]:
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
    """Return a file's head: the length of the JSON in 8 bytes, and the JSON, padded to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, layout in layouts.items():
        begin, end = end, end + layout.nbytes
        entries[name] = {"dtype": _NAMES[layout.dtype], "shape": list(layout.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_next(out: BinaryIO, stream: Iterator[tuple[str, Tensor]], name: str, layout: Layout) -> None:
    # A function of its own, so that no tensor is held while the next one is computed.
    found, tensor = next(stream)
    if (found, tensor.dtype, tensor.shape) != (name, *layout):
        raise ValueError(f"tensor {found} is {tensor.dtype} {tuple(tensor.shape)}, announced was {name} {layout}")
    out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
