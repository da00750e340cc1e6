"""What vLLM serves: the shared expert, LoRA adapters in ranks that vLLM takes, and the command line."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from twin_bench.checkpoints.peft_files import save_adapter
from twin_bench.checkpoints.skeleton import context_window, meta_model
from twin_bench.errors import UnsuitedError
from twin_bench.export.adapters import Refused, adapters_of, require_rank, told
from twin_bench.export.card import server_card
from twin_bench.export.loss import measured_loss
from twin_bench.export.registry import export_format
from twin_bench.export.selection import Selection
from twin_bench.export.served import ROUTED, SHARED, Served, write_served
from twin_bench.export.stored import StoredTwin
from twin_bench.files import write_text
from twin_bench.twin.routers.store import save_router

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's --max-lora-rank, without 1."""


@export_format(title="the shared expert, adapters and a command line for vLLM, and the router for a front")
def vllm(
    twin: StoredTwin, asked: Selection, root: Path, *, leave_out: bool = False, data: Path | None = None
) -> list[str]:
    """model/, an adapter for each model in adapters/NAME, router/, serving.json, and serve.sh.

    An adapter's matrices all have one rank, the smallest that vLLM takes and that holds them; what is added is 0.
    `leave_out` and `data` are those of the format peft.
    """
    if twin.task_type != "causal_lm":
        raise UnsuitedError(f"format vllm: it serves causal language models, not {twin.task_type}; use peft or hf")
    models, refused = asked.models(twin.experts), _refused(twin)
    adapters = adapters_of(twin, models, refused, leave_out=leave_out)
    for name, adapter in adapters.items():
        require_rank(adapter, name, RANKS[-1], "vLLM")
    losses = measured_loss(twin, models, refused, data) if data else {}
    shutil.copytree(twin.model, root / "model")
    ranks = {name: _held_by(adapter.rank) for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        folder = root / "adapters" / name
        folder.mkdir(parents=True)
        save_adapter(folder, adapter.factors, twin.skeleton, base_model="../../model", rank=ranks[name])
    _save_front(twin, models, root)
    write_text(root / "serve.sh", _script(ranks))
    (root / "serve.sh").chmod(0o755)
    write_text(root / "README.md", server_card(twin, models, adapters, losses))
    lines = [f"{len(adapters)} adapters of rank {max(ranks.values())} at most; serve.sh starts vLLM"]
    lines += [f"{name}: left out: {told(adapter.lost)}" for name, adapter in adapters.items() if adapter.lost]
    return lines + [f"{name}: {loss}" for name, loss in losses.items()]


def _save_front(twin: StoredTwin, models: Mapping[str, Tensor], root: Path) -> None:
    if twin.parts.router is not None:
        save_router(root / "router", twin.parts.router)
    length = twin.parts.max_length or context_window(twin.config)
    adapters = {name: tuple(weights.tolist()) for name, weights in models.items()}
    write_served(root, Served(experts=twin.experts, adapters=adapters, max_length=length))


def _held_by(rank: int) -> int:
    return next(one for one in RANKS if one >= rank)


def _script(ranks: Mapping[str, int]) -> str:
    """Return serve.sh, which starts vLLM with every adapter under its own name."""
    adapters = " ".join(f"{name}=adapters/{name}" for name in ranks)
    return (
        "#!/bin/sh\n"
        "# Starts vLLM with the shared expert and the adapters. Further arguments are vLLM's own.\n"
        f"# The twin itself, {ROUTED}, is offered by its front: twin-bench serve, see README.md.\n"
        'cd "$(dirname "$0")" || exit 1\n'
        f"exec vllm serve model --served-model-name {SHARED} --host 127.0.0.1 --port 8000 \\\n"
        f"  --enable-lora --max-loras {len(ranks)} --max-lora-rank {max(ranks.values())} \\\n"
        f'  --lora-modules {adapters} "$@"\n'
    )


def _refused(twin: StoredTwin) -> Refused:
    """Return why vLLM can't serve a change of a matrix: it takes adapters on the blocks' nn.Linear layers alone."""
    model = meta_model(twin.config, twin.task_type, num_labels=2)

    def refused(name: str) -> str | None:
        layer = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, nn.Embedding):
            return "an embedding, which vLLM takes no adapter on"
        if layer is model.get_output_embeddings():
            return "the output layer, which vLLM takes no adapter on"
        return None if isinstance(layer, nn.Linear) else f"a layer of the class {type(layer).__name__}"

    return refused
