"""What `helm-run` reads to know a twin by name: three YAML files in its local path. Imports no HELM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import AutoTokenizer

from twin_bench.checkpoints.skeleton import context_window, read_config
from twin_bench.errors import InputError
from twin_bench.files import write_text
from twin_bench.twin.directory import read_manifest
from twin_bench_helm.compat import require_plugins

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Entry(NamedTuple):
    """An entry of one of HELM's files: the file's name, the key of its list, and the entry."""

    file: str
    key: str
    content: dict[str, Any]


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
    """Add a twin to HELM's model_deployments.yaml, model_metadata.yaml and tokenizer_configs.yaml; return the files.

    Args:
        twin: a twin directory of language models.
        name: HELM knows the twin as `twin_merged/NAME` then.
        local_path: HELM's (prod_env by default); other entries in the files stay.
        device: where it runs; by default a GPU if there is one.
        dtype: what it runs in; by default its own.
        protocol: standard, paper or routed.
        tolerance: of the logits, relative to their size; by default 0 in float32.
        batch_size: requests a forward.
        apply_chat_template: ask prompts as a user's turn of the tokenizer's chat template.

    Raises:
        InputError: no language model's twin there, a name that is taken, a file that is not HELM's, a HELM
            that is too old.
    """
    require_plugins()
    manifest = read_manifest(twin)
    if manifest["task_type"] != "causal_lm":
        raise InputError(f"{twin}: a classifier twin does not generate text, which is what HELM asks for")
    if not NAME.fullmatch(name):
        raise InputError(f"name {name!r}: letters, digits, '-', '_' and '.' only")
    client = {
        "twin": str(twin.resolve()),
        "device": device,
        "dtype": dtype,
        "protocol": protocol,
        "tolerance": tolerance,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
    }
    model = (twin / "model").resolve()
    tokenizer = AutoTokenizer.from_pretrained(model)
    window = manifest.get("max_length") or context_window(read_config(model))
    window -= len(tokenizer("")["input_ids"])  # HELM counts without the tokens that a tokenizer puts around a text
    full = f"twin_merged/{name}"
    return _add(
        [
            metadata_entry(full, manifest, protocol),
            tokenizer_entry(full, model, tokenizer),
            deployment_entry(full, window, client),
        ],
        local_path,
    )


def metadata_entry(full: str, manifest: Mapping[str, Any], protocol: str) -> Entry:
    """Return what HELM shows of a model: `full` is twin_merged/NAME, `manifest` what twin.json holds."""
    content = {
        "name": full,
        "display_name": full.partition("/")[2],
        "description": f"Twin-merged model of {', '.join(manifest['experts'])}, protocol {protocol}.",
        "creator_organization_name": "twin-bench",
        "access": "open",
        "num_parameters": sum(manifest["parameters"].values()),
        "release_date": None,
        "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"],
    }
    return Entry("model_metadata.yaml", "models", content)


def tokenizer_entry(full: str, model: Path, tokenizer: Any) -> Entry:
    """Return how HELM makes a model's tokenizer: from the folder `model`, where `tokenizer` comes from too."""
    end = tokenizer.eos_token or ""
    content = {
        "name": full,
        "tokenizer_spec": {
            "class_name": "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
            "args": {"pretrained_model_name_or_path": str(model)},
        },
        "end_of_text_token": end,
        "prefix_token": tokenizer.bos_token or end,
    }
    return Entry("tokenizer_configs.yaml", "tokenizer_configs", content)


def deployment_entry(full: str, window: int, client: Mapping[str, Any]) -> Entry:
    """Return how HELM runs a model: at most `window` tokens, by `TwinClient` with the arguments that are not None."""
    content = {
        "name": full,
        "model_name": full,
        "tokenizer_name": full,
        "max_sequence_length": window,
        "max_sequence_and_generated_tokens_length": window,
        "client_spec": {
            "class_name": "twin_bench_helm.client.TwinClient",
            "args": {key: value for key, value in client.items() if value is not None},
        },
    }
    return Entry("model_deployments.yaml", "model_deployments", content)


def _add(entries: list[Entry], local_path: Path) -> list[Path]:
    """Add entries to HELM's files and return these; InputError, and nothing written, where one does not fit in."""
    texts: dict[Path, str] = {}
    for entry in entries:
        path = local_path / entry.file
        listed = _listed(path, entry.key)
        name = entry.content["name"]
        if any(other.get("name") == name for other in listed):
            raise InputError(f"{path}: {name} is there already; give another --name, or remove it")
        texts[path] = yaml.safe_dump({entry.key: [*listed, entry.content]}, sort_keys=False)
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def _listed(path: Path, key: str) -> list[dict[str, Any]]:
    """Return the entries of one of HELM's files, none where there is no file."""
    if not path.is_file():
        return []
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: can't be read ({' '.join(str(error).split())})") from None
    listed = found.get(key) or [] if isinstance(found, dict) else None
    if not isinstance(listed, list) or set(found) - {key} or not all(isinstance(entry, dict) for entry in listed):
        raise InputError(f"{path}: expected a list under {key!r} and nothing else; is it HELM's?")
    return listed
