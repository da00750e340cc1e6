"""Tiny models of real architectures, built and saved as a user would have them."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

torch.set_num_threads(1)  # tiny models: a second thread only waits
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXT = "the a cat dog bird sat ran saw on under big small red blue quick lazy why who did not and or is it"

WORDS = TEXT.split(" ")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CAUSAL_VOCABULARY = 300  # the bytes, the special tokens and some merges


def tiny_tokenizer(kind: str = "bert") -> Any:
    """Return a word-level tokenizer that wraps texts and pairs as BERT's does; DistilBERT takes no token types."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", *([] if kind == "distilbert" else ["token_type_ids"]), "attention_mask"],
    )


def tiny_config(kind: str, num_labels: int = 2) -> Any:
    """Return the config of a two-layer model: bert, roberta, distilbert or gpt2."""
    vocabulary = len(SPECIAL) + len(WORDS)
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=64,
            n_embd=24,
            n_layer=2,
            n_head=2,
            pad_token_id=0,
            num_labels=num_labels,
        )
    if kind == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=vocabulary, dim=24, hidden_dim=40, n_layers=2, n_heads=2, num_labels=num_labels
        )
    classes = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}
    return classes[kind](
        vocab_size=vocabulary,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=70,
        type_vocab_size=2 if kind == "bert" else 1,
        pad_token_id=0,
        num_labels=num_labels,
    )


def tiny_classifier(kind: str, num_labels: int = 2, seed: int = 0, like: Any = None, noise: float = 0.05) -> Any:
    """Return a random classifier, or one whose backbone is `like`'s plus noise in every parameter."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(tiny_config(kind, num_labels)).eval()
    if like is not None:
        model.base_model.load_state_dict(like.base_model.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            backbone = name.startswith(model.base_model_prefix)
            parameter += (noise if backbone else 0.5) * torch.randn_like(parameter)
    return model


@dataclass
class Family:
    """A base model and three experts on disk, and the models themselves."""

    root: Path
    kind: str
    base: Any
    experts: dict[str, Any]
    labels: dict[str, int]
    recipe: dict[str, Any] = field(default_factory=dict)


def make_family(root: Path, kind: str, labels: dict[str, int] | None = None) -> Family:
    """Save a tiny base model, an expert a task, and router rows; return them with a recipe."""
    labels = labels or {"cola": 2, "stsb": 1, "mnli": 3}
    base = tiny_classifier(kind)
    experts = {task: tiny_classifier(kind, n, seed, like=base) for seed, (task, n) in enumerate(labels.items(), 1)}
    base.save_pretrained(root / "base")
    tiny_tokenizer(kind).save_pretrained(root / "base")
    for task, expert in experts.items():
        expert.save_pretrained(root / task)
    write_router_rows(root / "router.jsonl", list(labels))
    recipe = {
        "base_model": str(root / "base"),
        "experts": {task: str(root / task) for task in labels},
        "shared": {"method": "task_arithmetic", "scaling": 0.29},
        "exclusive": {"density": 0.5},
        "router": {"data": str(root / "router.jsonl"), "epochs": 5},
    }
    return Family(root, kind, base, experts, labels, recipe)


def write_router_rows(file: Path, tasks: list[str]) -> None:
    """Write 24 texts a task, each task's of words of its own, some of them shared with the next."""
    generator = torch.Generator().manual_seed(0)
    with file.open("w") as rows:
        for task_index, task in enumerate(tasks):
            for _ in range(24):
                share = WORDS[7 * task_index : 7 * task_index + 9]
                picked = torch.randint(len(share), (6,), generator=generator)
                text = " ".join(share[index] for index in picked)
                rows.write(f'{{"text": "{text}", "task": "{task}"}}\n')


def write_generative_rows(root: Path) -> Path:
    """Write the four generative tasks' rows, in their data sets' schemas: 12 to train and 7 to score of each."""
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    for task in ("mmlu", "truthfulqa", "bbq", "cnn_dailymail"):
        (root / task).mkdir(parents=True)
        for split, size in (("train", 12), ("validation", 7)):
            lines = []
            for _ in range(size):
                options = [text(2) + str(index) for index in range(4)]
                row: dict[str, Any] = {"question": text(4)}
                if task == "mmlu":
                    row |= {"choices": options, "answer": draw.randrange(4)}
                    row |= {"subject": draw.choice(["world_religions", "anatomy"])}
                elif task == "truthfulqa":
                    row |= {"mc1_targets": {"choices": options[:3], "labels": [1, 0, 0]}}
                elif task == "bbq":
                    row |= {"context": text(5), "label": draw.randrange(3)}
                    row |= {f"ans{index}": options[index] for index in range(3)}
                else:
                    row = {"article": text(30), "highlights": text(6)}
                lines.append(json.dumps(row) + "\n")
            (root / task / f"{split}.jsonl").write_text("".join(lines))
    return root


