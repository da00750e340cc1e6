"""What `helm-run` reads to know a twin by name: three YAML files in its local path. Imports no harness."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import yaml

from twin_bench.checkpoints.skeleton import context_window, read_config
from twin_bench.errors import InputError
from twin_bench.files import write_text
from twin_bench.twin.directory import read_manifest

PLUGINS_SINCE = (0, 5, 12)
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def write_helm_config(
    twin: Path,
    name: str,
    local_path: Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    protocol: str = "standard",
    tolerance: float | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
) -> list[Path]:
    """Add a twin to HELM's model_deployments.yaml, model_metadata.yaml and tokenizer_configs.yaml.

    Args:
        twin: a twin directory of language models.
        name: it is `twin_merged/NAME` then.
        local_path: HELM's (prod_env by default); other entries in the files stay.
        device: where it runs; by default a GPU if there is one.
        dtype: what it runs in; by default its own.
        protocol: standard, paper or routed.
        tolerance: of the logits, relative to their size; by default 0 in float32.
        batch_size: requests a forward.
        apply_chat_template: ask prompts as a user's turn of the tokenizer's chat template.

    Raises:
        InputError: no language model's twin there, a name that is taken, a file that is not HELM's.
    """
    from transformers import AutoTokenizer

    _require_plugins()
    manifest = read_manifest(twin)
    if manifest["task_type"] != "causal_lm":
        raise InputError(f"{twin}: a classifier twin does not generate text, which is what HELM asks for")
    if not NAME.fullmatch(name):
        raise InputError(f"name {name!r}: letters, digits, '-', '_' and '.' only")
    full, model = f"twin_merged/{name}", (twin / "model").resolve()
    tokenizer = AutoTokenizer.from_pretrained(model)
    window = manifest.get("max_length") or context_window(read_config(model))
    window -= len(tokenizer("")["input_ids"])  # HELM counts without the tokens that a tokenizer puts around a text
    end = tokenizer.eos_token or ""
    arguments = {
        "twin": str(twin.resolve()),
        "device": device,
        "dtype": dtype,
        "protocol": protocol,
        "tolerance": tolerance,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
    }
    entries: dict[str, tuple[str, dict[str, Any]]] = {
        "model_metadata.yaml": (
            "models",
            {
                "name": full,
                "display_name": name,
                "description": f"Twin-merged model of {', '.join(manifest['experts'])}, protocol {protocol}.",
                "creator_organization_name": "twin-bench",
                "access": "open",
                "num_parameters": sum(manifest["parameters"].values()),
                "release_date": None,
                "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"],
            },
        ),
        "tokenizer_configs.yaml": (
            "tokenizer_configs",
            {
                "name": full,
                "tokenizer_spec": {
                    "class_name": "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
                    "args": {"pretrained_model_name_or_path": str(model)},
                },
                "end_of_text_token": end,
                "prefix_token": tokenizer.bos_token or end,
            },
        ),
        "model_deployments.yaml": (
            "model_deployments",
            {
                "name": full,
                "model_name": full,
                "tokenizer_name": full,
                "max_sequence_length": window,
                "max_sequence_and_generated_tokens_length": window,
                "client_spec": {
                    "class_name": "twin_bench_helm.client.TwinClient",
                    "args": {key: value for key, value in arguments.items() if value is not None},
                },
            },
        ),
    }
    written: dict[Path, str] = {}
    for file, (key, entry) in entries.items():
        path = local_path / file
        listed = _listed(path, key)
        if any(other.get("name") == full for other in listed):
            raise InputError(f"{path}: {full} is there already; give another --name, or remove it")
        written[path] = yaml.safe_dump({key: [*listed, entry]}, sort_keys=False)
    for path, text in written.items():
        write_text(path, text)
    return list(written)


def _require_plugins() -> None:
    """Raise an InputError where the HELM of this environment is older than its plugins, which came with 0.5.12."""
    try:
        found = importlib.metadata.version("crfm-helm")
    except importlib.metadata.PackageNotFoundError:
        return  # helm-run may be in another environment
    if tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < PLUGINS_SINCE:
        wanted = ".".join(map(str, PLUGINS_SINCE))
        raise InputError(
            f"crfm-helm {found} takes no plugins, which came with {wanted}: pip install 'crfm-helm>=0.5.16'"
        )


def _listed(path: Path, key: str) -> list[dict[str, Any]]:
    """Return the entries of one of HELM's files, none where there is no file."""
    if not path.is_file():
        return []
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: can't be read ({' '.join(str(error).split())})") from None
    listed = found.get(key) or [] if isinstance(found, dict) else None
    if not isinstance(listed, list) or set(found) - {key}:
        raise InputError(f"{path}: expected a list under {key!r} and nothing else; is it HELM's?")
    return listed
