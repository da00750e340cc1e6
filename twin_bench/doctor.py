"""twin-bench doctor: what is installed, what works, and what to do about what does not.

Each check is a function that returns findings and prints nothing. No check imports a harness or an adapter: what those
bring is read from the metadata of the installed packages, since importing lm-eval takes some 15 seconds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from twin_bench.errors import InputError, first_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from twin_bench.twin.parts import Parts

SUMMARY = "say what is installed, what works, and what to do about what does not; check a twin"

REQUIRED = ("twin-bench", "torch", "transformers", "peft", "pandas")
OPTIONAL = ("lm-eval", "crfm-helm", "datasets", "accelerate")
"""What only the harnesses need: lm-eval brings datasets and accelerate with it."""

HELM_PLUGINS_SINCE = "0.5.12"
LM_EVAL_ADAPTER = "twin_bench_lm_eval"
AUTOLOAD = f"{LM_EVAL_ADAPTER}._autoload"
"""What the .pth file imports at an interpreter's start, and nobody else does."""

PLUGIN_GROUPS = ("twin_bench.commands", "twin_bench.harnesses", "twin_bench.methods")
"""The entry-point groups through which the library finds its own parts and other people's plugins."""

FOLDERS = {
    "TWIN_BENCH_DATA": "lm-eval tasks read their rows from the Hugging Face hub, and suites that name it can't run",
    "TWIN_BENCH_EXPERTS": "suites that name it can't run",
    "TWIN_BENCH_CACHE": "builds keep no router features, and models of packages are in ~/.cache/twin-bench",
}
"""The environment variables that name folders, and what holds where they are not set."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    `mark` is ok, note (it works with less, or nothing is asked of it) or problem; `remedy` is what to do about it.
    """

    mark: Literal["ok", "note", "problem"]
    says: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.mark:8} {self.says}" + (f": {self.remedy}" if self.remedy else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "twin",
        metavar="TWIN",
        nargs="?",
        type=Path,
        help="also check the twin in this folder, its files' checksums too",
    )


def run(options: argparse.Namespace) -> None:
    """Print all findings; InputError where the twin that was named is damaged. Nothing else is an error."""
    problems = 0
    for title, check in checks(os.environ, options.twin):
        print(title, flush=True)
        for finding in check():
            print(f"  {finding}", flush=True)
            problems += finding.mark == "problem"
    print(f"{problems or 'no'} problem{'' if problems == 1 else 's'}")


def checks(
    variables: Mapping[str, str], twin_directory: Path | None = None
) -> Iterator[tuple[str, Callable[[], list[Finding]]]]:
    """Yield the checks in the order they are printed, each with its title."""
    yield "packages", packages
    yield "plugins", plugins
    yield "lm-eval", lambda: lm_eval(variables, hooked=AUTOLOAD in sys.modules)
    yield "HELM", helm
    yield "Inspect", inspect_ai
    yield "device", device
    yield "fast paths", fast_paths
    yield "environment", lambda: environment(variables)
    if twin_directory is not None:
        yield f"twin {twin_directory}", lambda: twin(twin_directory)


def packages() -> list[Finding]:
    """Return each package's version, and how to get those that are missing or too old."""
    wanted = _requirements()
    return [_package(name, wanted.get(name), name in REQUIRED) for name in (*REQUIRED, *OPTIONAL)]


def plugins() -> list[Finding]:
    """Return the plugins that are installed, by entry-point group; a group that is empty is an outdated install."""
    findings = []
    for group in PLUGIN_GROUPS:
        names = sorted({point.name for point in entry_points(group=group)})
        if names:
            findings.append(Finding("ok", f"{group}: {', '.join(names)}"))
        else:
            says = f"no entry point of group {group} is installed: the installation is older than the code"
            findings.append(Finding("problem", says, "install twin-bench again"))
    return findings


def lm_eval(variables: Mapping[str, str], *, hooked: bool) -> list[Finding]:
    """Return whether `lm_eval --model twin_merged` finds the plugin.

    Args:
        variables: the environment's.
        hooked: whether twin_bench_lm_eval.pth has run in this interpreter.
    """
    found = _version("lm-eval")
    if found is None:
        return [Finding("note", "lm-eval is not installed, so lm_eval --model twin_merged can't run")]
    again = "install twin-bench again"
    if _lm_eval_loads_plugins():
        if any(point.name == "twin_merged" for point in entry_points(group="lm_eval.models")):
            return [Finding("ok", f"lm-eval {found} finds twin_merged through its entry point")]
        return [Finding("problem", f"lm-eval {found} does not find twin_merged, whose entry point is missing", again)]
    if hooked:
        return [Finding("ok", f"lm-eval {found} loads no plugins; twin_bench_lm_eval.pth registers twin_merged in it")]
    if variables.get("TWIN_BENCH_NO_AUTOLOAD"):
        says = f"lm-eval {found} does not know twin_merged, because TWIN_BENCH_NO_AUTOLOAD is set"
        return [Finding("note", says, "unset it to use lm_eval --model twin_merged")]
    says = f"lm-eval {found} does not know twin_merged, because twin_bench_lm_eval.pth did not run"
    return [Finding("problem", says, f"{again}, and start Python without -S")]


