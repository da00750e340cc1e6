"""The router's features on disk, so that another run over the same rows does not run the model for them.

A list of rows is kept whole: a row of another list ran in another batch, and its features differ in the last bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from twin_bench.errors import InputError

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
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()
    files = {layer: folder / f"{key}-{layer}.safetensors" for layer in layers}
    found = {layer: features for layer, file in files.items() if (features := _read(file)) is not None}
    missing = [layer for layer in files if layer not in found]
    for layer, features in zip(missing, compute(missing) if missing else [], strict=True):
        _write(files[layer], features)
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
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
    for name, tensor in {**model.base_model.state_dict(), **overrides}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_digest(tensor)}".encode())
    return digest.hexdigest()


def surroundings(device: torch.device) -> dict[str, Any]:
    """Return what decides the last bit of a result besides model and input: versions, device, threads, precision."""
    on_gpu = device.type == "cuda"
    return {
        "versions": [version(package) for package in ("twin-bench", "torch", "transformers")],
        "device": [
            device.type,
            torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        ],
        "threads": None if on_gpu else torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
    }


def _read(file: Path) -> Tensor | None:
    """Return the features of a file; None where it is not there or damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            features: Tensor = stored.get_tensor("features").clone()
            if (stored.metadata() or {}).get("sha256") == _digest(features):
                return features
        reason = "its sha256 is another"
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        reason = str(error)
    _log.warning("%s: damaged (%s); the features are computed anew", file, reason)
    return None


def _write(file: Path, features: Tensor) -> None:
    """Write features under a name of this process' own, then rename it; a warning where that can't be done."""
    partial = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        partial.write_bytes(save({"features": features.contiguous()}, metadata={"sha256": _digest(features)}))
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        _log.warning("%s: the features can't be kept (%s)", file, error)


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(values.data).hexdigest()
