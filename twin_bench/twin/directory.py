"""A twin on disk: an ordinary checkpoint, one PEFT adapter an expert, and a router.

my-twin/
  twin.json            format version, task type, names, settings, a digest of every file
  model/               the shared expert: a Hugging Face checkpoint with its tokenizer (a classifier's without head)
  experts/NAME/        adapter_config.json, adapter_model.safetensors: the factors as a PEFT LoRA adapter on
                       model/ (scale 1); vectors.safetensors: 1-D tensors; head.safetensors: a classifier's head
  router/              config.json, router.safetensors
  router/paper/        for the protocol paper: biases.safetensors of classifiers, lora.safetensors of language models
                       (the experts' own factors), and the authors' router where test rows were given to select it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from twin_bench.checkpoints.dtypes import known_dtype
from twin_bench.checkpoints.peft_files import load_adapter, save_adapter, save_tensors
from twin_bench.checkpoints.skeleton import AUTO_MODEL, Skeleton, quiet_transformers, read_config, skeleton_of
from twin_bench.checkpoints.sources import require_expert_name
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError
from twin_bench.files import digest_file, written_at_once
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.paper import AdapterStack, PaperFactors
from twin_bench.twin.parts import PaperParts, Parts
from twin_bench.twin.router import Router, RouterConfig

FORMAT_VERSION = 1


def save_twin(
    directory: Path, model: Any, tokenizer: Any, parts: Parts, skeleton: Skeleton, settings: Mapping[str, Any]
) -> None:
    """Write a twin; the directory appears whole or not at all.

    Args:
        directory: must not exist yet.
        model: the transformers model that holds the shared expert, untouched by `install`.
        tokenizer: its tokenizer.
        parts: what makes it a twin.
        skeleton: the model's skeleton.
        settings: what twin.json says of how it was built.
    """
    with written_at_once(directory) as root:
        (model.base_model if skeleton.head else model).save_pretrained(root / "model")
        tokenizer.save_pretrained(root / "model")
        for name, exclusive in parts.exclusive.items():
            folder = root / "experts" / name
            folder.mkdir(parents=True)
            save_adapter(folder, exclusive.factors, skeleton, base_model="../../model")
            save_tensors(exclusive.vectors, folder / "vectors.safetensors")
            if skeleton.head:
                save_tensors(parts.heads[name], folder / "head.safetensors")
        if parts.router is not None:
            _save_router(root / "router", parts.router)
        if parts.paper is not None:
            (root / "router" / "paper").mkdir(parents=True, exist_ok=True)
            if parts.paper.factors is None:
                save_tensors(parts.paper.biases, root / "router" / "paper" / "biases.safetensors")
            else:
                _save_adapters(parts.paper.factors.adapters, root / "router" / "paper" / "lora.safetensors")
            if parts.paper.router is not None:
                _save_router(root / "router" / "paper", parts.paper.router)
        files = {
            file.relative_to(root).as_posix(): digest_file(file) for file in sorted(root.rglob("*")) if file.is_file()
        }
        manifest = {
            "format_version": FORMAT_VERSION,
            "task_type": skeleton.task_type,
            "experts": list(parts.exclusive),
            **settings,
            "files": files,
        }
        (root / "twin.json").write_text(json.dumps(manifest, indent=2) + "\n")


class Loaded(NamedTuple):
    """A twin directory's contents: the transformers model that holds the shared expert, and the rest."""

    task_type: TaskType
    model: Any
    tokenizer: Any
    parts: Parts


def load_twin(directory: Path, *, dtype: torch.dtype | str | None = None, trust_remote_code: bool = False) -> Loaded:
    """Read a twin directory, its digests verified.

    Raises:
        InputError: no twin there, a newer format, a file that is missing, edited or damaged, an unknown dtype.
    """
    parts = load_parts(directory, trust_remote_code=trust_remote_code)
    task_type: TaskType = read_manifest(directory)["task_type"]
    with quiet_transformers():
        model = AUTO_MODEL[task_type].from_pretrained(
            directory / "model", dtype=known_dtype(dtype) or "auto", trust_remote_code=trust_remote_code
        )
    tokenizer = AutoTokenizer.from_pretrained(directory / "model", trust_remote_code=trust_remote_code)
    return Loaded(task_type, model, tokenizer, parts)


