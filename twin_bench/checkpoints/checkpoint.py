"""Checkpoints as lazy mappings from parameter name to tensor.

A `Skeleton` says which parameters a model has (from its config alone, nothing allocated); a checkpoint on
disk, full or a PEFT LoRA adapter, is then a read-only mapping over exactly those names. One tensor is read
at a time: merging never holds whole models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twin_bench.checkpoints.finite import require_finite
from twin_bench.checkpoints.skeleton import Skeleton
from twin_bench.errors import InputError, first_line
from twin_bench.files import read_json


class LowRank(NamedTuple):
    """A LoRA adapter of one matrix: scale * B A, A (r, n) and B (m, r) read when asked for."""

    A: Callable[[], Tensor]
    B: Callable[[], Tensor]
    scale: float


class Checkpoint(Mapping[str, Tensor]):
    """The backbone parameters of one model under a skeleton's names, read when asked for.

    `head` holds the task head's tensors, read likewise. Reading a tensor that holds NaN or inf is an
    InputError that names it. Of an adapter `low_rank` are the factors of what it changes by a product, and
    `replaced` what it replaces whole.
    """

    def __init__(
        self,
        source: str,
        backbone: Mapping[str, Callable[[], Tensor]],
        head: Mapping[str, Callable[[], Tensor]],
        low_rank: Mapping[str, LowRank] | None = None,
        replaced: Iterable[str] = (),
    ) -> None:
        self.source = source
        self._backbone = backbone
        self._head = head
        self.low_rank = dict(low_rank or {})
        self.replaced = frozenset(replaced)

    def __getitem__(self, name: str) -> Tensor:
        return require_finite(self._backbone[name](), name, self.source)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; of a memory-mapped one nothing is read for it."""
        return self._backbone[name]().dtype

    def __contains__(self, name: object) -> bool:
        return name in self._backbone  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._backbone)

    def __len__(self) -> int:
        return len(self._backbone)

    def head(self) -> dict[str, Tensor]:
        """Return the task head's tensors by name; empty when the checkpoint has none."""
        return {name: require_finite(read(), name, self.source) for name, read in self._head.items()}


def open_checkpoint(directory: Path, skeleton: Skeleton, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a full Hugging Face checkpoint (safetensors, sharded or not).

    Names are matched with or without the base model's prefix, so a bare backbone and a model with a head
    read alike. A missing tensor, or one of another shape, is an InputError. A pickle is refused unless
    `allow_pickle`, and then read with `weights_only=True`.
    """
    stored = stored_tensors(directory, "model", "pytorch_model", allow_pickle=allow_pickle)

    def find(name: str) -> Callable[[], Tensor]:
        bare = name.removeprefix(skeleton.prefix)
        for candidate in (name, bare, _legacy(name), _legacy(bare)):
            if candidate in stored:
                return stored[candidate]
        raise InputError(f"{directory}: tensor {name} is missing; is it a checkpoint of another architecture?")

    readers = {name: find(name) for name in skeleton.backbone}
    head = {name: stored[name] for name in sorted(skeleton.head & stored.keys())}
    checked = {name: with_shape(read, skeleton.backbone[name], name, directory) for name, read in readers.items()}
    return Checkpoint(str(directory), checked, head)


def stored_tensors(
    directory: Path, stem: str, pickle_stem: str, *, allow_pickle: bool
) -> dict[str, Callable[[], Tensor]]:
    """Return a reader for every tensor stored in `directory`, single file or shards."""
    index = directory / f"{stem}.safetensors.index.json"
    single = directory / f"{stem}.safetensors"
    pickle = directory / f"{pickle_stem}.bin"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index}: no weight_map in it; copy the checkpoint again")
        for shard in set(shards.values()):
            if Path(shard).name != shard:
                raise InputError(f"{index}: shard name {shard!r} leaves the directory")
        return {key: functools.partial(_read_tensor, directory / shard, key) for key, shard in shards.items()}
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                return {key: functools.partial(_read_tensor, single, key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{single}: not a readable safetensors file ({error})") from None
    if pickle.is_file():
        if not allow_pickle:
            raise InputError(
                f"{pickle}: a pickle can run code when read; convert it (from_pretrained, then "
                "save_pretrained writes safetensors) or set allow_pickle: true"
            )
        tensors = torch.load(pickle, map_location="cpu", weights_only=True, mmap=True)
        return {key: functools.partial(tensors.__getitem__, key) for key in tensors}
    raise InputError(f"{directory}: no {stem}.safetensors there; is it a checkpoint or an adapter?")


def _read_tensor(file: Path, key: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(key)
            return tensor
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: tensor {key} can't be read ({first_line(error)})") from None


def with_shape(read: Callable[[], Tensor], expected: torch.Size, name: str, directory: Path) -> Callable[[], Tensor]:
    """Return a reader that raises an InputError for a tensor of another shape than `expected`."""

    def checked() -> Tensor:
        tensor = read()
        if tensor.shape != expected:
            raise InputError(shape_message(directory, name, tensor.shape, expected))
        return tensor

    return checked


def shape_message(source: Path, name: str, found: torch.Size, expected: torch.Size) -> str:
    """Return the message for a tensor of another shape than the base model's."""
    hint = "; the vocabularies differ: resize it to the base model's" if "embed" in name else ""
    return f"{source}: tensor {name} is {tuple(found)}, the base model's is {tuple(expected)}{hint}"


def _legacy(name: str) -> str:
    """Return the name under which checkpoints of the first BERT releases hold LayerNorm's parameters."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
