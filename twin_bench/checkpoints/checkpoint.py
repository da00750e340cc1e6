"""Checkpoints as lazy mappings from parameter name to tensor.

A `Skeleton` says which parameters a model has. It is built from the model's config alone and allocates no weights.
A checkpoint, whether a full model or a PEFT LoRA adapter, is a read-only mapping over exactly those parameters.
Each tensor is read when it is asked for, so a merge never holds whole models in memory.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twin_bench.checkpoints.finite import require_dtype, require_weights
from twin_bench.checkpoints.skeleton import Skeleton
from twin_bench.compat import LOADS_UNTIED
from twin_bench.errors import InputError, first_line
from twin_bench.files import read_json


class LowRank(NamedTuple):
    """One matrix's LoRA adapter, scale * B A. `A` reads the (r, n) factor and `B` the (m, r) factor.

    `transposed` says that the matrix is stored (n, m): an embedding table, or the weight of a Conv1D.
    """

    A: Callable[[], Tensor]
    B: Callable[[], Tensor]
    scale: float
    transposed: bool

    def oriented(self, product: Tensor) -> Tensor:
        """Return a view of an (m, n) product B A that has the stored matrix's orientation."""
        return product.T if self.transposed else product


class Checkpoint(Mapping[str, Tensor]):
    """The backbone parameters of one model, a read-only mapping from a skeleton's names to tensors.

    Tensors are read when they are asked for. Reading a tensor that holds NaN or inf, or has a dtype that weights don't
    have, raises an InputError that names the tensor. `head()` returns the task head's tensors.
    For an adapter, `low_rank` holds the factors of the matrices that it changes, and `replaced` the names of the
    parameters that it stores whole. Both are empty for a full checkpoint.
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
        return require_weights(self._backbone[name](), name, self.source)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype. The data of a memory-mapped tensor is not read."""
        return self._backbone[name]().dtype

    def __contains__(self, name: object) -> bool:
        return name in self._backbone  # Mapping's own implementation would read the tensor.

    def __iter__(self) -> Iterator[str]:
        return iter(self._backbone)

    def __len__(self) -> int:
        return len(self._backbone)

    def head(self) -> dict[str, Tensor]:
        """Return the task head's tensors by name, an empty dict if the checkpoint has no head."""
        return {name: require_weights(read(), name, self.source) for name, read in self._head.items()}