def load_parts(directory: Path, *, trust_remote_code: bool = False) -> Parts:
    """Read what a twin directory holds beside the shared expert, all digests verified.

    Raises:
        InputError: no twin there, a newer format, a file that is missing, edited or damaged.
    """
    manifest = read_manifest(directory)
    _verify(directory, manifest)
    config = read_config(directory / "model", trust_remote_code=trust_remote_code)
    skeleton = skeleton_of(config, manifest["task_type"])
    folders = {name: directory / "experts" / name for name in manifest["experts"]}
    return Parts(
        heads={name: load_file(folder / "head.safetensors") for name, folder in folders.items() if skeleton.head},
        exclusive={
            name: Exclusive(load_adapter(folder, skeleton), load_file(folder / "vectors.safetensors"))
            for name, folder in folders.items()
        },
        router=_load_router(directory / "router"),
        paper=_load_paper(directory / "router" / "paper", manifest),
        max_length=manifest.get("max_length"),
        sensitivity=manifest.get("sensitivity"),
        digests=_part_digests(manifest["files"]),
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return a twin directory's twin.json, checked for format and names."""
    file = directory / "twin.json"
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
    except OSError:
        raise InputError(f"{directory}: no twin there (no twin.json); build one with twin-bench build") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: damaged, not JSON ({error}); build the twin again") from None
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(f"{file}: format {version}, this twin-bench reads up to {FORMAT_VERSION}; upgrade twin-bench")
    missing = [key for key in ("task_type", "experts", "files") if key not in manifest]
    if missing:
        raise InputError(f"{file}: damaged, {missing[0]!r} is missing; build the twin again")
    if manifest["task_type"] not in AUTO_MODEL:
        raise InputError(f"{file}: task_type {manifest['task_type']!r}; known: {', '.join(AUTO_MODEL)}")
    for name in manifest["experts"]:
        require_expert_name(name)
    return manifest


def _save_router(folder: Path, router: Router) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(router.config), indent=2) + "\n")
    save_tensors(router.state_dict(), folder / "router.safetensors")


def _load_router(folder: Path) -> Router | None:
    if not (folder / "router.safetensors").is_file():
        return None
    settings = json.loads((folder / "config.json").read_text())
    router = Router(RouterConfig(**{**settings, "experts": tuple(settings["experts"])}))
    router.load_state_dict(load_file(folder / "router.safetensors"))
    return router.eval()


def _load_paper(folder: Path, manifest: Mapping[str, Any]) -> PaperParts | None:
    router = _load_router(folder)
    if (folder / "lora.safetensors").is_file():
        limits = manifest["exclusive"]
        adapters = _load_adapters(folder / "lora.safetensors")
        factors = PaperFactors(adapters, manifest["shared"]["scaling"], limits.get("density"), limits.get("rank"))
        return PaperParts(router=router, factors=factors)
    biases = folder / "biases.safetensors"
    return PaperParts(load_file(biases), router) if biases.is_file() else None


def _save_adapters(adapters: Mapping[str, AdapterStack], file: Path) -> None:
    tensors = {f"{name}.{side}": getattr(stack, side) for name, stack in adapters.items() for side in ("A", "B")}
    save_tensors({**tensors, **{f"{name}.scale": torch.tensor(stack.scale) for name, stack in adapters.items()}}, file)


def _load_adapters(file: Path) -> dict[str, AdapterStack]:
    stored = load_file(file)
    names = [key.removesuffix(".scale") for key in stored if key.endswith(".scale")]
    return {n: AdapterStack(stored[f"{n}.A"], stored[f"{n}.B"], float(stored[f"{n}.scale"])) for n in names}


def _verify(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise an InputError unless the files are those that twin.json lists, and are whole."""
    files: Mapping[str, str] = manifest["files"]
    needed = ["adapter_config.json", "adapter_model.safetensors", "vectors.safetensors"]
    if manifest["task_type"] == "sequence_classification":
        needed.append("head.safetensors")
    for name in (f"experts/{expert}/{file}" for expert in manifest["experts"] for file in needed):
        if name not in files:
            raise InputError(f"{directory / 'twin.json'}: damaged, {name} is not listed; build the twin again")
    there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    unlisted = there - files.keys() - {"twin.json"}
    if unlisted:
        raise InputError(f"{directory / min(unlisted)}: not listed in twin.json; remove it, or build the twin again")
    for name, expected in files.items():
        file = directory / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise InputError(f"{directory / 'twin.json'}: file name {name!r} leaves the directory")
        if not file.is_file():
            raise InputError(f"{file}: missing; copy the twin again, or build it again")
        try:
            found = digest_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: can't be read ({error})") from None
        if found != expected:
            raise InputError(
                f"{file}: edited or damaged (its sha256 is not the one in twin.json); build the twin again"
            )


def _part_digests(files: Mapping[str, str]) -> dict[str, str]:
    """Return one digest each for the shared expert, every expert and the router, from their files'."""
    grouped: dict[str, list[str]] = {}
    for name, digest in sorted(files.items()):
        pieces = Path(name).parts
        part = "/".join(pieces[:2]) if pieces[0] == "experts" else pieces[0]
        grouped.setdefault(part, []).append(f"{name}:{digest}")
    return {part: hashlib.sha256("\n".join(lines).encode()).hexdigest() for part, lines in grouped.items()}
