"""A twin on disk: an ordinary checkpoint, one PEFT adapter for each expert, and a router.

my-twin/
  twin.json            format version, task type, names, settings, the checksum of every file and of itself
  model/               the shared expert: a Hugging Face checkpoint with its tokenizer (a classifier's without head)
  experts/NAME/        adapter_config.json, adapter_model.safetensors: the exclusive factors as a PEFT LoRA adapter
                       on model/ (scale 1), or what a kind keeps that is no such adapter: exclusive.json,
                       exclusive.safetensors (see `twin_bench.twin.exclusive.files`); vectors.safetensors: the
                       exclusive vector's 1-D tensors, which LoRA cannot express; head.safetensors: a classifier's head
  router/              config.json with the router's kind, router.safetensors
  router/paper/        for the protocol paper: biases.safetensors (pretrained biases) for classifiers, and
                       left_out.safetensors (the experts' biases below exclusive.from_layer); lora.safetensors
                       (the experts' own LoRA factors) for language models; the authors' router, if there were test
                       rows to select it on
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from twin_bench.checkpoints.digests import known_digest
from twin_bench.checkpoints.dtypes import known_dtype
from twin_bench.checkpoints.peft_files import save_tensors
from twin_bench.checkpoints.quantization import Quantization, asked_of, bits_of
from twin_bench.checkpoints.skeleton import AUTO_MODEL, Skeleton, quiet_transformers, read_config, skeleton_of
from twin_bench.checkpoints.sources import require_expert_name
from twin_bench.checkpoints.tokenizers import save_tokenizer
from twin_bench.config import parse
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError, shown
from twin_bench.files import digest, digest_file, write_json, written_at_once
from twin_bench.twin.exclusive import known_kinds
from twin_bench.twin.exclusive.files import exclusive_files, load_exclusive, save_exclusive
from twin_bench.twin.exclusive.settings import ExclusiveSettings
from twin_bench.twin.paper import AdapterStack, PaperFactors
from twin_bench.twin.parts import PaperParts, Parts
from twin_bench.twin.placement import Devices, find_placement, offloading
from twin_bench.twin.routers.store import load_router, save_router

FORMAT_VERSION = 3
"""The version of the directory's format. It is raised when an older twin-bench could not read a new directory.

Directories of all earlier versions stay readable. From version 2 on, twin.json has a checksum of its own content. From
version 3 on, a router has a kind, and exclusive vectors may be of other kinds than the truncated SVD. The version of
twin-bench that built a twin is in twin.json for information only, and is part of no digest.
"""

HEAD_FILE = "head.safetensors"
LEFT_OUT_FILE = "left_out.safetensors"


def save_twin(
    directory: Path, model: Any, tokenizer: Any, parts: Parts, skeleton: Skeleton, settings: Mapping[str, Any]
) -> None:
    """Write a twin. The directory appears whole or not at all.

    Args:
        directory: It must not exist yet.
        model: The transformers model that holds the shared expert, before `install` changed it.
        tokenizer: Its tokenizer.
        parts: The exclusive vectors, heads and routers.
        skeleton: The model's skeleton.
        settings: How the twin was built, for twin.json.

    Raises:
        InputError: `directory` exists already.
    """
    with written_at_once(directory) as root:
        (model.base_model if skeleton.head else model).save_pretrained(root / "model")
        save_tokenizer(tokenizer, root / "model")
        for name in parts.exclusive:
            _save_expert(root / "experts" / name, name, parts, skeleton, settings.get("exclusive", {}))
        if parts.router is not None:
            save_router(root / "router", parts.router)
        if parts.paper is not None:
            _save_paper(root / "router" / "paper", parts.paper)
        manifest = {
            "format_version": FORMAT_VERSION,
            "task_type": skeleton.task_type,
            "experts": list(parts.exclusive),
            **settings,
            "files": {
                file.relative_to(root).as_posix(): digest_file(file)
                for file in sorted(root.rglob("*"))
                if file.is_file()
            },
        }
        write_json(root / "twin.json", {**manifest, "sha256": _checksum(manifest)})


class Loaded(NamedTuple):
    """A twin directory's contents. `model` is the transformers model that holds the shared expert."""

    task_type: TaskType
    model: Any
    tokenizer: Any
    parts: Parts


