"""Measure a large build: a random Llama-shaped base model, and experts that are full checkpoints or LoRA adapters.

    python examples/large_build.py WORK --tokenizer FOLDER --billions 7 [--blocks 5] --full 0 --adapters 8 [--workers 2]

It writes the models to WORK, builds a twin of each kind of experts there, and prints a line of JSON for each: seconds,
peak memory, the bytes that were read and written, and how fast the disk wrote and read in the same run. With --blocks a
model has fewer blocks than its size says: matrices are as large, and there are fewer of them. The models take
(1 + FULL) * 2 bytes a parameter on the disk. A twin takes twice as much as one model besides, until it is written, and
is removed after it was measured. It runs on Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.peft_files import save_adapter
from twin_bench.checkpoints.skeleton import Skeleton, skeleton_of
from twin_bench.checkpoints.stream import Layout, ordered, write_sharded
from twin_bench.files import written_at_once
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe

SHAPES = {
    1.3: (2048, 24, 16, 16, 5504),
    3.0: (3200, 26, 32, 32, 8640),
    7.0: (4096, 32, 32, 32, 11008),
    70.0: (8192, 80, 64, 8, 28672),
}
"""Billions of parameters: width, blocks, heads, heads of keys and values, and the width of the MLP."""
RANK = 16
STATUS = Path("/proc/self/status")


def config_of(billions: float, blocks: int | None) -> LlamaConfig:
    """Return the config of a Llama of about so many parameters, with a vocabulary of 32,000, or of fewer blocks."""
    width, depth, heads, pairs, inner = SHAPES[billions]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks or depth,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def write_model(directory: Path, skeleton: Skeleton, config: LlamaConfig, tokenizer: Any, seed: int) -> None:
    """Write a random checkpoint, tensor by tensor. Models of other seeds differ by a tenth of the base's size."""
    layouts = {name: Layout(torch.bfloat16, shape) for name, shape in skeleton.backbone.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number, name in enumerate(ordered(layouts)):
            tensor = drawn(layouts[name].shape, number)
            if seed:
                tensor += 0.1 * drawn(layouts[name].shape, number + 10**6 * seed)
            yield name, tensor.to(torch.bfloat16)

    with written_at_once(directory) as root:
        write_sharded(root, layouts, tensors())
        config.save_pretrained(root)
        tokenizer.save_pretrained(root)


def write_adapter(directory: Path, skeleton: Skeleton, base: Path, seed: int) -> None:
    """Write a random LoRA adapter of rank 16 on every matrix of the blocks."""
    matrices = {name: shape for name, shape in skeleton.backbone.items() if "layers." in name and len(shape) == 2}
    factors = {
        name: Factors(drawn(torch.Size((shape[0], RANK)), seed), drawn(torch.Size((RANK, shape[1])), seed + 1))
        for name, shape in matrices.items()
    }
    with written_at_once(directory) as root:
        save_adapter(root, factors, skeleton, base_model=str(base))


def drawn(shape: torch.Size, seed: int) -> Tensor:
    """Return normal numbers of size 0.02."""
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def disk_speed(directory: Path, size: int = 2**30) -> dict[str, float]:
    """Return how many bytes a second the disk writes (flushed) and reads (dropped from the cache before)."""
    file, block = directory / "speed", os.urandom(2**24)
    started = time.perf_counter()
    with file.open("wb") as stream:
        for _ in range(size // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    written = time.perf_counter() - started
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while stream.read(len(block)):
            pass
    read = time.perf_counter() - started
    file.unlink()
    return {"write": size / written, "read": size / read}


class PeakMemory:
    """The largest anonymous memory of this process in a block, read every 5 ms.

    The pages of mapped files are left out: they are the page cache's, and the system takes them back when it needs to.
    """

    def __enter__(self) -> PeakMemory:
        """Begin."""
        self.bytes, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.005):
            told = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
            self.bytes = max(self.bytes, 1024 * int(told.split()[1]))


def out_of_the_cache(directory: Path) -> None:
    """Have the system forget what it has cached of a folder's files, so that they are read from the disk."""
    for file in (one for one in directory.rglob("*") if one.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cpu_seconds() -> float:
    """Return the processor time of this process and of those that it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def io_bytes() -> tuple[int, int]:
    """Return the bytes that this process has read from the disk and written to it. Workers' do not count."""
    told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(told["read_bytes"]), int(told["write_bytes"])


def measured(name: str, recipe: dict[str, Any], work: Path, workers: int) -> dict[str, Any]:
    """Build a twin without router, and return what it took. The twin is removed."""
    out_of_the_cache(work)
    before, started, used = io_bytes(), time.perf_counter(), cpu_seconds()
    with PeakMemory() as peak:
        settings = build_twin(Recipe.model_validate(recipe), work / f"twin-{name}", resumable=True, workers=workers)
    seconds, used, after = time.perf_counter() - started, cpu_seconds() - used, io_bytes()
    shutil.rmtree(work / f"twin-{name}")
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # resident, with the pages of mapped files
    return {
        "experts": name,
        "parameters": settings["parameters"],
        "seconds": round(seconds, 1),
        "processor_seconds": round(used, 1),
        "peak_bytes": peak.bytes,
        "read_bytes": after[0] - before[0],
        "written_bytes": after[1] - before[1],
        "workers": workers,
        **({"largest_worker_bytes": 1024 * largest} if workers > 1 else {}),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Write the models that are not there yet, build, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", metavar="WORK", type=Path)
    parser.add_argument("--tokenizer", required=True, help="a folder or a hub id of any tokenizer of a Llama")
    parser.add_argument("--billions", type=float, choices=SHAPES, default=1.3)
    parser.add_argument("--blocks", type=int, help="how many blocks the models have (default: all of that size)")
    parser.add_argument("--full", type=int, default=4, help="experts that are full checkpoints (0: leave them out)")
    parser.add_argument("--adapters", type=int, default=8, help="experts that are adapters (0: leave them out)")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    config, tokenizer = config_of(options.billions, options.blocks), AutoTokenizer.from_pretrained(options.tokenizer)
    skeleton, base = skeleton_of(config, "causal_lm"), options.work / "base"
    full = {f"full{seed}": options.work / f"full{seed}" for seed in range(1, options.full + 1)}
    adapters = {f"adapter{seed}": options.work / f"adapter{seed}" for seed in range(1, options.adapters + 1)}
    for seed, directory in enumerate([base, *full.values()]):
        if not directory.exists():
            write_model(directory, skeleton, config, tokenizer, seed)
    for seed, directory in enumerate(adapters.values()):
        if not directory.exists():
            write_adapter(directory, skeleton, base, 10**9 + 2 * seed)
    print(json.dumps({"disk_bytes_a_second": disk_speed(options.work)}), flush=True)
    for name, experts in {"full": full, "adapters": adapters}.items():
        if experts:
            paths = {task: str(directory) for task, directory in experts.items()}
            recipe = {"base_model": str(base), "experts": paths, "exclusive": {"rank": RANK}}
            print(json.dumps(measured(name, recipe, options.work, options.workers)), flush=True)


if __name__ == "__main__":
    main()
