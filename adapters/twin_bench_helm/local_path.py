"""HELM's local path: YAML files, each with one list of entries. Entries are added as text, so comments stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from twin_bench.errors import InputError
from twin_bench.files import write_text
from twin_bench.locks import locked

LOCK = ".helm-config.lock"


class Entry(NamedTuple):
    """An entry of one of HELM's files: the file's name, the key of its list, and the entry."""

    file: str
    key: str
    content: dict[str, Any]


def add(entries: Sequence[Entry], local_path: Path, *, replace: bool = False) -> list[Path]:
    """Add entries to HELM's files, and return these. Another process that adds entries waits until this one is done.

    Args:
        entries: the entries, one a file.
        local_path: the folder of the files. It is made if it is missing.
        replace: whether an entry takes the place of the one with its name. Comments inside that one go with it.

    Raises:
        InputError: a name that is taken, or a file that is not HELM's or can't be added to as text. Nothing is written.
    """
    with locked(local_path / LOCK):
        texts = {
            local_path / entry.file: with_entry(_read(local_path / entry.file), entry, local_path / entry.file, replace)
            for entry in entries
        }
        for path, text in texts.items():
            write_text(path, text)
    return list(texts)


def with_entry(text: str, entry: Entry, file: Path, replace: bool) -> str:
    """Return the text of one of HELM's files with an entry added at the end of its list, or put in place of its own.

    `file` is what an InputError names.
    """
    listed, sequence = _listed(text, entry.key, file)
    name = entry.content["name"]
    places = [place for place, other in enumerate(listed) if other.get("name") == name]
    if places and not replace:
        raise InputError(f"{file}: {name} is there already; give another --name, or replace it with --replace")
    if len(places) > 1:
        raise InputError(f"{file}: {name} is there {len(places)} times; remove all but one")
    if sequence is None:
        before, after, expected = _opened(text, entry.key), "", [entry.content]
    elif places:
        start, end = _span(sequence.value[places[0]], text)
        before, after = text[:start], text[end:]
        expected = [*listed[: places[0]], entry.content, *listed[places[0] + 1 :]]
    else:
        before, after, expected = text, "", [*listed, entry.content]
    if before and not before.endswith("\n"):
        before += "\n"
    changed = before + _as_item(entry.content, sequence.start_mark.column if sequence is not None else 0) + after
    if not _holds(changed, {entry.key: expected}):
        raise InputError(f"{file}: can't be added to as text; write its list as lines that begin with '- '")
    return changed


def _listed(text: str, key: str, file: Path) -> tuple[list[dict[str, Any]], yaml.SequenceNode | None]:
    """Return the entries of a file, and the node of their list; None where the list is not there or is empty."""
    try:
        found = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{file}: can't be read ({' '.join(str(error).split())})") from None
    if found is None:
        return [], None
    listed = (found.get(key) or []) if isinstance(found, dict) else None
    if not isinstance(listed, list) or set(found) - {key} or not all(isinstance(entry, dict) for entry in listed):
        raise InputError(f"{file}: expected a list under {key!r} and nothing else; is it HELM's?")
    return listed, root.value[0][1] if root is not None and listed else None


def _opened(text: str, key: str) -> str:
    """Return a text without entries with the key of its list open: comments stay, and an empty value goes."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode) or not root.value:
        end = root.start_mark.index if root is not None else len(text)  # {} or null stand for no file
        kept = text[:end]
        gap = "\n" if kept and not kept.endswith("\n") else ""
        return f"{kept}{gap}{key}:\n"
    value = root.value[0][1]
    return text[: value.start_mark.index].rstrip(" ") + text[value.end_mark.index :]


def _as_item(content: dict[str, Any], column: int) -> str:
    """Return an entry as lines of a list that begins at a column."""
    lines = yaml.safe_dump([content], sort_keys=False, allow_unicode=True, width=10_000).splitlines(keepends=True)
    return "".join(" " * column + line for line in lines)


def _span(item: yaml.Node, text: str) -> tuple[int, int]:
    """Return where the lines of an entry begin and end. Comments and empty lines after it are not part of it."""
    dash = text.rfind("-", 0, item.start_mark.index)
    last = item
    while isinstance(last, yaml.CollectionNode) and last.flow_style is not True and last.value:
        last = last.value[-1][1] if isinstance(last, yaml.MappingNode) else last.value[-1]
    content_end = len(text[: last.end_mark.index].rstrip())
    return text.rfind("\n", 0, dash) + 1, text.find("\n", content_end) + 1 or len(text)


def _holds(text: str, expected: Any) -> bool:
    try:
        return bool(yaml.safe_load(text) == expected)
    except yaml.YAMLError:
        return False


def _read(file: Path) -> str:
    """Return a file's text, an empty one where there is no file."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: can't be read ({error})") from None
