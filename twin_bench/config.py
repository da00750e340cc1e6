"""Strict YAML: settings whose keys and values are checked, and paths relative to the file that names them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from twin_bench.errors import InputError, first_line, nearest, one_line, shown

Dtype = Literal["float32", "bfloat16", "float16"]
LARGEST_SEED = 2**63 - 1
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
"""The seed of a random generator, a whole number that all of them take."""

LARGEST_YAML = 100_000
"""The largest number of keys and values in a YAML file, with aliases written out. A long text counts as several."""


class Settings(BaseModel):
    """A block of settings in a YAML file. Unknown keys are errors, and settings can't be changed after reading.

    A number is finite, and true and false are no numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where they would be read as 1 and 0."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise InputError("expected a number")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that a value may have: those of a union, without what Annotated adds to them."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return {annotation}


SettingsType = TypeVar("SettingsType", bound=Settings)


def parse(kind: type[SettingsType], raw: Any, source: str = "") -> SettingsType:
    """Return `raw` as settings of `kind`. InputError with the source and the key for the first thing that is wrong."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        # Of a value that may be of several kinds, the kind that fits best has its problem farthest inside.
        first = [other for other in problems if other["loc"][:1] == problems[0]["loc"][:1]]
        problem = max(first, key=lambda other: len(_keys(other["loc"], raw, missing=False)))
        keys = _keys(problem["loc"], raw, missing=problem["type"] == "missing")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key{nearest(keys[-1], _fields(kind, keys[:-1]))}"
        else:  # a value that may be of several kinds has a problem with each of them
            alike = [other for other in problems if _keys(other["loc"], raw, missing=False) == keys] or [problem]
            message = " or: ".join(dict.fromkeys(_said(other["msg"]) for other in alike))
            if not isinstance(problem.get("input", {}), dict):
                message += f" (found {shown(problem['input'])})"
        raise InputError(": ".join(part for part in (source, ".".join(keys), message) if part)) from None


def _said(message: str) -> str:
    """Return pydantic's message without what a user has never heard of: its prefix, and the class of a block."""
    return re.sub(r"dictionary or instance of \w+", "mapping of keys", message.removeprefix("Value error, "))


def replaced(settings: SettingsType, **given: Any) -> SettingsType:
    """Return settings with the values of a command's flags in place of theirs. None leaves a value as it is.

    InputError that names the flag for a value that the key does not take.
    """
    changes = {key: value for key, value in given.items() if value is not None}
    if not changes:
        return settings
    return parse(type(settings), {**settings.model_dump(exclude_unset=True), **changes}, "the command line")


def _keys(place: Sequence[int | str], raw: Any, *, missing: bool) -> list[str]:
    """Return the keys that a user wrote of pydantic's place of an error, which also names types that it tried.

    Args:
        place: pydantic's `loc`.
        raw: what was parsed.
        missing: whether the last part of `place` is a key that is not there.
    """
    keys = []
    for number, part in enumerate(place, start=1):
        if part in raw if isinstance(raw, dict) else isinstance(raw, list) and isinstance(part, int):
            raw = raw[part]
        elif not (missing and number == len(place)):
            continue
        keys.append(str(part))
    return keys


def _fields(kind: type[BaseModel], keys: Sequence[str]) -> list[str]:
    """Return the keys that the block of settings at `keys` has."""
    for key in keys:
        if key in kind.model_fields:
            kind = next(_blocks(kind.model_fields[key].annotation), kind)
    return list(kind.model_fields)


def _blocks(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the kinds of settings in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _blocks(part)


class _Refused(yaml.MarkedYAMLError):
    """YAML that twin-bench does not take."""

    def __init__(self, problem: str, place: yaml.Mark) -> None:
        super().__init__(problem=problem, problem_mark=place)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that stands twice, and also takes 1e-3 as a number, as YAML 1.2 does.

    PyYAML would take the last of several equal keys. To it, 1e-3 is a text, and only 1.0e-3 is a number.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _Refused(f"the key {shown(key.value)} stands twice; remove one", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _size(node, {}) > LARGEST_YAML:
            counted = f"over {LARGEST_YAML:,} keys and values, with aliases written out"
            raise _Refused(f"{counted}; make it shorter", node.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes what `_Loader` would not read as a text."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None),
)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of keys and values in a node, with aliases written out. Each node is visited once."""
    if id(node) not in known:
        known[id(node)] = 0  # for as long as its content is counted
        content = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in content for part in (item if isinstance(item, tuple) else (item,))]
        size = 1 + sum(_size(part, known) for part in parts)
        known[id(node)] = size if isinstance(node, yaml.CollectionNode) else 1 + len(node.value) // 1000
    elif not known[id(node)]:
        raise _Refused("a value that contains itself; write it without the alias", node.start_mark)
    return known[id(node)]


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, with environment variables expanded. InputError that names file and line."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: can't be read ({error})") from None
    try:
        raw = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem if isinstance(error, _Refused) else f"not YAML ({error.problem or error.context})"
        raise InputError(f"{file}{line}: {problem}") from None
    except RecursionError:
        raise InputError(f"{file}: nested too deeply; make it flatter") from None
    except Exception as error:  # of a date that does not exist, or a tag that does not fit, Python's own errors
        raise InputError(f"{file}: not YAML ({first_line(error)})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}: expected a mapping of keys, found {type(raw).__name__}")
    return {str(key): _expanded(value, file) for key, value in raw.items()}


def top_level(file: Path) -> dict[str, str]:
    """Return the keys at the top of a YAML file, with the texts that they have there; of another value, an empty text.

    Tags need not be known. A file that holds no mapping of YAML has no keys.
    """
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return {}
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {str(key.value): value.value if isinstance(value, yaml.ScalarNode) else "" for key, value in pairs}


def as_yaml(value: Any) -> str:
    """Return plain data as YAML of one line, which `read_yaml` reads as the same value unless a text has a $ in it."""
    return yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)[1:-2]


def commented(text: str) -> str:
    """Return a text as the comment that ends a line of YAML; nothing of an empty one."""
    return f"  # {one_line(text)}" if text else ""


def locate(path: Any, file: Path) -> Any:
    """Return `path` relative to the folder of `file` if it exists there, otherwise unchanged."""
    if not isinstance(path, str):
        return path
    beside = file.parent / path
    return str(beside) if os.path.exists(beside) else path  # Path.exists raises an error for a name that is too long


def with_models_located(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a recipe with the paths of base model, experts and plugins located (see `locate`)."""
    if isinstance(raw.get("experts"), dict):
        raw["experts"] = {name: locate(path, file) for name, path in raw["experts"].items()}
    if "base_model" in raw:
        raw["base_model"] = locate(raw["base_model"], file)
    if isinstance(raw.get("plugins"), list):
        raw["plugins"] = [locate(path, file) for path in raw["plugins"]]
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
        raise InputError(f"{file}: {shown(value)} needs the environment variable {name.strip('${}')}; set it")
    return expanded
