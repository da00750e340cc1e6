"""Exclusive vectors on disk: a PEFT adapter where PEFT can express them, or a file of this project's own.

An expert's folder always has `vectors.safetensors`, the differences of 1-D tensors. Beside it are

- of factors with all their bits, `adapter_config.json` and `adapter_model.safetensors`: a PEFT LoRA adapter of scale 1;
- of anything else, `exclusive.safetensors`, whose tensors are named NAME:PART for each matrix, and `exclusive.json`:
  the kind, the bits of factors, and each matrix's shape with its rank or the number of its entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from twin_bench.checkpoints.peft_files import load_adapter, save_adapter, save_tensors
from twin_bench.checkpoints.skeleton import Skeleton
from twin_bench.errors import InputError
from twin_bench.files import read_json, write_json
from twin_bench.twin.exclusive.forms import Exclusive
from twin_bench.twin.exclusive.quantised import QuantisedFactors
from twin_bench.twin.exclusive.registry import find_kind
from twin_bench.twin.exclusive.sparse import Sparse

VECTORS = "vectors.safetensors"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
OWN_FILES = ("exclusive.json", "exclusive.safetensors")
MODEL = "../../model"


def stored_as_adapter(settings: Mapping[str, Any]) -> bool:
    """Return whether exclusive vectors of these settings, as twin.json has them, are stored as a PEFT adapter."""
    return settings.get("kind", "svd") == "svd" and settings.get("bits") is None


def exclusive_files(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the files that hold an exclusive vector of these settings."""
    return (*(ADAPTER_FILES if stored_as_adapter(settings) else OWN_FILES), VECTORS)


def save_exclusive(folder: Path, exclusive: Exclusive, settings: Mapping[str, Any], skeleton: Skeleton) -> None:
    """Write an exclusive vector to an existing folder inside one of `twin_bench.files.written_at_once`."""
    save_tensors(exclusive.vectors, folder / VECTORS)
    if stored_as_adapter(settings):
        save_adapter(folder, exclusive.factors, skeleton, base_model=MODEL)
        return
    matrices: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, codes in exclusive.quantised.items():
        matrices[name] = {"shape": list(codes.shape), "rank": codes.rank}
        tensors |= {f"{name}:{part}": tensor for part, tensor in codes.parts.items()}
    for name, entries in exclusive.sparse.items():
        matrices[name] = {"shape": list(entries.shape), "count": entries.count}
        tensors |= {f"{name}:{part}": tensor for part, tensor in entries.parts.items()}
    kind = {"kind": settings.get("kind", "svd"), **({"bits": settings["bits"]} if settings.get("bits") else {})}
    write_json(folder / "exclusive.json", {**kind, "matrices": matrices})
    save_tensors(tensors, folder / "exclusive.safetensors")


def load_exclusive(folder: Path, skeleton: Skeleton) -> Exclusive:
    """Return the exclusive vector that `save_exclusive` wrote. InputError for a kind that is not known."""
    vectors = load_file(folder / VECTORS)
    if not (folder / "exclusive.json").is_file():
        return Exclusive(load_adapter(folder, skeleton), vectors)
    header = read_json(folder / "exclusive.json")
    try:
        find_kind(header["kind"])
    except InputError as error:
        raise InputError(f"{folder / 'exclusive.json'}: {error}; upgrade twin-bench") from None
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in header["matrices"]}
    for key, tensor in load_file(folder / "exclusive.safetensors").items():
        name, _, part = key.rpartition(":")
        parts[name][part] = tensor
    sparse: dict[str, Sparse] = {}
    quantised: dict[str, QuantisedFactors] = {}
    for name, matrix in header["matrices"].items():
        own, (m, n) = skeleton.own_name(name), matrix["shape"]
        if "rank" in matrix:
            quantised[own] = QuantisedFactors(header["bits"], (m, n), matrix["rank"], parts[name])
        else:
            sparse[own] = Sparse((m, n), matrix["count"], parts[name])
    return Exclusive({name: codes.factors() for name, codes in quantised.items()}, vectors, sparse, quantised)
