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
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers import logging as transformers_logging

from twin_bench.checkpoint import AUTO_MODEL, Skeleton, TaskType, read_config, skeleton
from twin_bench.errors import InputError
from twin_bench.twin.exclusive import Exclusive, Factors
from twin_bench.twin.model import PaperParts, Parts
from twin_bench.twin.router import Router, RouterConfig
from twin_bench.twin.separate import LoraStack, SeparateParts

FORMAT_VERSION = 1
EXPERT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def save_twin(
    directory: Path, model: Any, tokenizer: Any, parts: Parts, bones: Skeleton, settings: Mapping[str, Any]
) -> None:
    """Write a twin; the directory appears whole or not at all.

    Args:
        directory: must not exist yet.
        model: the transformers model that holds the shared expert, untouched by `install`.
        tokenizer: its tokenizer.
        parts: what makes it a twin.
        bones: the model's skeleton.
        settings: what twin.json says of how it was built.
    """
    with written_at_once(directory) as root:
        (model.base_model if bones.head else model).save_pretrained(root / "model")
        tokenizer.save_pretrained(root / "model")
        for name, exclusive in parts.exclusive.items():
            folder = root / "experts" / name
            folder.mkdir(parents=True)
            save_adapter(folder, exclusive.factors, bones, base_model="../../model")
            _save(exclusive.vectors, folder / "vectors.safetensors")
            if bones.head:
                _save(parts.heads[name], folder / "head.safetensors")
        if parts.router is not None:
            _save_router(root / "router", parts.router)
        if parts.paper is not None:
            (root / "router" / "paper").mkdir(parents=True, exist_ok=True)
            if parts.paper.separate is None:
                _save(parts.paper.biases, root / "router" / "paper" / "biases.safetensors")
            else:
                _save_adapters(parts.paper.separate.adapters, root / "router" / "paper" / "lora.safetensors")
            if parts.paper.router is not None:
                _save_router(root / "router" / "paper", parts.paper.router)
        files = {file.relative_to(root).as_posix(): _digest(file) for file in sorted(root.rglob("*")) if file.is_file()}
        manifest = {
            "format_version": FORMAT_VERSION,
            "task_type": bones.task_type,
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
    bones = skeleton(config, manifest["task_type"])
    folders = {name: directory / "experts" / name for name in manifest["experts"]}
    return Parts(
        heads={name: load_file(folder / "head.safetensors") for name, folder in folders.items() if bones.head},
        exclusive={
            name: Exclusive(_load_adapter(folder, bones), load_file(folder / "vectors.safetensors"))
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


def require_expert_name(name: str) -> None:
    """Raise an InputError unless `name` is safe as a folder and a module name."""
    if not EXPERT_NAME.fullmatch(name):
        raise InputError(f"expert name {name!r}: use letters, digits, - and _ only")
    if hasattr(nn.ModuleDict, name):
        raise InputError(f"expert name {name!r} is torch's own for something else; rename the expert")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' word that a head is new: twins bring their own."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


@contextmanager
def written_at_once(directory: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes `directory` at the end, or nothing does."""
    if directory.exists():
        raise InputError(f"{directory}: exists already; give another name, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield partial
        partial.chmod(0o755)
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_adapter(
    folder: Path,
    factors: Mapping[str, Factors],
    bones: Skeleton,
    *,
    base_model: str,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Write factors as a PEFT LoRA adapter: W + lora_B lora_A with scale 1.

    A classifier's adapter is on its backbone alone; given a `head`, on the whole classifier, and brings the head.
    """
    from peft import LoraConfig

    head = head or {}
    tensors: dict[str, Tensor] = {f"base_model.model.{name}": tensor for name, tensor in head.items()}
    ranks: dict[str, int] = {}
    for name, (B, A) in factors.items():
        module = name.removeprefix("" if head else _saved_prefix(bones)).removesuffix(".weight")
        ranks[module] = A.shape[0]
        if name in bones.embeddings:
            tensors[f"base_model.model.{module}.lora_embedding_A"] = B.T
            tensors[f"base_model.model.{module}.lora_embedding_B"] = A.T
        else:
            first, second = (B.T, A.T) if name in bones.transposed else (A, B)
            tensors[f"base_model.model.{module}.lora_A.weight"] = first
            tensors[f"base_model.model.{module}.lora_B.weight"] = second
    rank = max(ranks.values(), default=1)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=bool(bones.transposed),
        modules_to_save=sorted({name.partition(".")[0] for name in head}) or None,
        base_model_name_or_path=base_model,
        task_type="SEQ_CLS" if head else None if bones.head else "CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = sorted(ranks)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    _save(tensors, folder / "adapter_model.safetensors")


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _load_adapter(folder: Path, bones: Skeleton) -> dict[str, Factors]:
    stored = load_file(folder / "adapter_model.safetensors")
    factors: dict[str, Factors] = {}
    for key in stored:
        module, marker, side = key.removeprefix("base_model.model.").partition(".lora_")
        if not marker or "A" not in side:
            continue
        name = f"{_saved_prefix(bones)}{module}.weight"
        first, second = (
            stored[key],
            stored[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")],
        )
        turned = name in bones.embeddings or name in bones.transposed
        factors[name] = Factors(first.T.contiguous(), second.T.contiguous()) if turned else Factors(second, first)
    return factors


def _saved_prefix(bones: Skeleton) -> str:
    """Return what parameters of model/ lack in their names: a classifier is saved without head, as its backbone."""
    return bones.prefix if bones.head else ""


def _save_router(folder: Path, router: Router) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(router.config), indent=2) + "\n")
    _save(router.state_dict(), folder / "router.safetensors")


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
        separate = SeparateParts(adapters, manifest["shared"]["scaling"], limits.get("density"), limits.get("rank"))
        return PaperParts(router=router, separate=separate)
    biases = folder / "biases.safetensors"
    return PaperParts(load_file(biases), router) if biases.is_file() else None


def _save_adapters(adapters: Mapping[str, LoraStack], file: Path) -> None:
    tensors = {f"{name}.{side}": getattr(stack, side) for name, stack in adapters.items() for side in ("A", "B")}
    _save({**tensors, **{f"{name}.scale": torch.tensor(stack.scale) for name, stack in adapters.items()}}, file)


def _load_adapters(file: Path) -> dict[str, LoraStack]:
    stored = load_file(file)
    names = [key.removesuffix(".scale") for key in stored if key.endswith(".scale")]
    return {n: LoraStack(stored[f"{n}.A"], stored[f"{n}.B"], float(stored[f"{n}.scale"])) for n in names}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def known_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype named, None for `auto`; InputError for a name that is none."""
    if dtype in (None, "auto") or isinstance(dtype, torch.dtype):
        return None if isinstance(dtype, str) else dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {dtype!r}: known: float32, bfloat16, float16, auto")
    return found


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
            found = _digest(file)
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
