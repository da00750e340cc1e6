"""PEFT LoRA adapters on the shared expert."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from twin_bench.checkpoints.peft_files import save_adapter
from twin_bench.checkpoints.skeleton import meta_model
from twin_bench.export.adapters import Refused, adapters_of, told
from twin_bench.export.card import adapters_card
from twin_bench.export.loss import measured_loss
from twin_bench.export.registry import export_format
from twin_bench.export.selection import Selection
from twin_bench.export.stored import StoredTwin
from twin_bench.files import write_text


@export_format(title="a PEFT LoRA adapter for each expert, on the twin's model/")
def peft(
    twin: StoredTwin,
    asked: Selection,
    root: Path,
    *,
    pad_ranks: bool = False,
    leave_out: bool = False,
    data: Path | None = None,
) -> list[str]:
    """W + lora_B lora_A of each changed matrix, with scale 1, and of a classifier the expert's head.

    `pad_ranks` pads all matrices with zeros to the largest rank of all adapters. `leave_out` leaves out what an adapter
    can't hold; `data` measures on rows what that changes. A mixture of experts has the sum of their ranks, and no head.
    """
    models, refused = asked.models(twin.experts), _refused(twin)
    adapters = adapters_of(twin, models, refused, leave_out=leave_out)
    losses = measured_loss(twin, models, refused, data) if data else {}
    rank = max(adapter.rank for adapter in adapters.values()) if pad_ranks else None
    lines = [f"{len(adapters)} adapters on {twin.model}"]
    for name, adapter in adapters.items():
        (root / name).mkdir()
        head, base = twin.parts.heads.get(name, {}), str(twin.model.resolve())
        save_adapter(root / name, adapter.factors, twin.skeleton, base_model=base, head=head, rank=rank)
        lines += [f"{name}: left out: {told(adapter.lost)}"] if adapter.lost else []
        lines += [f"{name}: {losses[name]}"] if name in losses else []
    write_text(root / "README.md", adapters_card(twin, models, adapters, losses))
    return lines


def _refused(twin: StoredTwin) -> Refused:
    """Return why PEFT's LoRA can't express a change of a matrix.

    PEFT changes what an embedding looks up, and not another layer that has the same table. It calls an embedding with
    tokens, and knows nothing of classes that compute ids or multiply the result themselves.
    """
    skeleton = twin.skeleton
    tied = {first: name for name, first in skeleton.tied.items() if name not in skeleton.backbone}
    model = meta_model(twin.config, twin.task_type, num_labels=2)

    def refused(name: str) -> str | None:
        if name in tied:
            return f"a table that {tied[name]} shares"
        if name in skeleton.embeddings:
            kind = type(model.get_submodule(name.removesuffix(".weight")))
            return None if kind is nn.Embedding else f"an embedding of the class {kind.__name__}"
        return None

    return refused
