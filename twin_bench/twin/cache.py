"""A cache of the router's features on disk. A second run over the same rows reads them instead of running the model.

A cache entry holds the features of a whole list of rows. The same row in another list runs in another batch, where
its features can differ in the last bit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.files import digest, digest_tensors, read_tensors, write_tensors
from twin_bench.locks import made_by_one
from twin_bench.twin.encoded import Encoded, identity
from twin_bench.twin.features import Read
from twin_bench.twin.layers.entries import KeptEntries

FORMAT = 3
"""The version of stored features. It is raised with every change in how features are computed, or rows told apart."""

_log = logging.getLogger(__name__)


def named_directory() -> Path | None:
    """Return the default directory of the cache, TWIN_BENCH_CACHE/features, or None if the variable is not set."""
    root = os.environ.get("TWIN_BENCH_CACHE")
    return Path(root) / "features" if root else None


def cached(
    folder: Path, decisive: Mapping[str, Any], reads: Sequence[Read], compute: Callable[[list[Read]], list[Tensor]]
) -> list[Tensor]:
    """Return the features of each read, (rows, width) on the CPU.

    Those that are not in the cache are computed and stored. A damaged file is computed again, with a warning. Another
    process that asks for the same rows waits, and reads what is stored.

    Args:
        folder: The cache's directory, with one file for each list of rows and read. It is created if necessary.
        decisive: Everything that decides the features except the layer and the pooling, as plain data.
        reads: The layers, each with its pooling, whose features are returned.
        compute: A function from a list of reads to their features.

    Raises:
        InputError: `folder` can't be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: features can't be kept there ({error.strerror}); name another directory") from None
    key = digest({"format": FORMAT, **decisive})
    files = {read: folder / f"{key}-{_name(read)}.safetensors" for read in reads}
    with made_by_one(folder / key):
        stored = {read: read_tensors(file, format_number=FORMAT) for read, file in files.items()}
        found = {read: tensors["features"] for read, tensors in stored.items() if tensors is not None}
        missing = [read for read in files if read not in found]
        for read, features in zip(missing, compute(missing) if missing else [], strict=True):
            try:
                write_tensors(files[read], {"features": features}, format_number=FORMAT)
            except OSError as error:
                _log.warning("%s: the features can't be kept (%s)", files[read], error)
            found[read] = features
    return [found[read] for read in reads]


def kept_features(
    folder: Path,
    twin: Any,
    rows: Sequence[Encoded],
    reads: Sequence[Read],
    batch_size: int,
    compute: Callable[[list[Read]], list[Tensor]],
) -> list[Tensor]:
    """Return the features of each read of a twin's rows, (rows, width) on the CPU, by `cached`."""
    decisive = {
        **surroundings(twin.device, twin.model),
        "backbone": twin.backbone_digest,
        "dtype": str(twin.model.dtype),
        "rows": [digest(identity(row).hex()) for row in rows],
        "batch_size": batch_size,
    }
    last = twin.backbone.config.num_hidden_layers
    numbered = [read._replace(layer=last) if read.layer == -1 else read for read in reads]
    return cached(folder, decisive, numbered, compute)


def _name(read: Read) -> str:
    return str(read.layer) if read.pooling == "mean" else f"{read.layer}-{read.pooling}"


def backbone_digest(backbone: Any, overrides: Mapping[str, Tensor], stored: str = "") -> str:
    """Return a digest of everything in a transformers model without a head that its hidden states depend on.

    `overrides` replace the backbone's parameters of the same names. `stored` is the digest of the files that hold the
    parameters: it stands for those that are offloaded, which have no values outside a forward. Tensors that only fusion
    uses are not in the state dict and not in the digest, and neither are the modules that hold them.
    """
    config = {name: value for name, value in backbone.config.to_dict().items() if name != "_name_or_path"}
    named = ((path, module) for path, module in backbone.named_modules() if not isinstance(module, KeptEntries))
    modules = [(path, type(module).__name__) for path, module in named]
    plain = [config, backbone.config._attn_implementation, modules]
    tensors = {**backbone.state_dict(), **overrides}
    offloaded = sorted(name for name, tensor in tensors.items() if tensor.is_meta)
    if offloaded:
        plain = [*plain, stored, offloaded]
    return digest([plain, digest_tensors({name: t for name, t in tensors.items() if not t.is_meta})])


def surroundings(device: torch.device, model: Any = None) -> dict[str, Any]:
    """Return what else can change the last bit of a result: versions, device, threads and precision of products.

    `model` is the model that computes it, which may be on several devices.
    """
    on_gpu = device.type == "cuda"
    spread = {str(place) for place in getattr(model, "hf_device_map", {}).values()} - {str(device), "disk"}
    return {
        **({"devices": {name: str(place) for name, place in model.hf_device_map.items()}} if spread else {}),
        "versions": [version(package) for package in ("torch", "transformers")],
        "device": [
            device.type,
            torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        ],
        "threads": None if on_gpu else torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
    }
