"""Strict YAML: settings whose keys and values are checked, and paths relative to the file that names them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from twin_bench.errors import InputError, nearest

Dtype = Literal["float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """A block of settings in a YAML file. Unknown keys are errors, and settings can't be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SettingsType = TypeVar("SettingsType", bound=Settings)


def parse(kind: type[SettingsType], raw: Any, source: str) -> SettingsType:
    """Return `raw` as settings of `kind`. InputError with the source and the key for the first thing that is wrong."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            fields: Any = kind
            for part in (part for part in problem["loc"][:-1] if not isinstance(part, int)):
                annotation = fields.model_fields[part].annotation
                candidates = [annotation, *getattr(annotation, "__args__", ())]
                fields = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
            message = f"unknown key{nearest(str(problem['loc'][-1]), fields.model_fields)}"
        elif "input" in problem and not isinstance(problem["input"], dict):
            message += f" (found {problem['input']!r})"
        raise InputError(f"{source}: {key}: {message}" if key else f"{source}: {message}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, with environment variables expanded. InputError that names file and line."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: can't be read ({error})") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}: expected a mapping of keys, found {type(raw).__name__}")
    return {str(key): _expanded(value, file) for key, value in raw.items()}


def locate(path: Any, file: Path) -> Any:
    """Return `path` relative to the folder of `file` if it exists there, otherwise unchanged."""
    beside = file.parent / path if isinstance(path, str) else None
    return str(beside) if beside is not None and beside.exists() else path


def with_models_located(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a recipe with the paths of base model and experts located (see `locate`)."""
    if isinstance(raw.get("experts"), dict):
        raw["experts"] = {name: locate(path, file) for name, path in raw["experts"].items()}
    if "base_model" in raw:
        raw["base_model"] = locate(raw["base_model"], file)
    return raw


def _expanded(value: Any, file: Path) -> Any:
    if isinstance(value, dict):
        return {key: _expanded(item, file) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, file) for item in value]
    if not isinstance(value, str):
        return value
    expanded = os.path.expandvars(value)
    if "$" in expanded:
        name = expanded[expanded.index("$") :].split("/")[0]
        raise InputError(f"{file}: {value!r} needs the environment variable {name.strip('${}')}; set it")
    return expanded
