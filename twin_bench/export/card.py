"""The README of an export: what it was made of, how it is loaded, and what it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from twin_bench.checkpoints.hub import on_hub
from twin_bench.export.adapters import Adapter
from twin_bench.export.loss import Loss
from twin_bench.export.served import ROUTED, SHARED
from twin_bench.export.stored import StoredTwin


def checkpoint_card(twin: StoredTwin, name: str, weights: Tensor, parameters: int, head: str | None) -> str:
    """Return the model card of a checkpoint that was fused for one vector of weights (experts,)."""
    told = "The tokenizer is the base model's."
    if twin.skeleton.head:
        told = f"The head is that of the expert `{head}`. {told}" if head else f"This is the backbone alone. {told}"
    return (
        f"{front(twin, 'transformers')}# {name}\n\n"
        "The model that a twin (Twin-Merging, arXiv:2406.15479) fuses for one vector of weights, theta_s + sum_t w_t "
        f"v_t, written by twin-bench {version('twin-bench')}. It has no router: every input gets the same weights.\n\n"
        f"- parameters: {parameters:,}\n\n{told}\n\n"
        f"{made_of(twin, {name: weights})}"
    )


def adapters_card(
    twin: StoredTwin, models: Mapping[str, Tensor], adapters: Mapping[str, Adapter], losses: Mapping[str, Loss]
) -> str:
    """Return the README of adapters that PEFT loads."""
    kind = {"sequence_classification": "AutoModelForSequenceClassification", "seq2seq_lm": "AutoModelForSeq2SeqLM"}
    auto, first = kind.get(twin.task_type, "AutoModelForCausalLM"), next(iter(adapters))
    labels = f", num_labels={_labels(twin, first)}" if first in twin.parts.heads else ""
    return (
        f"{front(twin, 'peft')}# Adapters of a twin\n\n"
        "PEFT LoRA adapters on the shared expert of a twin (Twin-Merging, arXiv:2406.15479), which is the twin's "
        f"folder `model`, written by twin-bench {version('twin-bench')}.\n\n"
        f"    base = {auto}.from_pretrained(MODEL{labels})\n"
        f'    model = PeftModel.from_pretrained(base, "{first}")\n\n'
        f"{_lost(adapters, losses)}{made_of(twin, models)}"
    )


def server_card(
    twin: StoredTwin, models: Mapping[str, Tensor], adapters: Mapping[str, Adapter], losses: Mapping[str, Loss]
) -> str:
    """Return the README of what vLLM serves."""
    routed = (
        f"The front offers the twin as `{ROUTED}`. It reads each prompt with the twin's router, and sends the request "
        "on under the name of the nearest adapter (that of the largest weight, where only experts are adapters):\n\n"
        "    pip install 'twin-bench[serve]'\n"
        "    twin-bench serve . --upstream http://127.0.0.1:8000 --port 8001\n\n"
    )
    return (
        f"{front(twin, 'vllm')}# A twin for vLLM\n\n"
        f"The shared expert of a twin (Twin-Merging, arXiv:2406.15479) and LoRA adapters on it, written by twin-bench "
        f"{version('twin-bench')}. vLLM offers the shared expert as `{SHARED}` and each adapter under its name:\n\n"
        f"    ./serve.sh\n\n{routed if twin.parts.router else 'The twin has no router.'}"
        f"{_lost(adapters, losses)}{made_of(twin, models)}"
    )


def _labels(twin: StoredTwin, name: str) -> int:
    head = twin.parts.heads[name]
    return head[twin.skeleton.head_output or min(head)].shape[0]


def _lost(adapters: Mapping[str, Adapter], losses: Mapping[str, Loss]) -> str:
    """Return what the adapters lack, with all names, and what that changes if it was measured."""
    lines = [f"- {name}: {', '.join(one.lost)}\n" for name, one in adapters.items() if one.lost]
    changes = [f"- {name}: {loss}\n" for name, loss in losses.items()]
    lost = f"What the twin has and the adapters lack:\n\n{''.join(lines)}\n" if lines else ""
    return lost + (f"What that changes, measured on given rows:\n\n{''.join(changes)}\n" if changes else "")


def front(twin: StoredTwin, library: str) -> str:
    """Return the front matter of a model card. A base model is named if it is one of the hub's."""
    base = on_hub(str(twin.manifest.get("base_model", "")))
    content: dict[str, Any] = {"library_name": library, "tags": ["merge", "twin-merging", "twin-bench"]}
    if base:
        content["base_model"] = [base.repository]
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n\n"


def made_of(twin: StoredTwin, models: Mapping[str, Tensor]) -> str:
    """Return tables of the models' fusion weights, and of the digest of each part of the twin.

    A local folder is named by the last part of its path, because a card is published. The digests identify the files.
    """
    base = str(twin.manifest.get("base_model", "not known"))
    settings = {key: twin.manifest[key] for key in ("shared", "exclusive", "seed") if key in twin.manifest}
    told = "".join(f"- {key}: {value}\n" for key, value in settings.items())
    header = f"| model | {' | '.join(twin.experts)} |\n| --- |{' ---: |' * len(twin.experts)}\n"
    rows = "".join(f"| {name} | {' | '.join(f'{w:g}' for w in one.tolist())} |\n" for name, one in models.items())
    digests = "".join(f"| {part} | {digest} |\n" for part, digest in twin.parts.digests.items())
    return (
        f"- base model: {Path(base).name if Path(base).is_dir() else base}\n{told}\n{header}{rows}\n"
        f"| part of the twin | sha256 |\n| --- | --- |\n{digests}"
    )
