"""What `helm-run` reads to know a twin by name: an entry in each of three YAML files. Imports no HELM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from twin_bench.checkpoints.skeleton import context_window, read_config
from twin_bench.config import parse
from twin_bench.errors import InputError
from twin_bench.serving.settings import TwinSettings
from twin_bench.twin.causal import NOT_CAUSAL
from twin_bench.twin.directory import load_parts, read_manifest
from twin_bench_helm.compat import require_plugins
from twin_bench_helm.local_path import Entry, add
from twin_bench_helm.prompts import surrounding_tokens

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
    replace: bool = False,
    **further: Any,
) -> list[Path]:
    """Add a twin to HELM's model_deployments.yaml, model_metadata.yaml and tokenizer_configs.yaml; return the files.

    The twin's files are verified first, so that what HELM could not serve is not written down.

    Args:
        twin: a twin directory of language models.
        name: HELM knows the twin as `twin_merged/NAME` then.
        local_path: HELM's local path (prod_env by default). Other entries and comments in its files stay.
        device: where the twin runs; by default the fastest device there is, which `auto` names too.
        dtype: what it computes in: float32, bfloat16 or float16; by default its own.
        protocol: standard, paper or routed.
        tolerance: of the logits, relative to their size; by default 6e-8 in float32.
        batch_size: the largest number of rows in a forward.
        apply_chat_template: ask prompts as a user's turn of the tokenizer's chat template.
        replace: replace the entries of that name, if there are any.
        **further: compile, and device_map, max_memory, offload_folder and quantization of `TwinModel.from_pretrained`.

    Raises:
        InputError: a setting out of range, no language model's twin there, a damaged one, or one that can't serve the
            settings; a name that is taken; a file that is not HELM's; a HELM that is too old. Nothing is written.
    """
    require_plugins()
    given = {
        "device": device,
        "dtype": dtype,
        "protocol": protocol,
        "tolerance": tolerance,
        "batch_size": batch_size,
        **further,
    }
    settings = parse(TwinSettings, given, "helm-config")
    if not NAME.fullmatch(name):
        raise InputError(f"name {name!r}: letters, digits, '-', '_' and '.' only")
    manifest = _served(twin, settings)
    model = (twin / "model").resolve()
    tokenizer = AutoTokenizer.from_pretrained(model)
    window = _window(twin, manifest, surrounding_tokens(tokenizer, templated=apply_chat_template))
    full = f"twin_merged/{name}"
    client = {"twin": str(twin.resolve()), **settings.model_dump(), "apply_chat_template": apply_chat_template}
    try:
        metadata = metadata_entry(full, manifest, settings)
    except (KeyError, TypeError) as error:
        raise InputError(f"{twin / 'twin.json'}: damaged ({error}); build the twin again") from None
    entries = [metadata, tokenizer_entry(full, model, tokenizer), deployment_entry(full, window, client)]
    return add(entries, local_path, replace=replace)


def _window(twin: Path, manifest: Mapping[str, Any], surrounding: int) -> int:
    """Return how many tokens of a prompt and its completion fit beside those that surround a prompt."""
    window: int = (manifest.get("max_length") or context_window(read_config(twin / "model"))) - surrounding
    if window < 1:
        raise InputError(f"{twin}: its window has no room beside the tokens of its chat template")
    return window


def _served(twin: Path, settings: TwinSettings) -> dict[str, Any]:
    """Return what twin.json holds. Raise an InputError for a twin that can't be served with these settings."""
    manifest = read_manifest(twin)
    if manifest["task_type"] != "causal_lm":
        raise InputError(f"{twin}: {NOT_CAUSAL[manifest['task_type']]}, which is what HELM asks for")
    parts = load_parts(twin)
    if not parts.exclusive:
        return manifest
    router = parts.router
    if settings.protocol == "paper":
        if parts.paper is None or parts.paper.factors is None:
            raise InputError(
                f"{twin}: can't serve protocol paper, which needs LoRA experts of one rank on the same matrices and "
                "shared: task_arithmetic; take --protocol standard, or build it so"
            )
        router = parts.paper.router
    if router is None:
        raise InputError(f"{twin}: has no router for protocol {settings.protocol}; build it again, with router: data")
    if settings.tolerance and parts.sensitivity is None:
        raise InputError(
            f"{twin}: --tolerance {settings.tolerance} needs its sensitivity; build it again, with a router"
        )
    return manifest


def metadata_entry(full: str, manifest: Mapping[str, Any], settings: TwinSettings) -> Entry:
    """Return what HELM shows of a model: `full` is twin_merged/NAME, `manifest` what twin.json holds."""
    content = {
        "name": full,
        "display_name": full.partition("/")[2],
        "description": _description(manifest, settings),
        "creator_organization_name": "twin-bench",
        "access": "open",
        "num_parameters": sum(manifest["parameters"].values()),
        "release_date": None,
        "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"],
    }
    return Entry("model_metadata.yaml", "models", content)


def _description(manifest: Mapping[str, Any], settings: TwinSettings) -> str:
    """Return what a twin is made of and how it runs, in one line."""
    rank = ", ".join(f"{limit} {value}" for limit, value in manifest["exclusive"].items())
    router = manifest["router"]
    if settings.protocol == "paper" and router:
        router = router["paper"]
    routed = f"router on layer {router['layer']}" if router else "no router"
    if router and router.get("top_k"):
        routed += f" with its {router['top_k']} largest weights"
    tolerance = "default" if settings.tolerance is None else settings.tolerance
    return (
        f"Twin-merged model of {', '.join(manifest['experts'])}: shared expert by {manifest['shared']['method']}, "
        f"exclusive vectors of {rank}, {routed}, tolerance {tolerance}, protocol {settings.protocol}."
    )


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