def open_checkpoint(directory: Path, skeleton: Skeleton, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a full Hugging Face checkpoint in safetensors format, a single file or shards.

    Tensors may be stored with or without the base model's prefix, so a bare backbone can be opened like a model with a
    head. A tensor that transformers renames when it loads the checkpoint is found under its stored name, and one that
    has several names under any of them. With `allow_pickle` a pickle is read too, with `weights_only=True`.

    Raises:
        InputError: The directory has no weights, a tensor is missing, has another shape than the skeleton's or a dtype
            that weights don't have, or the weights are a pickle. Reading a tensor that holds NaN or inf raises one.
    """
    stored = _named(directory, skeleton, allow_pickle=allow_pickle)

    def find(name: str) -> Callable[[], Tensor]:
        names = skeleton.names(name)
        for candidate in (*names, *map(_legacy, names)):
            if candidate in stored:
                return stored[candidate]
        raise InputError(
            f"{directory}: tensor {name} is missing; is it a checkpoint of another architecture, or of one whose "
            "weights transformers converts when it loads them (mixtures of experts)?"
        )

    readers = {name: find(name) for name in skeleton.backbone}
    head = {name: stored[name] for name in sorted(skeleton.head & stored.keys())}
    checked = {name: with_shape(read, skeleton.backbone[name], name, directory) for name, read in readers.items()}
    for name, read in checked.items():
        require_dtype(read(), name, str(directory))  # maps the tensor into memory, and reads none of its data
    return Checkpoint(str(directory), checked, head)


def stored_apart(directory: Path, skeleton: Skeleton, *, allow_pickle: bool = False) -> set[str]:
    """Return the names that the model's class ties to another parameter, and a checkpoint stores with other values.

    transformers 5 does not tie them when it loads that checkpoint: Flan-T5's output layer is one of them.
    """
    if not skeleton.tied or not LOADS_UNTIED:
        return set()
    stored = _named(directory, skeleton, allow_pickle=allow_pickle)
    bare = {name: name if name in stored else name.removeprefix(skeleton.prefix) for name in skeleton.backbone}
    pairs = {name: bare.get(first, first) for name, first in skeleton.tied.items()}
    return {
        name
        for name, first in pairs.items()
        if name in stored and first in stored and not torch.equal(stored[name](), stored[first]())
    }


def stored_buffers(directory: Path, skeleton: Skeleton, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Return those of the model's buffers that a checkpoint stores, and that are not all zeros."""
    if not skeleton.buffers:
        return {}
    stored = _named(directory, skeleton, allow_pickle=allow_pickle)
    found = {
        name: with_shape(stored[name], shape, name, directory)()
        for name, shape in skeleton.buffers.items()
        if name in stored
    }
    return {name: require_weights(buffer, name, str(directory)) for name, buffer in found.items() if buffer.any()}


def _named(directory: Path, skeleton: Skeleton, *, allow_pickle: bool) -> dict[str, Callable[[], Tensor]]:
    """Return a function that reads each of a full checkpoint's tensors, by its stored name and the model's own."""
    found = stored_tensors(directory, "model", "pytorch_model", allow_pickle=allow_pickle)
    return {**{skeleton.own_name(key): read for key, read in found.items()}, **found}


def stored_tensors(
    directory: Path, stem: str, pickle_stem: str, *, allow_pickle: bool
) -> dict[str, Callable[[], Tensor]]:
    """Return a function that reads each tensor stored in `directory`, by the tensor's name.

    The first of these that exists is read: the index of sharded STEM.safetensors, STEM.safetensors, the index of
    sharded PICKLE_STEM.bin, PICKLE_STEM.bin. Of pickles nothing but tensors is read (`weights_only=True`).

    Raises:
        InputError: None of them exists, the file is damaged, or it is a pickle and `allow_pickle` is False.
    """
    index = directory / f"{stem}.safetensors.index.json"
    single = directory / f"{stem}.safetensors"
    pickles = (directory / f"{pickle_stem}.bin.index.json", directory / f"{pickle_stem}.bin")
    pickle = next((file for file in pickles if file.is_file()), None)
    if index.is_file():
        return {key: functools.partial(_read_tensor, file, key) for key, file in _sharded(index).items()}
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                return {key: functools.partial(_read_tensor, single, key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{single}: not a readable safetensors file ({error})") from None
    if pickle is not None:
        if not allow_pickle:
            raise InputError(
                f"{pickle}: a pickle can run code when read; convert it (from_pretrained, then "
                "save_pretrained writes safetensors) or set allow_pickle: true"
            )
        shards = [pickle] if pickle.suffix == ".bin" else sorted(set(_sharded(pickle).values()))
        return {
            key: functools.partial(tensors.__getitem__, key) for tensors in map(_unpickled, shards) for key in tensors
        }
    raise InputError(f"{directory}: no {stem}.safetensors there; is it a checkpoint or an adapter?")


def _unpickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of torch.save. InputError if it holds anything else, or can't be read.

    Files of torch before 1.6 are no zip archives, and can't be mapped into memory.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # The file is missing, damaged, or holds more than tensors.
        raise InputError(
            f"{file}: can't be read as a pickle of tensors alone ({first_line(error)}); load the model with "
            "transformers and save it again (save_pretrained)"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds a {type(found).__name__}; expected a state dict, which maps names to tensors")
    for key, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{file}: {key} is a {type(tensor).__name__}; save the model's state dict alone")
    return found


def _sharded(index: Path) -> dict[str, Path]:
    """Return each tensor's file, from a sharded checkpoint's index. InputError for a shard outside its directory."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise InputError(f"{index}: no weight_map in it; copy the checkpoint again")
    for shard in set(shards.values()):
        if Path(shard).name != shard:
            raise InputError(f"{index}: shard name {shard!r} leaves the directory")
    return {key: index.parent / shard for key, shard in shards.items()}


def _read_tensor(file: Path, key: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(key)
            return tensor
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: tensor {key} can't be read ({first_line(error)})") from None


def with_shape(read: Callable[[], Tensor], expected: torch.Size, name: str, directory: Path) -> Callable[[], Tensor]:
    """Return `read` with a check: the result raises an InputError for a tensor of another shape than `expected`."""

    def checked() -> Tensor:
        tensor = read()
        if tensor.shape != expected:
            raise InputError(shape_message(directory, name, tensor.shape, expected))
        return tensor

    return checked


def shape_message(source: Path, name: str, found: torch.Size, expected: torch.Size) -> str:
    """Return the error message for a tensor whose shape differs from the base model's."""
    hint = "; the vocabularies differ: resize it to the base model's" if "embed" in name else ""
    return f"{source}: tensor {name} is {tuple(found)}, the base model's is {tuple(expected)}{hint}"


def _legacy(name: str) -> str:
    """Return the name that the first BERT releases use for LayerNorm's parameters, gamma and beta."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