def load_twin(
    directory: Path,
    *,
    dtype: torch.dtype | str | None = None,
    devices: Devices | None = None,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    anew: bool = False,
) -> Loaded:
    """Read a twin directory and verify its checksums.

    Args:
        directory: Written by `save_twin`.
        dtype: The dtype of the shared expert, or its name; by default the one that it is stored in.
        devices: The devices that the shared expert is spread over; by default it is on the CPU.
        quantization: How the shared expert is quantised as it is loaded (see `quantization_config`).
        trust_remote_code: Let transformers run code that comes with the shared expert.
        anew: Read all files for their checksums, also those whose checksums are remembered.

    Raises:
        InputError: There is no twin, its format is newer, a file is missing, edited or damaged, the dtype is unknown,
            the devices do not suit, or the shared expert is quantised and bitsandbytes is missing.
    """
    parts = load_parts(directory, trust_remote_code=trust_remote_code, anew=anew)
    task_type: TaskType = read_manifest(directory)["task_type"]
    folder, chosen, where = directory / "model", known_dtype(dtype), dict[str, Any]()
    config = read_config(folder, trust_remote_code=trust_remote_code)
    quantised = asked_of(folder, config, task_type, quantization, chosen)
    if quantised is not None:
        where["quantization_config"] = quantised
    if devices is not None:
        bits = bits_of(quantised or getattr(config, "quantization_config", None))
        where["device_map"], copies = find_placement(devices, config, task_type, parts.exclusive, chosen, bits=bits)
        where["offload_folder"], parts = devices.offload_folder, replace(parts, copies=copies)
    with quiet_transformers(), offloading(where.get("offload_folder")):
        model = AUTO_MODEL[task_type].from_pretrained(
            folder, dtype=chosen or "auto", trust_remote_code=trust_remote_code, **where
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return Loaded(task_type, model, tokenizer, parts)


def load_parts(directory: Path, *, trust_remote_code: bool = False, anew: bool = False) -> Parts:
    """Read everything in a twin directory except the shared expert, and verify the checksums of all files.

    Args:
        directory: Written by `save_twin`.
        trust_remote_code: Let transformers run code that comes with the shared expert.
        anew: Read all files for their checksums, also those whose checksums are remembered.

    Raises:
        InputError: There is no twin, its format is newer, or a file is missing, edited or damaged.
    """
    manifest = read_manifest(directory)
    verify(directory, manifest, anew=anew)
    config = read_config(directory / "model", trust_remote_code=trust_remote_code)
    skeleton = skeleton_of(config, manifest["task_type"])
    folders = {name: directory / "experts" / name for name in manifest["experts"]}
    return Parts(
        heads={name: load_file(folder / HEAD_FILE) for name, folder in folders.items() if skeleton.head},
        exclusive={name: load_exclusive(folder, skeleton) for name, folder in folders.items()},
        router=load_router(directory / "router"),
        paper=_load_paper(directory / "router" / "paper", manifest),
        max_length=manifest.get("max_length"),
        sensitivity=manifest.get("sensitivity"),
        digests=_part_digests(manifest["files"]),
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the content of a twin directory's twin.json.

    Raises:
        InputError: There is no twin.json, it is damaged, its format is newer, or an expert's name is unsafe.
    """
    file = directory / "twin.json"
    try:
        manifest = json.loads(file.read_bytes())
    except OSError:
        raise InputError(f"{directory}: no twin there (no twin.json); build one with twin-bench build") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{file}: damaged, not JSON ({error}); build the twin again") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{file}: damaged, no JSON object; build the twin again")
    version = manifest.get("format_version")
    if type(version) is not int or version < 1:
        raise InputError(f"{file}: damaged, format_version {version!r} is none; build the twin again")
    if version > FORMAT_VERSION:
        raise InputError(f"{file}: format {version}, this twin-bench reads up to {FORMAT_VERSION}; upgrade twin-bench")
    # Format 1 had no sum of its own. One that has is of a later format, whose number was damaged.
    if (version > 1 or "sha256" in manifest) and manifest.get("sha256") != _checksum(manifest):
        raise InputError(f"{file}: edited or damaged (its own sha256 does not match); build the twin again")
    missing = [key for key in ("task_type", "experts", "files") if key not in manifest]
    if missing:
        raise InputError(f"{file}: damaged, {missing[0]!r} is missing; build the twin again")
    _require_kinds(file, manifest)
    if manifest["task_type"] not in AUTO_MODEL:
        raise InputError(f"{file}: task_type {manifest['task_type']!r}; known: {', '.join(AUTO_MODEL)}")
    for name in manifest["experts"]:
        require_expert_name(name)
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of what twin.json says, but for that sum itself."""
    return digest(json.loads(json.dumps({key: value for key, value in manifest.items() if key != "sha256"})))


def _require_kinds(file: Path, manifest: Mapping[str, Any]) -> None:
    """Raise an InputError for a key of twin.json whose value is of another kind than `save_twin` writes."""

    def texts(values: Any) -> bool:
        return all(isinstance(value, str) for value in values)

    experts, files = manifest["experts"], manifest["files"]
    length, sensitivity, exclusive = (manifest.get(key) for key in ("max_length", "sensitivity", "exclusive"))
    exclusive = {} if exclusive is None else exclusive
    number = type(sensitivity) in (int, float)
    kinds = {
        "task_type": isinstance(manifest["task_type"], str),
        "experts": isinstance(experts, list) and texts(experts) and len(set(experts)) == len(experts),
        "files": isinstance(files, dict) and texts(files.values()),
        "max_length": length is None or (type(length) is int and length > 0),
        "sensitivity": sensitivity is None or (number and 0 <= sensitivity <= sys.float_info.max),
        "exclusive": isinstance(exclusive, dict) and isinstance(exclusive.get("kind", ""), str),
    }
    for key, fits in kinds.items():
        if not fits:
            raise InputError(f"{file}: damaged, {key} is {shown(manifest.get(key))}; build the twin again")
    if "kind" in exclusive and exclusive["kind"] not in known_kinds():
        raise InputError(
            f"{file}: exclusive vectors of kind {shown(exclusive['kind'])}, and this twin-bench reads "
            f"{', '.join(known_kinds())}; upgrade twin-bench"
        )


def verify(directory: Path, manifest: Mapping[str, Any], *, anew: bool = False) -> None:
    """Check that a twin directory has exactly the files that twin.json lists, and that their checksums match.

    Args:
        directory: The twin directory.
        manifest: The content of its twin.json, as `read_manifest` returns it.
        anew: Read all files, also those whose checksums are remembered.

    Raises:
        InputError: A needed file is not listed, a file is not listed but there, or a listed file is missing, edited,
            damaged or outside the directory. The message names the file.
    """
    files: Mapping[str, str] = manifest["files"]
    _require_listed(directory, manifest)
    _require_nothing_else(directory, files)
    for name, checksum in files.items():
        _require_inside(directory, name)
        _require_checksum(directory / name, checksum, anew=anew)


def _require_listed(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise an InputError unless twin.json lists the files of every expert."""
    needed = [
        *exclusive_files(manifest.get("exclusive") or {}),
        *([HEAD_FILE] if manifest["task_type"] == "sequence_classification" else []),
    ]
    for name in (f"experts/{expert}/{file}" for expert in manifest["experts"] for file in needed):
        if name not in manifest["files"]:
            raise InputError(f"{directory / 'twin.json'}: damaged, {name} is not listed; build the twin again")


def _require_nothing_else(directory: Path, files: Mapping[str, str]) -> None:
    """Raise an InputError for a file that twin.json does not list."""
    there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    unlisted = there - files.keys() - {"twin.json"}
    if unlisted:
        raise InputError(f"{directory / min(unlisted)}: not listed in twin.json; remove it, or build the twin again")


def _require_inside(directory: Path, name: str) -> None:
    """Raise an InputError for a file name in twin.json that leads out of the directory."""
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise InputError(f"{directory / 'twin.json'}: file name {name!r} leaves the directory")


def _require_checksum(file: Path, checksum: str, *, anew: bool) -> None:
    """Raise an InputError unless a file exists and has this sha256."""
    if not file.is_file():
        raise InputError(f"{file}: missing; copy the twin again, or build it again")
    try:
        found = known_digest(file, anew=anew)
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error})") from None
    if found != checksum:
        raise InputError(f"{file}: edited or damaged (its sha256 is not the one in twin.json); build the twin again")


def _save_expert(folder: Path, name: str, parts: Parts, skeleton: Skeleton, settings: Mapping[str, Any]) -> None:
    """Write one expert's exclusive vector and, for a classifier, its head."""
    folder.mkdir(parents=True)
    save_exclusive(folder, parts.exclusive[name], settings, skeleton)
    if skeleton.head:
        save_tensors(parts.heads[name], folder / HEAD_FILE)


def _save_paper(folder: Path, paper: PaperParts) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if paper.factors is None:
        save_tensors(paper.biases, folder / "biases.safetensors")
        if paper.left_out:
            flat = {f"{task}/{name}": bias for task, own in paper.left_out.items() for name, bias in own.items()}
            save_tensors(flat, folder / LEFT_OUT_FILE)
    else:
        _save_adapters(paper.factors.adapters, folder / "lora.safetensors")
    if paper.router is not None:
        save_router(folder, paper.router)


def _load_paper(folder: Path, manifest: Mapping[str, Any]) -> PaperParts | None:
    """Return the parts for the protocol paper, or None if the twin was built without them."""
    router = load_router(folder)
    biases = folder / "biases.safetensors"
    if not (folder / "lora.safetensors").is_file() and not biases.is_file():
        return None
    exclusive = parse(ExclusiveSettings, manifest.get("exclusive"), "twin.json: exclusive")
    density, rank = exclusive.truncation
    if not biases.is_file():
        adapters = _load_adapters(folder / "lora.safetensors")
        factors = PaperFactors(adapters, manifest["shared"]["scaling"], density, rank)
        return PaperParts(router=router, factors=factors)
    left_out: dict[str, dict[str, torch.Tensor]] = {}
    if exclusive.from_layer is not None:
        if not (folder / LEFT_OUT_FILE).is_file():
            return None  # of an older version
        for key, bias in load_file(folder / LEFT_OUT_FILE).items():
            task, _, name = key.partition("/")
            left_out.setdefault(task, {})[name] = bias
    return PaperParts(load_file(biases), router, density=density, left_out=left_out)


def _save_adapters(adapters: Mapping[str, AdapterStack], file: Path) -> None:
    tensors = {f"{name}.{side}": getattr(stack, side) for name, stack in adapters.items() for side in ("A", "B")}
    save_tensors({**tensors, **{f"{name}.scale": torch.tensor(stack.scale) for name, stack in adapters.items()}}, file)


def _load_adapters(file: Path) -> dict[str, AdapterStack]:
    stored = load_file(file)
    names = [key.removesuffix(".scale") for key in stored if key.endswith(".scale")]
    return {n: AdapterStack(stored[f"{n}.A"], stored[f"{n}.B"], float(stored[f"{n}.scale"])) for n in names}


def _part_digests(files: Mapping[str, str]) -> dict[str, str]:
    """Return one digest for the shared expert, for every expert and for the router, from their files' checksums."""
    grouped: dict[str, list[str]] = {}
    for name, checksum in sorted(files.items()):
        pieces = Path(name).parts
        part = "/".join(pieces[:2]) if pieces[0] == "experts" else pieces[0]
        grouped.setdefault(part, []).append(f"{name}:{checksum}")
    return {part: hashlib.sha256("\n".join(lines).encode()).hexdigest() for part, lines in grouped.items()}
