"""Train the demo's eight experts again: ``python -m twin_bench.demo.train --out DIR``."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from twin_bench.checkpoints.hub import model_directory
from twin_bench.compat import import_peft
from twin_bench.console import reporting_errors
from twin_bench.data.glue import GLUE
from twin_bench.data.metrics import score
from twin_bench.demo import BASE_MODEL, TASKS
from twin_bench.demo.sentences import Row, rows, texts

RANK, BATCH, RATE, EPOCHS = 4, 16, 2e-3, 10
MAX_LENGTH = 128


def batch_of(tokenizer: Any, chosen: Sequence[Row]) -> Any:
    """Tokenize rows to one padded batch."""
    columns = list(zip(*(texts(row) for row in chosen), strict=True))
    return tokenizer(
        *(list(column) for column in columns), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )


@torch.inference_mode()
def outputs(model: Any, tokenizer: Any, chosen: Sequence[Row]) -> np.ndarray[Any, Any]:
    """Return the model's logits for all rows."""
    model.eval()
    parts = [model(**batch_of(tokenizer, chosen[at : at + 50])).logits for at in range(0, len(chosen), 50)]
    return torch.cat(parts).float().numpy()


def train(task: str, seed: int, progress: Progress) -> tuple[Any, Any]:
    """Train one expert; return the PEFT model and its tokenizer."""
    import_peft()
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(seed)
    directory = model_directory(BASE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=GLUE[task].num_labels)
    adapter = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=["query", "key", "value", "dense"],
    )
    examples = rows(task)["train"]
    if GLUE[task].is_regression:  # start from the mean label, or most steps go into finding it
        torch.nn.init.constant_(model.classifier.bias, sum(float(row["label"]) for row in examples) / len(examples))
    model = get_peft_model(model, adapter)
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    steps = EPOCHS * (len(examples) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=steps, pct_start=0.1)
    bar = progress.add_task(task, total=steps)
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(examples)).tolist()
        for at in range(0, len(order) - BATCH + 1, BATCH):
            chosen = [examples[index] for index in order[at : at + BATCH]]
            labels = torch.tensor([float(row["label"]) for row in chosen])
            logits = model(**batch_of(tokenizer, chosen)).logits
            if GLUE[task].is_regression:
                loss: Any = torch.nn.functional.mse_loss(logits.squeeze(-1), labels)
            else:
                loss = torch.nn.functional.cross_entropy(logits, labels.long())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.advance(bar)
    return model, tokenizer


def save(model: Any, directory: Path) -> None:
    """Write the adapter's two files. The lists in the config are sorted."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as unfinished:
        model.save_pretrained(unfinished, save_embedding_layers=False)  # "auto" would ask the hub
        config = json.loads((Path(unfinished) / "adapter_config.json").read_text(encoding="utf-8"))
        config["target_modules"] = sorted(config["target_modules"])
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (Path(unfinished) / "adapter_config.json").write_text(text, encoding="utf-8")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (Path(unfinished) / name).replace(directory / name)


def run(out: Path, tasks: Sequence[str], seed: int) -> None:
    """Train the experts of `tasks`, write them below `out` and print each one's score on its validation rows."""
    table = Table("task", "metric", "score on validation", "rows")
    columns = (TextColumn("{task.description:6}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        for task in tasks:
            model, tokenizer = train(task, seed, progress)
            save(model, out / task)
            held_out = rows(task)["validation"]
            logits = outputs(model, tokenizer, held_out)
            answers = logits[:, 0] if GLUE[task].is_regression else logits.argmax(axis=1)
            points = score(GLUE[task].metric, [float(row["label"]) for row in held_out], answers.tolist())
            table.add_row(task, GLUE[task].metric, f"{points:.1f}", str(len(held_out)))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m twin_bench.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for TASK/adapter_*; overwritten where there")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help="train these only")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (the rows are those of seed 0)")
    options = parser.parse_args(arguments)
    logging: Any = transformers.logging
    logging.set_verbosity_error()  # it reports the fresh classifier as missing weights
    return reporting_errors(lambda: run(options.out, options.tasks, options.seed))


if __name__ == "__main__":
    raise SystemExit(main())
