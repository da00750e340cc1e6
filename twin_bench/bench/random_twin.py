"""A twin of random numbers in the shapes of a real model, to measure speed where no checkpoint is at hand.

    python -m twin_bench.bench.random_twin roberta-base ROWS DIRECTORY

Speed depends on shapes, dtypes and lengths, and not on the numbers. The tokenizer is trained on the rows of the tasks,
so that a row has about as many tokens as a real one's. The experts change every linear layer, and a classifier's change
the biases and norms as well, as full checkpoints do. The router is not trained: its weights are diffuse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.skeleton import Skeleton, skeleton_of
from twin_bench.data.generative import GENERATIVE
from twin_bench.data.glue import GLUE
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError
from twin_bench.twin.directory import save_twin
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.parts import Parts
from twin_bench.twin.routers.base import RouterConfig
from twin_bench.twin.routers.kinds.mlp import MlpRouter

VOCABULARY = 8000
"""The largest number of tokens that the tokenizer learns from the rows. The embeddings have the model's own size."""
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


class Shape(NamedTuple):
    """A model's config, what it serves, its dtype, and whether its experts change the biases and norms."""

    config: Callable[[], Any]
    task_type: TaskType
    dtype: torch.dtype
    vectors: bool


def _roberta() -> Any:
    return RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **TOKENS)


def _llama(width: int, wide: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> Callable[[], Any]:
    def config() -> Any:
        return LlamaConfig(
            hidden_size=width,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=8192,
            **TOKENS,
        )

    return config


SHAPES = {
    "roberta-base": Shape(_roberta, "sequence_classification", torch.float32, True),
    "llama-160m": Shape(_llama(768, 3072, 12, 12, 12, 32000), "causal_lm", torch.bfloat16, False),
    "llama-1b": Shape(_llama(2048, 8192, 16, 32, 8, 128256), "causal_lm", torch.bfloat16, False),
    "llama-7b": Shape(_llama(4096, 11008, 32, 32, 32, 32000), "causal_lm", torch.bfloat16, False),
}


def write_random_twin(
    directory: Path,
    shape: Shape,
    data: Path,
    *,
    experts: int = 8,
    rank: int = 16,
    layers: int | None = None,
    device: str = "cpu",
) -> None:
    """Write a twin of random numbers to `directory`, with experts of the tasks whose rows are in `data`.

    Args:
        directory: it must not exist yet.
        shape: one of `SHAPES`.
        data: TASK/*.jsonl of GLUE's tasks for a classifier, or of the generative ones.
        experts: how many experts the twin has. The first are named after the tasks.
        rank: the rank of each matrix's exclusive vectors.
        layers: how many layers the model has, by default those of the real one.
        device: where the random numbers are drawn. A GPU draws those of a large model in seconds.

    Raises:
        InputError: no task has rows in `data`, or the model is to have no layer.
    """
    if layers is not None and layers < 1:
        raise InputError(f"layers {layers}: at least 1, or none given for those of the real model")
    torch.manual_seed(0)
    known: Mapping[str, Any] = GLUE if shape.task_type == "sequence_classification" else GENERATIVE
    tasks = [name for name in known if (data / name).is_dir()]
    if not tasks:
        raise InputError(f"{data}: no rows of {', '.join(known)}")
    names = [*tasks, *(f"expert{number}" for number in range(experts))][:experts]
    config = shape.config()
    if layers is not None:
        config.num_hidden_layers = layers
    kind: Any = AutoModelForSequenceClassification if shape.task_type == "sequence_classification" else None
    with torch.device(device):
        model = (kind or AutoModelForCausalLM).from_config(config, dtype=shape.dtype).eval()
    skeleton = skeleton_of(config, shape.task_type)
    parts = Parts(
        heads={name: _head(model, known[name].num_labels if name in known else 2) for name in names}
        if skeleton.head
        else {},
        exclusive={name: _exclusive(model, skeleton, rank, vectors=shape.vectors) for name in names},
        router=MlpRouter(RouterConfig(tuple(names), config.hidden_size, layer=min(3, config.num_hidden_layers))).eval(),
    )
    save_twin(directory, model.cpu(), _tokenizer(data, tasks, shape), parts, skeleton, {"exclusive": {"rank": rank}})


def _exclusive(model: Any, skeleton: Skeleton, rank: int, *, vectors: bool) -> Exclusive:
    """Return an exclusive vector of small random numbers: of all linear layers and, if asked for, 1-D parameters."""
    parameters = {name: one for name, one in model.named_parameters() if name in skeleton.backbone}
    linear = {f"{name}.weight" for name, layer in model.named_modules() if type(layer) is nn.Linear}
    factors = {
        name: Factors(*(0.02 * torch.randn(shape, device=one.device).to("cpu", one.dtype) for shape in shapes))
        for name, one in parameters.items()
        if name in linear
        for shapes in [((one.shape[0], rank), (rank, one.shape[1]))]
    }
    moved = {
        name: (0.02 * torch.randn_like(one)).detach().cpu()
        for name, one in parameters.items()
        if vectors and one.ndim == 1
    }
    return Exclusive(factors, moved)


def _head(model: Any, labels: int) -> dict[str, torch.Tensor]:
    """Return a random head of so many labels, by parameter name."""
    prefix, head = f"{model.base_model_prefix}.", {}
    for name, one in model.named_parameters():
        if not name.startswith(prefix):
            size = (labels, *one.shape[1:]) if one.shape[0] == model.config.num_labels else one.shape
            head[name] = 0.02 * torch.randn(size, dtype=one.dtype)
    return head


def _tokenizer(data: Path, tasks: Sequence[str], shape: Shape) -> Any:
    """Return a byte-level BPE tokenizer that is trained on the tasks' files."""

    def lines() -> Iterator[str]:
        for task in tasks:
            for file in sorted((data / task).glob("*.jsonl")):
                yield from file.read_text().splitlines()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines(), trainer)
    if shape.task_type == "sequence_classification":
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 2))
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one random twin; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m twin_bench.bench.random_twin", description=__doc__)
    parser.add_argument("shape", choices=SHAPES, help="the model whose shapes the twin has")
    parser.add_argument("data", type=Path, metavar="ROWS", help="TASK/*.jsonl of the tasks")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="where the twin goes")
    parser.add_argument("--experts", type=int, default=8, help="how many experts (default: 8)")
    parser.add_argument("--rank", type=int, default=16, help="the rank of exclusive vectors (default: 16)")
    parser.add_argument("--layers", type=int, help="how many layers (default: the real model's)")
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn (default: cpu)")
    options = parser.parse_args(arguments)
    sizes: dict[str, Any] = {name: getattr(options, name) for name in ("experts", "rank", "layers", "device")}
    try:
        write_random_twin(options.directory, SHAPES[options.shape], options.data, **sizes)
    except InputError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
