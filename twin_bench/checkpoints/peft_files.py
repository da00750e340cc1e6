"""PEFT's files: low-rank factors written as a LoRA adapter, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.skeleton import Skeleton


def save_adapter(
    folder: Path,
    factors: Mapping[str, Factors],
    skeleton: Skeleton,
    *,
    base_model: str,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Write factors as a PEFT LoRA adapter: W + lora_B lora_A with scale 1.

    A classifier's adapter is on its backbone alone; given a `head`, on the whole classifier, and brings the head.
    """
    from peft import LoraConfig

    head = head or {}
    tensors: dict[str, Tensor] = {f"base_model.model.{name}": tensor for name, tensor in head.items()}
    ranks: dict[str, int] = {}
    for name, (B, A) in factors.items():
        module = name.removeprefix("" if head else _saved_prefix(skeleton)).removesuffix(".weight")
        ranks[module] = A.shape[0]
        if name in skeleton.embeddings:
            tensors[f"base_model.model.{module}.lora_embedding_A"] = B.T
            tensors[f"base_model.model.{module}.lora_embedding_B"] = A.T
        else:
            first, second = (B.T, A.T) if name in skeleton.transposed else (A, B)
            tensors[f"base_model.model.{module}.lora_A.weight"] = first
            tensors[f"base_model.model.{module}.lora_B.weight"] = second
    rank = max(ranks.values(), default=1)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=bool(skeleton.transposed),
        modules_to_save=sorted({name.partition(".")[0] for name in head}) or None,
        base_model_name_or_path=base_model,
        task_type="SEQ_CLS" if head else None if skeleton.head else "CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = sorted(ranks)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    save_tensors(tensors, folder / "adapter_model.safetensors")


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as a safetensors file that transformers and PEFT read."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def load_adapter(folder: Path, skeleton: Skeleton) -> dict[str, Factors]:
    """Return the factors that `save_adapter` wrote, by parameter name."""
    stored = load_file(folder / "adapter_model.safetensors")
    factors: dict[str, Factors] = {}
    for key in stored:
        module, marker, side = key.removeprefix("base_model.model.").partition(".lora_")
        if not marker or "A" not in side:
            continue
        name = f"{_saved_prefix(skeleton)}{module}.weight"
        first, second = (
            stored[key],
            stored[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")],
        )
        transposed = name in skeleton.embeddings or name in skeleton.transposed
        factors[name] = Factors(first.T.contiguous(), second.T.contiguous()) if transposed else Factors(second, first)
    return factors


def _saved_prefix(skeleton: Skeleton) -> str:
    """Return what parameters of model/ lack in their names: a classifier is saved without head, as its backbone."""
    return skeleton.prefix if skeleton.head else ""
