from pathlib import Path

import twin_bench.paths as paths


def test_a_checkout_uses_its_own_tasks():
    root = Path(__file__).resolve().parents[1]
    assert paths.tasks_directory() == root / "tasks"
    assert paths.leaderboards_directory() == root / "leaderboards"


def test_an_installed_package_uses_its_copy_and_not_a_neighbour(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()  # another distribution's
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "twin_bench" / "paths.py"))
    assert paths.tasks_directory() == tmp_path / "twin_bench" / "tasks"