def helm() -> list[Finding]:
    """Return whether HELM loads the plugin."""
    found = _version("crfm-helm")
    if found is None:
        return [Finding("note", "HELM is not installed, so helm-run can't serve twins")]
    if _numbers(found) < _numbers(HELM_PLUGINS_SINCE):
        says = f"crfm-helm {found} loads no plugins, which came with {HELM_PLUGINS_SINCE}"
        return [Finding("problem", says, "pip install 'crfm-helm>=0.5.16'")]
    if not any(point.name == "twin_bench" for point in entry_points(group="helm")):
        says = f"crfm-helm {found} does not find twin-bench, whose entry point is missing"
        return [Finding("problem", says, "install twin-bench again")]
    return [Finding("ok", f"crfm-helm {found} finds twin-bench through its entry point")]


def inspect_ai() -> list[Finding]:
    """Return whether Inspect AI finds the plugin."""
    found = _version("inspect-ai")
    if found is None:
        says = "Inspect is not installed, so inspect eval can't serve twins"
        return [Finding("note", says, "pip install 'twin-bench[inspect]', in an environment without HELM")]
    if not any(point.name == "twin_bench" for point in entry_points(group="inspect_ai")):
        says = f"inspect-ai {found} does not find twin-bench, whose entry point is missing"
        return [Finding("problem", says, "install twin-bench again")]
    return [Finding("ok", f"inspect-ai {found} finds twin-bench through its entry point")]


def device() -> list[Finding]:
    """Return the devices that twins can run on, the fastest kind that is here."""
    try:
        import torch
    except Exception as error:
        return [Finding("problem", f"torch can't be imported ({first_line(error)})", "install it again: pytorch.org")]
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [
            Finding("ok", f"cuda:{index}, {card.name}, {card.total_memory / 2**30:.1f} GiB of memory")
            for index, card in enumerate(cards)
        ]
    if torch.backends.mps.is_available():
        return [Finding("ok", "mps, Apple's GPU")]
    findings = [Finding("ok", f"cpu, {torch.get_num_threads()} threads")]
    if torch.version.cuda:
        says = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and no GPU can be used"
        findings.append(Finding("note", says, "if there is one, nvidia-smi says what is wrong"))
    elif torch.version.hip is None and shutil.which("nvidia-smi"):
        says = f"an NVIDIA driver is here, and torch {torch.__version__} is built for the CPU"
        findings.append(Finding("note", says, "install a CUDA build of torch, as pytorch.org says, to use the GPU"))
    return findings


def fast_paths() -> list[Finding]:
    """Return which fast paths the installed transformers allows, and whether it can be imported at all."""
    broken = _broken_torchvision()
    if broken:
        return [broken]
    try:
        from transformers.models.llama.modeling_llama import LlamaForCausalLM

        from twin_bench.compat import cache_argument
    except Exception as error:
        says = f"transformers can't be imported ({first_line(error)})"
        return [Finding("problem", says, "install it again: pip install --force-reinstall --no-deps transformers")]
    forward = LlamaForCausalLM.forward
    return allowed_paths(cache_argument(forward), "logits_to_keep" in inspect.signature(forward).parameters)


def allowed_paths(cache: str | None, takes_logits_to_keep: bool) -> list[Finding]:
    """Return what transformers' Llama allows; `cache` is the name under which it takes keys and values, if any."""
    owner = f"Llama in transformers {_version('transformers')}"
    findings = []
    if cache:
        findings.append(Finding("ok", f"prompts that begin alike share one pass ({owner} takes {cache})"))
    else:
        says = f"prompts that begin alike are each run whole ({owner} takes no keys and values)"
        findings.append(Finding("note", says, "results stay the same, only slower"))
    if takes_logits_to_keep:
        findings.append(
            Finding("ok", f"only the logits that are asked for are computed ({owner} takes logits_to_keep)")
        )
    else:
        says = f"the logits of all tokens are computed, which takes memory ({owner} takes no logits_to_keep)"
        findings.append(Finding("note", says, "a smaller batch size helps"))
    return findings


def environment(variables: Mapping[str, str]) -> list[Finding]:
    """Return what the environment variables say, and whether the folders that they name are there."""
    findings = [_folder(name, variables.get(name, ""), unset) for name, unset in FOLDERS.items()]
    if variables.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        says = "HF_HUB_OFFLINE is set, so nothing is downloaded"
        findings.append(Finding("note", says, "unset it where a model or data set is missing"))
    else:
        findings.append(Finding("ok", "HF_HUB_OFFLINE is not set, so missing models and data sets are downloaded"))
    return findings


KINDS = {
    "causal_lm": "a language model",
    "seq2seq_lm": "an encoder-decoder",
    "sequence_classification": "a classifier",
}
"""What a twin of each task type is."""


