"""Locks: what is left of them, and what another user's killed process has left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from twin_bench.errors import InputError
from twin_bench.locks import written_by_one


@pytest.fixture
def another_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that leaves the lock's file of another user, who lets others read it or not."""
    real = os.open

    def leave(*, readable: bool) -> Path:
        file = tmp_path / ".twin.twin-bench-writer"
        file.touch()

        def opened(path: Any, flags: int, *more: Any) -> int:
            if Path(path) == file and (flags & os.O_RDWR or not readable):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, flags, *more)

        monkeypatch.setattr(os, "open", opened)
        return file

    return leave


def test_another_user_s_killed_writer_does_not_refuse_the_next(tmp_path: Path, another_s: Any) -> None:
    file = another_s(readable=True)
    with written_by_one(tmp_path / "twin"), pytest.raises(InputError, match="another process writes it now"):  # noqa: SIM117
        with written_by_one(tmp_path / "twin"):
            pass
    assert not file.exists()


def test_a_lock_that_cannot_be_opened_is_named(tmp_path: Path, another_s: Any) -> None:
    file = another_s(readable=False)
    with pytest.raises(InputError, match="can't be opened; remove it if nobody writes there") as refused:
        written_by_one(tmp_path / "twin").__enter__()
    assert str(file) in str(refused.value)


def test_a_lock_that_cannot_be_removed_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "unlink", refused)
    with written_by_one(tmp_path / "twin"):
        pass
    with written_by_one(tmp_path / "twin"):  # what is left is taken
        pass


def test_folders_that_a_writer_made_stay_where_they_are_used(tmp_path: Path) -> None:
    with written_by_one(tmp_path / "new/er/twin"):
        assert (tmp_path / "new/er").is_dir()
    assert not list(tmp_path.iterdir())
    with written_by_one(tmp_path / "new/er/twin"):
        (tmp_path / "new/er/twin").mkdir()
    assert [path.name for path in (tmp_path / "new/er").iterdir()] == ["twin"]
