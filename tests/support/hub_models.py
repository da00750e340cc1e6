"""Tiny models on a hub: bases, full experts in folders and in shards, and LoRA adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch

from tests.support.families import Family
from tests.support.hub import Hub

CLASSIFIERS = {"cola": "org/bert-cola/runs/best@v1", "stsb": "org/bert-stsb", "mnli": "org/bert-mnli-lora"}
"""Three experts as a recipe names them: in a folder of a repository at a tag, in shards, and a LoRA adapter."""
ADAPTER = "org/bert@main"
"""The base model at a revision."""
TOGETHER = "org/glue@v1"
"""A repository at a tag that has a folder for each expert."""


def add_models(hub: Hub, classifiers: Family, language: Family, folder: Path) -> dict[str, str]:
    """Add both families to a hub. Return where the same models are on disk, by their names on the hub."""
    saved = {"org/bert": classifiers.root / "base", "org/llama": language.root / "base"}
    saved |= {"org/llama-mmlu": language.root / "mmlu"}
    saved |= {"org/bert-stsb": folder / "stsb", "org/bert-mnli-lora": folder / "mnli"}
    classifiers.experts["stsb"].save_pretrained(folder / "stsb", max_shard_size="20KB")
    assert (folder / "stsb" / "model.safetensors.index.json").is_file()
    _adapter(classifiers.base).save_pretrained(folder / "mnli")
    settings = folder / "mnli" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "org/bert"}))
    for name, directory in saved.items():
        hub.add(name, directory)
    hub.moved["bert-as-it-was-called"] = "org/bert"
    models = {task: _files(classifiers.root / task) for task in classifiers.experts}
    other = _files(classifiers.root / "base")
    hub.add("org/bert-cola", {f"runs/best/{file}": text for file, text in models["cola"].items()}, names=("v1",))
    hub.add("org/bert-cola", {f"runs/best/{file}": text for file, text in other.items()})
    hub.add(
        "org/glue", {f"{task}/{file}": text for task in models for file, text in models[task].items()}, names=("v1",)
    )
    hub.add("org/glue", {"README.md": b"Nothing is here."})
    names = {name: str(directory) for name, directory in saved.items()}
    return {**names, CLASSIFIERS["cola"]: str(classifiers.root / "cola"), ADAPTER: names["org/bert"]}


def _files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def _adapter(base: Any) -> Any:
    """Return a classifier of three labels that is a LoRA adapter on `base`."""
    torch.manual_seed(7)
    model = copy.deepcopy(base)
    model.num_labels = model.config.num_labels = 3
    model.classifier = torch.nn.Linear(model.config.hidden_size, 3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += parameter.requires_grad * 0.3 * torch.randn_like(parameter)
    return adapted