def twin(directory: Path) -> list[Finding]:
    """Return what a twin is made of and what it can do, once all its files' checksums are verified.

    Raises:
        InputError: no twin there, a newer format, a file that is missing, edited or damaged, a torch or transformers
            that can't be imported.
    """
    try:
        from twin_bench.twin.directory import load_parts, read_manifest
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{directory}: can't be checked; see the problems above ({first_line(error)})") from None

    manifest = read_manifest(directory)
    parts = load_parts(directory, anew=True)
    kind = KINDS[manifest["task_type"]]
    experts = ", ".join(manifest["experts"]) or "none, it is a static merge"
    return [
        Finding("ok", f"the checksums of its {len(manifest['files'])} files match"),
        Finding(
            "ok",
            f"format {manifest['format_version']}, {kind}, built by twin-bench {manifest.get('twin_bench', '?')}",
        ),
        Finding("ok", f"experts: {experts}"),
        Finding("ok", f"protocols: {', '.join(protocols(manifest['task_type'], parts))}"),
        _router(manifest, parts),
        _sensitivity(parts),
    ]


def protocols(task_type: str, parts: Parts) -> list[str]:
    """Return the protocols that a twin of these parts serves."""
    headless, paper = task_type != "sequence_classification", parts.paper
    has_paper = paper is not None and (paper.factors is not None or not headless)
    routed = headless or (parts.router is not None and parts.router.config.threshold is None)
    served = {"standard": True, "paper": has_paper or not parts.exclusive, "routed": routed}
    return [name for name, serves in served.items() if serves]


def _router(manifest: Mapping[str, Any], parts: Parts) -> Finding:
    if parts.router is None:
        return Finding("note", "it has no router", "give fusion weights yourself, or routing=task")
    layer, chosen = parts.router.config.layer, manifest.get("router") or {}
    says = f"its router reads layer {layer}"
    if "accuracy" in chosen:
        rows = chosen.get("report_rows", chosen["selection_rows"])  # an older twin's were those that chose it
        says += f", and names the right task for {chosen['accuracy']:.1%} of {rows} held-out rows"
    return Finding("ok", says)


def _sensitivity(parts: Parts) -> Finding:
    if parts.sensitivity is None:
        return Finding("note", "its sensitivity was not measured, so it takes no tolerance", "build it with a router")
    return Finding("ok", f"sensitivity {parts.sensitivity:.3g}: a tolerance can be given")


def _package(name: str, wanted: Requirement | None, required: bool) -> Finding:
    found = _version(name)
    extras = f"[{','.join(sorted(wanted.extras))}]" if wanted and wanted.extras else ""
    specifier = f"{extras}{wanted.specifier}" if wanted else ""
    install = f"pip install '{name}{specifier}'" if specifier else f"pip install {name}"
    if found is None:
        return Finding("problem" if required else "note", f"{name} is not installed", install)
    if wanted and not wanted.specifier.contains(found, prereleases=True):
        return Finding("problem", f"{name} {found} is not {wanted.specifier}, which twin-bench needs", install)
    return Finding("ok", f"{name} {found}")


def _requirements() -> dict[str, Requirement]:
    """Return what twin-bench's metadata says of the packages that it needs, by name; of extras as well."""
    try:
        from packaging.requirements import Requirement

        found = [Requirement(line) for line in requires("twin-bench") or ()]
    except (ImportError, PackageNotFoundError):
        return {}
    return {requirement.name: requirement for requirement in found if requirement.name != "twin-bench"}


def _lm_eval_loads_plugins() -> bool:
    """Return whether the installed lm-eval looks for entry points: in its source, as importing it takes long."""
    spec = importlib.util.find_spec("lm_eval")
    folders = spec.submodule_search_locations if spec else None
    files = [Path(folder) / "api" / "registry.py" for folder in folders or ()]
    return any(file.is_file() and "def load_plugins" in file.read_text(encoding="utf-8") for file in files)


def _broken_torchvision() -> Finding | None:
    """Return the problem of a torchvision that does not load, which keeps transformers from loading, or None."""
    found = _version("torchvision")
    if found is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        says = f"torchvision {found} does not load beside torch {_version('torch')} ({first_line(error)})"
        remedy = "pip uninstall torchvision, as transformers imports it and twin-bench does not need it"
        return Finding("problem", says, remedy)
    return None


def _folder(name: str, value: str, unset: str) -> Finding:
    """Return what a variable that names a folder says."""
    if not value:
        return Finding("note", f"{name} is not set: {unset}")
    if Path(value).is_dir():
        return Finding("ok", f"{name} is {value}")
    if name == "TWIN_BENCH_CACHE" and not Path(value).exists():
        return Finding("ok", f"{name} is {value}, which is made when it is needed")
    return Finding("problem", f"{name} is {value}, which is no folder", "make it, name another, or unset the variable")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """Return the first three numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
