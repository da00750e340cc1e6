"""The experts in a folder: what each is, and what its own files say of its labels and its base model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from twin_bench.checkpoints.sources import expert_task_type, require_expert_names
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError
from twin_bench.files import read_json

ADAPTER, FULL, TWIN = "adapter_config.json", "config.json", "twin.json"
BASE_NAMES = ("base", "base_model", "base-model")
"""The names of a folder that holds the base model, if no adapter names it."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class FoundExpert:
    """An expert on disk. `labels` are its config's id2label in the order of the ids, and empty for an adapter."""

    name: str
    folder: Path
    is_adapter: bool
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """The experts of a folder, which are all of one kind, and their base model: a path or a hub id.

    `left_out` says of other models there why they are no experts.
    """

    kind: TaskType
    base_model: str
    experts: tuple[FoundExpert, ...]
    left_out: Mapping[str, str]


def find_experts(folder: Path, *, kind: TaskType | None = None, base_model: str | None = None) -> Found:
    """Find the experts in a folder.

    Args:
        folder: its subfolders, and theirs where they are no models, are looked at.
        kind: models of another kind are left out. By default all have to be of one kind.
        base_model: a path or a hub id. By default what all adapters name, or a folder that is called base.

    Raises:
        InputError: no experts, experts of two kinds, or no one base model.
    """
    models = _named(_model_folders(folder))
    base = base_model or _base_model(folder, models)
    own = {n: path for n, path in models.items() if not (Path(base).is_dir() and path.samefile(base))}
    kinds, left_out = dict[str, TaskType](), dict[str, str]()
    for name, path in own.items():
        try:
            kinds[name] = _kind(name, path, base, kind)
        except InputError as error:
            if (path / ADAPTER).is_file():
                raise
            left_out[name] = str(error)  # a checkpoint of another architecture, such as a second base model
    if kind is None:
        _require_one_kind(kinds)
    asked = kind or next(iter(kinds.values()), None)
    left_out |= {name: f"a {other} model" for name, other in kinds.items() if other != asked}
    experts = [_expert(name, own[name]) for name in own if kinds.get(name) == asked]
    if not experts or asked is None:
        said = "".join(f"; {name} is left out: {why}" for name, why in left_out.items())
        raise InputError(
            f"{folder}: no experts; expected folders with {ADAPTER} or {FULL}, in it or one level below{said}"
        )
    require_expert_names(expert.name for expert in experts)
    return Found(asked, base, tuple(experts), left_out)


def _model_folders(folder: Path) -> list[Path]:
    """Return the folders that hold a model, but for those of a twin."""
    found = []
    for child in _subfolders(folder):
        if _is_model(child):
            found.append(child)
        elif not (child / TWIN).is_file():
            found += filter(_is_model, _subfolders(child))
    return found


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the one that holds the experts")
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER, FULL))


def _named(folders: Iterable[Path]) -> dict[str, Path]:
    """Return folders by names that an expert can have. Folders of one name have their parent's before it."""
    folders = list(folders)
    times = Counter(path.name for path in folders)
    names = [path.name if times[path.name] == 1 else f"{path.parent.name}-{path.name}" for path in folders]
    return {re.sub(r"[^A-Za-z0-9_-]", "-", name): path for name, path in zip(names, folders, strict=True)}


def _base_model(folder: Path, models: Mapping[str, Path]) -> str:
    """Return the base model that all adapters name, or else the folder that is called base."""
    named = {
        name: str(said)
        for name, path in models.items()
        if (path / ADAPTER).is_file() and (said := read_json(path / ADAPTER).get("base_model_name_or_path"))
    }
    remedy = "name it: --base-model MODEL"
    if len(set(named.values())) > 1:
        listed = ", ".join(f"{name} on {said}" for name, said in named.items())
        raise InputError(f"{folder}: the adapters are on different base models: {listed}; {remedy}")
    if not named:
        base = next((str(path) for name, path in models.items() if name.lower() in BASE_NAMES), None)
        if base is None and models:
            raise InputError(
                f"{folder}: no adapter says what its base model is, and no folder is called base; {remedy}"
            )
        return base or ""
    said = next(iter(named.values()))
    for path in (folder / said, folder.parent / said, Path(said)):
        if path.is_dir():
            return str(path)
    moved = next((str(path) for path in models.values() if path.name == Path(said).name), None)
    if moved is None and not HUB_ID.fullmatch(said):
        raise InputError(f"{folder}: the adapters are on {said}, which is not there; {remedy}")
    return moved or said


def _kind(name: str, path: Path, base: str, asked: TaskType | None) -> TaskType:
    """Return the kind of an expert. An adapter that does not say it is of the base model's, or of the one asked for."""
    adapter, config = path / ADAPTER, Path(base) / FULL
    if adapter.is_file() and read_json(adapter).get("task_type") is None:
        if asked is not None:
            return asked
        if not config.is_file():
            raise InputError(
                f"{adapter}: it has no task_type, and the base model {base} is no folder; give --classifier or "
                "--causal-lm"
            )
        return expert_task_type(name, path, SimpleNamespace(architectures=read_json(config).get("architectures")))
    return expert_task_type(name, path, None)


def _require_one_kind(kinds: Mapping[str, TaskType]) -> None:
    first = next(iter(kinds), "")
    for name, kind in kinds.items():
        if kind != kinds[first]:
            raise InputError(
                f"experts of two kinds: {first} is a {kinds[first]} model and {name} a {kind} one; give --classifier "
                "or --causal-lm, or the folder of one kind: --experts FOLDER"
            )


def _expert(name: str, path: Path) -> FoundExpert:
    if (path / ADAPTER).is_file():
        return FoundExpert(name, path, is_adapter=True, labels=())
    said = read_json(path / FULL).get("id2label")
    if not isinstance(said, dict):
        said = {"0": "LABEL_0", "1": "LABEL_1"}  # transformers does not write what it takes where nothing is said
    labels = tuple(str(said[key]) for key in sorted(said, key=lambda key: int(key) if key.isdecimal() else 0))
    return FoundExpert(name, path, is_adapter=False, labels=labels)