def tiny_causal_config(kind: str) -> Any:
    """Return the config of a two-layer language model: llama, qwen2 or gemma with grouped queries, gpt2 or opt."""
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": CAUSAL_VOCABULARY}
    if kind == "gpt2":
        return transformers.GPT2Config(n_positions=64, n_embd=24, n_layer=2, n_head=2, **tokens)
    shape = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if kind == "opt":
        return transformers.OPTConfig(
            hidden_size=24,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=24,
            **tokens,
        )
    if kind == "gemma":
        return transformers.GemmaConfig(head_dim=6, **shape, **tokens)
    classes = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    return classes[kind](tie_word_embeddings=kind == "llama", **shape, **tokens)


def tiny_causal(kind: str, seed: int = 0, like: Any = None, noise: float = 0.1) -> Any:
    """Return a random language model, or one that is `like` plus noise in every parameter, biases and norms too.

    Not in OPT's embeddings of positions, which are of a kind of its own.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_causal_config(kind)).eval()
    if like is not None:
        model.load_state_dict(like.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if like is None or "embed_positions" not in name:
                parameter += noise * torch.randn_like(parameter)
    return model


def make_causal_family(root: Path, kind: str) -> Family:
    """Save a tiny language model, three experts, and router rows; return them with a recipe."""
    base = tiny_causal(kind)
    experts = {
        task: tiny_causal(kind, seed, like=base) for seed, task in enumerate(("mmlu", "bbq", "cnn_dailymail"), 1)
    }
    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(root / name)
        tiny_causal_tokenizer().save_pretrained(root / name)
    write_router_rows(root / "router.jsonl", list(experts))
    recipe = {
        "base_model": str(root / "base"),
        "experts": {task: str(root / task) for task in experts},
        "shared": {"method": "task_arithmetic", "scaling": 0.29},
        "exclusive": {"density": 0.5},
        "router": {"data": str(root / "router.jsonl"), "epochs": 5},
    }
    return Family(root, kind, base, experts, {}, recipe)


def tiny_causal_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer, as GPT-2's, Qwen's and SmolLM's are, that adds nothing to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CAUSAL_VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from kind to its family, each made once."""
    made: dict[str, Family] = {}

    def family(kind: str) -> Family:
        if kind not in made:
            made[kind] = make_family(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return family


@pytest.fixture(scope="session")
def causal_families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from kind to its family of language models, each made once."""
    made: dict[str, Family] = {}

    def family(kind: str) -> Family:
        if kind not in made:
            made[kind] = make_causal_family(tmp_path_factory.mktemp(f"causal-{kind}"), kind)
        return made[kind]

    return family


@pytest.fixture(scope="session")
def wide_llama(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Return the tiny Llamas with a window that holds a summary's 128 tokens (rotary positions need no parameters).

    The letters' rows of the (tied) embeddings are large, so that letters are what they answer and scores differ.
    """
    letters = [tiny_causal_tokenizer().convert_tokens_to_ids(letter) for letter in "ABC"]
    narrow, root = causal_families("llama"), tmp_path_factory.mktemp("wide")
    for name in ("base", *narrow.experts):
        shutil.copytree(narrow.root / name, root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
        tensors = load_file(root / name / "model.safetensors")
        tensors["model.embed_tokens.weight"][letters] *= 20
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
    recipe = {"base_model": str(root / "base"), "experts": {task: str(root / task) for task in narrow.experts}}
    return dataclasses.replace(narrow, root=root, recipe=recipe)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the directory of real rows; tests with it are marked real."""
    return Path(os.environ["TWIN_BENCH_DATA"])


@pytest.fixture(scope="session")
def real_experts() -> Path:
    """Return the directory of real experts; tests with it are marked real."""
    return Path(os.environ["TWIN_BENCH_EXPERTS"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect (never count as passed) the real-row tests where there are no real rows."""
    if {"TWIN_BENCH_DATA", "TWIN_BENCH_EXPERTS"} <= os.environ.keys():
        return
    real = [item for item in items if item.get_closest_marker("real")]
    config.hook.pytest_deselected(items=real)
    items[:] = [item for item in items if item not in real]
