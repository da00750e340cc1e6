"""PEFT LoRA adapters: writing low-rank factors as an adapter, and reading them back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from twin_bench.checkpoints.factors import Factors, padded
from twin_bench.checkpoints.finite import require_finite
from twin_bench.checkpoints.hub import on_hub
from twin_bench.checkpoints.skeleton import Skeleton
from twin_bench.compat import import_peft
from twin_bench.data.task import TaskType
from twin_bench.files import read_json, write_json

PREFIX = "base_model.model."
"""The beginning of every name in an adapter's file."""
PEFT_TYPES: dict[TaskType, str] = {
    "sequence_classification": "SEQ_CLS",
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
}
"""PEFT's names of the task types."""


def save_adapter(
    folder: Path,
    factors: Mapping[str, Factors],
    skeleton: Skeleton,
    *,
    base_model: str,
    head: Mapping[str, Tensor] | None = None,
    rank: int | None = None,
) -> None:
    """Write factors as a PEFT LoRA adapter of scale 1: W + lora_B lora_A.

    Args:
        folder: An existing folder inside one of `twin_bench.files.written_at_once`.
        factors: The factors of each adapted matrix, by parameter name.
        skeleton: The base model's skeleton.
        base_model: The base model's name or path, for the adapter's config.
        head: A classifier's head, which the adapter then replaces. Without it a classifier's adapter applies to the
            backbone alone, saved without a head.
        rank: Pads all factors to one rank, which no factor exceeds. The config then has no patterns, which some servers
            do not read. By default each matrix keeps its own rank.
    """
    head = head or {}
    if rank is not None:
        factors = {name: padded(pair, rank) for name, pair in factors.items()}
    prefix = "" if head else _saved_prefix(skeleton)
    ranks: dict[str, int] = {}
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in head.items()}
    for name, pair in factors.items():
        module = name.removeprefix(prefix).removesuffix(".weight")
        ranks[module] = pair.A.shape[0]
        tensors |= {f"{PREFIX}{module}.{key}": tensor for key, tensor in _lora_tensors(name, pair, skeleton).items()}
    _save_config(folder, ranks, skeleton, base_model, head, patterns=rank is None)
    save_tensors(tensors, folder / "adapter_model.safetensors")


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as a safetensors file that transformers and PEFT read.

    The file is not written atomically: it must be inside a folder of `twin_bench.files.written_at_once`. InputError
    that names the file and the tensor if one holds NaN or inf.
    """
    for name, tensor in tensors.items():
        require_finite(tensor, name, f"{file.parent.name}/{file.name}", "correct the expert or the recipe")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def load_adapter(folder: Path, skeleton: Skeleton) -> dict[str, Factors]:
    """Return the factors that `save_adapter` wrote, by parameter name.

    It may have written them under another version of transformers, which has other names for some parameters.
    """
    stored = load_file(folder / "adapter_model.safetensors")
    factors: dict[str, Factors] = {}
    for key in stored:
        module, marker, side = key.removeprefix(PREFIX).partition(".lora_")
        if not marker or "A" not in side:
            continue
        name = skeleton.own_name(f"{_saved_prefix(skeleton)}{module}.weight")
        first = stored[key]
        second = stored[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        if name in skeleton.embeddings or name in skeleton.transposed:
            factors[name] = Factors(first.T.contiguous(), second.T.contiguous())
        else:
            factors[name] = Factors(second, first)
    return factors


def _lora_tensors(name: str, factors: Factors, skeleton: Skeleton) -> dict[str, Tensor]:
    """Return a matrix's factors under PEFT's names. PEFT transposes the product for embeddings and Conv1D weights."""
    B, A = factors
    if name in skeleton.embeddings:
        return {"lora_embedding_A": B.T, "lora_embedding_B": A.T}
    if name in skeleton.transposed:
        return {"lora_A.weight": B.T, "lora_B.weight": A.T}
    return {"lora_A.weight": A, "lora_B.weight": B}


def _save_config(
    folder: Path,
    ranks: Mapping[str, int],
    skeleton: Skeleton,
    base_model: str,
    head: Mapping[str, Tensor],
    *,
    patterns: bool,
) -> None:
    """Write adapter_config.json. alpha = rank makes the scale 1. With `patterns` each matrix has its own rank."""
    import_peft()
    from peft import LoraConfig

    rank = max(ranks.values(), default=1)
    model = on_hub(base_model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=dict(ranks) if patterns else {},
        alpha_pattern=dict(ranks) if patterns else {},
        fan_in_fan_out=bool(skeleton.transposed),
        modules_to_save=sorted({name.partition(".")[0] for name in head}) or None,
        base_model_name_or_path=model.path if model else base_model,
        revision=model.revision if model else None,
        task_type="SEQ_CLS" if head else None if skeleton.head else PEFT_TYPES[skeleton.task_type],
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    # PEFT writes target_modules as a set, whose order differs from run to run.
    settings = {**read_json(folder / "adapter_config.json"), "target_modules": sorted(ranks)}
    write_json(folder / "adapter_config.json", settings)


def _saved_prefix(skeleton: Skeleton) -> str:
    """Return the prefix that names in model/ lack. A classifier is saved without head, as its backbone."""
    return skeleton.prefix if skeleton.head else ""
