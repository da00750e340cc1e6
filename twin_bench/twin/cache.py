"""The router's features on disk, so that another run over the same rows does not run the model for them.

A list of rows is kept whole: a row of another list ran in another batch, and its features differ in the last bit.
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

FORMAT = 1
"""The format of stored features. It is raised with every change of what a router reads."""

_log = logging.getLogger(__name__)


def named_directory() -> Path | None:
    """Return where features are kept unless a caller says it: TWIN_BENCH_CACHE/features, None where that is not set."""
    root = os.environ.get("TWIN_BENCH_CACHE")
    return Path(root) / "features" if root else None


def cached(
    folder: Path, decisive: Mapping[str, Any], layers: Sequence[int], compute: Callable[[list[int]], list[Tensor]]
) -> list[Tensor]:
    """Return each layer's features, (rows, width) on the CPU: those in `folder`, and those `compute` gives of the rest.

    Args:
        folder: where they are kept, a file a layer; made where it is not there.
        decisive: all that decides the features, the layer apart, as plain data.
        layers: whose features.
        compute: from a list of layers to their features.

    Raises InputError where `folder` can't be made. A damaged file is computed anew, with a warning.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: features can't be kept there ({error.strerror}); name another directory") from None
    key = digest({"format": FORMAT, **decisive})
    files = {layer: folder / f"{key}-{layer}.safetensors" for layer in layers}
    stored = {layer: read_tensors(file, format_number=FORMAT) for layer, file in files.items()}
    found = {layer: tensors["features"] for layer, tensors in stored.items() if tensors is not None}
    missing = [layer for layer in files if layer not in found]
    for layer, features in zip(missing, compute(missing) if missing else [], strict=True):
        try:
            write_tensors(files[layer], {"features": features}, format_number=FORMAT)
        except OSError as error:
            _log.warning("%s: the features can't be kept (%s)", files[layer], error)
        found[layer] = features
    return [found[layer] for layer in layers]


def backbone_digest(model: Any, overrides: Mapping[str, Tensor]) -> str:
    """Return a digest of what a transformers model's hidden states depend on besides its input and where it runs.

    `overrides` stand in for the backbone's parameters of their names. What only fusion reads is left out: it is in no
    state_dict.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    modules = [(path, type(module).__name__) for path, module in model.base_model.named_modules()]
    plain = [config, model.config._attn_implementation, modules]
    return digest([plain, digest_tensors({**model.base_model.state_dict(), **overrides})])


def surroundings(device: torch.device) -> dict[str, Any]:
    """Return what decides the last bit of a result besides model and input: versions, device, threads, precision."""
    on_gpu = device.type == "cuda"
    return {
        "versions": [version(package) for package in ("torch", "transformers")],
        "device": [
            device.type,
            torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        ],
        "threads": None if on_gpu else torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
    }
