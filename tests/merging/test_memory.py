"""What a merge to disk holds in memory: a few tensors, never whole models."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from tests.support.interpreter import python, side_by_side
from tests.support.models import tiny_causal_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's counters are Linux's"),
]
EXPERTS = ("a", "b", "c", "d")
STREAMED = [
    *("average", "task_arithmetic", "ties", "dare_task_arithmetic", "dare_ties", "model_stock", "lines"),
    *("breadcrumbs", "della", "consensus", "pcb", "tsv_m", "iso_c", "iso_cts", "knots"),
]


BUFFERS = 4 << 20  # bytes that BLAS and LAPACK keep: another processor's took 2.5 MB more for the same decomposition


class Sizes(NamedTuple):
    """In bytes: the largest tensor in float32, and all five models as they are stored."""

    largest: int
    family: int


def save_family(root: Path, *, width: int, layers: int) -> Sizes:
    """Save a sharded bfloat16 language model and four experts; the largest matrices are (width, width)."""
    shape = {"hidden_size": width, "intermediate_size": width // 4, "vocab_size": width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**shape, **heads, tie_word_embeddings=True, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    tiny_causal_tokenizer().save_pretrained(root / "base")
    for name in ("base", *EXPERTS):
        model.save_pretrained(root / name, max_shard_size=8 * width * width)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    assert len(list((root / "base").glob("*.safetensors"))) > 1
    stored = sum(file.stat().st_size for file in root.rglob("*.safetensors"))
    return Sizes(max(4 * parameter.numel() for parameter in model.parameters()), stored)


def peaks(root: Path, width: int, merges: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Return what each method took above the interpreter's own; not of methods that four experts don't suit."""
    recipe = {"base_model": str(root / "base"), "experts": {name: str(root / name) for name in EXPERTS}}

    def half(start: int) -> dict[str, dict[str, int] | None]:
        """Measure every other merge in a process of its own."""
        arguments = [json.dumps(recipe), str(root / "out"), str(width), json.dumps(merges[start::2])]
        # One thread, and tensors freed at once: the allocator's own reserves are not what is measured.
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        done = python("-m", "tests.support.peak_memory", *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first, second = side_by_side(partial(half, 0), partial(half, 1))
    measured = first | second
    return {merge["method"]: peak for merge in merges if (peak := measured[merge["method"]])}


def test_a_merge_holds_twice_its_largest_stack_of_tensors(tmp_path: Path) -> None:
    """Peak anonymous memory stays below 2 x the largest tensor x (T + 2), and the libraries' own buffers.

    The experts are of full rank, so that whoever decomposes matrices decomposes them whole. The largest matrices are
    square: where such a one is the largest, KnOTS' m x m basis of a tall matrix and WUDI's n x n Gram matrix of a wide
    one do not fit in (23 and 18 for 1 to 4). Nor does a decomposition, some 7 tensors, with fewer experts (9.5 for
    two, where the limit is 8).
    """
    width = 1024
    sizes = save_family(tmp_path, width=width, layers=2)
    limit = 2 * sizes.largest * (len(EXPERTS) + 2)
    assert limit + BUFFERS < sizes.family  # less than the models themselves take
    measured = peaks(tmp_path, width, [{"method": method} for method in STREAMED] + [{"method": "wudi", "steps": 3}])
    mapped = (len(EXPERTS) + 1) * sizes.largest // 2  # of every model a bfloat16 tensor
    assert len(measured) == len(STREAMED) + 1
    for method, peak in measured.items():
        assert sizes.largest < peak["anonymous"] < limit + BUFFERS, method
        assert peak["total"] < limit + BUFFERS + 1.25 * mapped, (
            method
        )  # a loaded machine drops read pages of files later
