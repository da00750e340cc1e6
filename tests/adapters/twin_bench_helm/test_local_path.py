"""HELM's files, edited as text: what stays, what is replaced, and two processes at once."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
import yaml

from twin_bench import InputError
from twin_bench_helm import local_path
from twin_bench_helm.local_path import Entry, add, with_entry

FILE = Path("model_metadata.yaml")
NEW = Entry("model_metadata.yaml", "models", {"name": "new", "tags": ["A"], "release_date": None, "note": "é: x # y"})
COMMENTED = """\
# The models of our group.
models: # each a line
  # the first
  - name: a # by us
    tags: [A, B] # two
    description: |
      long
        text

  # about b
  - name: b
    args:
      deep: 1   # as deep as it gets
  # trailing
# the end
"""


@pytest.mark.parametrize(
    "text",
    [
        COMMENTED,
        COMMENTED.rstrip("\n"),
        "models:\n- name: a\n",
        "models:\n\n- \n  name: a\n",
        "# nothing yet\n",
        "# nothing yet",
        "",
        "models:\n",
        "models: # ours\n# more\n",
        "models: []\n",
        "models: [] # none\n",
        "models: null\n",
        "{}\n",
        "# ours\n---\nmodels:\n- {name: a, tags: [x]}\n",
    ],
)
def test_an_entry_is_added_and_all_else_stays(text: str) -> None:
    before = (yaml.safe_load(text) or {}).get("models") or []
    added = with_entry(text, NEW, FILE, replace=False)
    assert yaml.safe_load(added) == {"models": [*before, NEW.content]}
    if before:
        assert added.startswith(text)
    kept = [line.partition("#")[2] for line in text.splitlines() if "#" in line]
    assert all(f"#{comment}" in added for comment in kept)
    with pytest.raises(InputError, match=r"model_metadata\.yaml: new is there already; .*--replace"):
        with_entry(added, NEW, FILE, replace=False)
    again = with_entry(added, NEW, FILE, replace=True)
    assert again == added


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_replaced_entry_keeps_its_place_and_the_comments_around_it(name: str) -> None:
    entry = Entry(NEW.file, NEW.key, {**NEW.content, "name": name})
    replaced = with_entry(COMMENTED, entry, FILE, replace=True)
    other = next(one for one in yaml.safe_load(COMMENTED)["models"] if one["name"] != name)
    expected = [entry.content, other] if name == "a" else [other, entry.content]
    assert yaml.safe_load(replaced) == {"models": expected}
    for comment in ("# The models", "# each a line", "# the first", "\n\n  # about b\n", "  # trailing\n# the end\n"):
        assert comment in replaced
    assert ("# by us" in replaced) == (name == "b")
    assert ("# as deep" in replaced) == (name == "a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models: [{name: a}]\n", "can't be added to as text; write its list as lines that begin with '- '"),
        ("models:\n- name: new\n- name: new\n", "new is there 2 times"),
        ("models:\n- a\n", "is it HELM's?"),
        ("other:\n- name: a\n", "is it HELM's?"),
        ("models: [\n", "can't be read"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=r"^model_metadata\.yaml: ") as refused:
        with_entry(text, NEW, FILE, replace=True)
    assert says in str(refused.value)


def test_nothing_is_written_where_one_file_refuses(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("- a list\n")
    with pytest.raises(InputError, match=r"b\.yaml"):
        add([Entry("a.yaml", "a", {"name": "x"}), Entry("b.yaml", "b", {"name": "x"})], tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [local_path.LOCK, "b.yaml"]


def test_two_at_once_both_land(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reads the files after the first has written them."""
    write = local_path.write_text
    reading = threading.Event()

    def slow(file: Path, text: str) -> None:
        reading.wait(0.3)  # time in which the other would read what is there
        write(file, text)

    monkeypatch.setattr(local_path, "write_text", slow)
    entries = [Entry("a.yaml", "a", {"name": f"model-{index}"}) for index in range(6)]
    threads = [threading.Thread(target=add, args=([entry], tmp_path)) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = yaml.safe_load((tmp_path / "a.yaml").read_text())["a"]
    assert sorted(entry["name"] for entry in found) == [f"model-{index}" for index in range(6)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [local_path.LOCK, "a.yaml"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    add([Entry("a.yaml", "a", {"name": "x"})], tmp_path)
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == {"a": [{"name": "x"}]}
