"""PEFT's mixed batch: the experts of a twin as adapters of one model, of which each row uses one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twin_bench.compat import import_peft
from twin_bench.twin.model import TwinModel


def mixed_adapters(directory: Path, kind: Any, twin: TwinModel) -> Any:
    """Return the model of a twin directory with all experts' adapters, on the device and in the dtype of its twin.

    Args:
        directory: the twin directory.
        kind: transformers' class that loads the model.
        twin: the twin of that directory.
    """
    import_peft()
    from peft import PeftModel

    model = kind.from_pretrained(directory / "model", dtype=twin.model.dtype).to(twin.device)
    first, *others = twin.expert_names
    adapted: Any = PeftModel.from_pretrained(model, str(directory / "experts" / first), adapter_name=first)
    for name in others:
        adapted.load_adapter(str(directory / "experts" / name), adapter_name=name)
    return adapted.eval()
