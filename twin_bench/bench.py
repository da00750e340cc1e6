"""python -m twin_bench.bench: fusion against the plain model, the authors' per-sample merge and PEFT, in one run.

All cases answer the same encoded rows on the same machine in turn, round after round, after a warm-up; the
figures are medians, and ratios are taken against the plain model of the same round.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twin_bench.data import read_rows, split_path, text_pair
from twin_bench.errors import InputError
from twin_bench.glue import GLUE
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.directory import load_twin
from twin_bench.twin.model import Encoded
from twin_bench.twin.plan import Group, batches


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark command; return the exit status."""
    from twin_bench.cli import reporting_errors

    parser = argparse.ArgumentParser(prog="python -m twin_bench.bench", description="Measure a twin's fusion.")
    parser.add_argument("--twin", type=Path, required=True, help="a twin directory")
    parser.add_argument("--data", type=Path, required=True, help="a directory of TASK/SPLIT.jsonl")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--rows", type=int, default=512, help="rows, drawn evenly from the tasks and shuffled")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--merged-rows", type=int, default=16, help="rows for the per-sample merge, which is slow")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    return reporting_errors(lambda: _run(parser.parse_args(arguments)))


def bench(
    twin_directory: Path,
    data: Path,
    *,
    split: str = "validation",
    rows: int = 512,
    batch_size: int = 32,
    rounds: int = 5,
    merged_rows: int = 16,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return the machine, the settings and each case's rows a second, and its ratio to the plain model's.

    Cases: `plain` (the shared expert as transformers runs it), `one_hot` and `diffuse` (exact fusion with
    weights given, so routing is not counted: the true task's expert, and draws from a flat Dirichlet),
    `routed` (the router's own weights, routing counted), `peft_mixed` (PEFT's mixed batch, which can give a
    row one adapter only, and none where experts changed position embeddings) and `per_sample_merge` (all
    weights merged for each row, as the authors' code does).
    """
    twin = TwinClassifier.from_pretrained(twin_directory, device=device)
    encoded, tasks = _stream(twin, data, split, rows)
    lengths = [len(row["input_ids"]) for row in encoded]
    plain_batches = [list(b.rows) for b in batches(Group(tuple(range(len(encoded))), None), lengths, batch_size)]
    one_hot = torch.nn.functional.one_hot(
        torch.tensor([twin.expert_names.index(task) for task in tasks]), len(twin.expert_names)
    ).float()
    generator = torch.Generator().manual_seed(0)
    exponentials = -torch.rand(one_hot.shape, generator=generator).log()
    diffuse = exponentials / exponentials.sum(dim=1, keepdim=True)
    plain = load_twin(twin_directory).model.to(device).eval()

    @torch.no_grad()
    def run_plain() -> None:
        for batch in plain_batches:
            _finished(plain(**twin.collate([encoded[row] for row in batch])).logits)

    def run_twin(weights: Tensor | None) -> Callable[[], None]:
        return lambda: _finished(twin.answer(encoded, tasks, batch_size=batch_size, fusion_weights=weights)[-1].logits)

    cases: dict[str, tuple[Callable[[], None], int]] = {
        "plain": (run_plain, len(encoded)),
        "one_hot": (run_twin(one_hot), len(encoded)),
        "diffuse": (run_twin(diffuse), len(encoded)),
        **({"routed": (run_twin(None), len(encoded))} if twin.router is not None else {}),
        "peft_mixed": (_peft_mixed(twin_directory, twin, encoded, tasks, plain_batches), len(encoded)),
        "per_sample_merge": (_per_sample_merge(plain, twin, encoded, diffuse, merged_rows), merged_rows),
    }
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    unsupported: dict[str, str] = {}
    for name, (run, _) in list(cases.items()):
        try:
            run()
        except ValueError as error:
            if name != "peft_mixed":
                raise
            # PEFT wants as many adapter names as an embedding has rows, and position ids have one for all.
            unsupported[name] = str(error)
            del cases[name], speeds[name]
        print(f"warmed up: {name}", file=sys.stderr)
    for _ in range(rounds):
        for name, (run, count) in cases.items():
            started = time.perf_counter()
            run()
            speeds[name].append(count / (time.perf_counter() - started))
    return {
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": _device_name(device),
        },
        "versions": {package: version(package) for package in ("twin-bench", "torch", "transformers", "peft")},
        "settings": {
            "experts": len(twin.expert_names),
            "rows": len(encoded),
            "mean_tokens": sum(lengths) / len(lengths),
            "batch_size": batch_size,
            "rounds": rounds,
            "dtype": str(twin.model.dtype),
        },
        "unsupported": unsupported,
        "cases": {
            name: {
                "rows_per_second": statistics.median(values),
                "against_plain": statistics.median(v / p for v, p in zip(values, speeds["plain"], strict=True)),
                "runs": values,
            }
            for name, values in speeds.items()
        },
    }


def _stream(twin: TwinClassifier, data: Path, split: str, rows: int) -> tuple[list[Encoded], list[str]]:
    """Return `rows` encoded rows drawn evenly from the twin's tasks, shuffled, and their tasks."""
    known = [task for task in twin.expert_names if task in GLUE]
    if not known:
        raise InputError("bench: the twin has no expert of a GLUE task to take rows of")
    drawn = [
        (text_pair(row, GLUE[task]), task)
        for task in known
        for row in read_rows(split_path(data, task, split), GLUE[task])[: -(-rows // len(known))]
    ]
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0)).tolist()
    picked = [drawn[index] for index in order[:rows]]
    return twin.encode([text for text, _ in picked]), [task for _, task in picked]


def _peft_mixed(
    directory: Path,
    twin: TwinClassifier,
    encoded: Sequence[Encoded],
    tasks: Sequence[str],
    cut: Sequence[Sequence[int]],
) -> Callable[[], None]:
    """Return a run of PEFT's mixed batch: each row through its own task's adapter, no fusion of several."""
    from peft import PeftModel
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(directory / "model").to(twin.device)
    first, *others = twin.expert_names
    model = PeftModel.from_pretrained(backbone, str(directory / "experts" / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(directory / "experts" / name), adapter_name=name)
    model.eval()

    @torch.no_grad()
    def run() -> None:
        for batch in cut:
            inputs = twin.collate([encoded[row] for row in batch])
            _finished(model(**inputs, adapter_names=[tasks[row] for row in batch]).last_hidden_state)

    return run


def _per_sample_merge(
    plain: Any, twin: TwinClassifier, encoded: Sequence[Encoded], weights: Tensor, rows: int
) -> Callable[[], None]:
    """Return a run as the authors' code has it: batch 1, a dense sum of all experts' vectors for every sample."""
    merged = copy.deepcopy(plain)
    targets: list[tuple[Tensor, Tensor, Tensor]] = []
    modules = dict(plain.named_modules())
    for name, layer in ((n, m) for n, m in twin.model.named_modules() if hasattr(m, "ranks") and sum(m.ranks)):
        starts = [sum(layer.ranks[:t]) for t in range(len(layer.ranks) + 1)]
        dense = torch.stack([layer.B[:, a:b] @ layer.A[a:b] for a, b in itertools.pairwise(starts)])
        targets.append((merged.get_parameter(f"{name}.weight"), modules[name].weight, dense))

    @torch.no_grad()
    def run() -> None:
        for row in range(rows):
            for parameter, shared, dense in targets:
                fused = shared.clone()
                for weight, vector in zip(weights[row].tolist(), dense, strict=True):
                    fused += weight * vector
                parameter.copy_(fused)
            _finished(merged(**twin.collate([encoded[row]])).logits)

    return run


def _finished(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.processor() or 'cpu'}"


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    result = bench(
        options.twin,
        options.data,
        split=options.split,
        rows=options.rows,
        batch_size=options.batch_size,
        rounds=options.rounds,
        merged_rows=options.merged_rows,
        device=options.device,
    )
    table = Table("case", "rows/s", "against plain", box=None)
    for name, case in result["cases"].items():
        table.add_row(name, f"{case['rows_per_second']:.1f}", f"{case['against_plain']:.3f}")
    Console().print(table)
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    sys.exit(main())
