"""A tiny base model and experts with everything that methods which learn at test time take."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tests.support.models import WORDS, tiny_classifier, tiny_tokenizer
from twin_bench.data.task import TaskInput
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.parts import Parts

LABELS = {"cola": 2, "stsb": 1, "mnli": 3}


class Setting:
    """A tiny base model and its experts in float64, their heads, and texts of every task."""

    def __init__(self, kind: str = "bert", labels: dict[str, int] = LABELS) -> None:
        self.model = tiny_classifier(kind).double()
        experts = {
            task: tiny_classifier(kind, count, seed, like=self.model.float(), noise=0.2).double()
            for seed, (task, count) in enumerate(labels.items(), 1)
        }
        self.model.double()
        backbone = [name for name, _ in self.model.named_parameters() if name.startswith(self.model.base_model_prefix)]
        self.experts = experts
        self.base = {name: self.model.get_parameter(name).detach().clone() for name in backbone}
        self.tuned = {
            task: {name: expert.get_parameter(name).detach() for name in backbone} for task, expert in experts.items()
        }
        heads = {t: {n: p for n, p in e.named_parameters() if n not in self.base} for t, e in experts.items()}
        self.twin = TwinClassifier(copy.deepcopy(self.model), tiny_tokenizer(), Parts(heads=heads), routing="none")
        draw = torch.Generator().manual_seed(0)
        self.rows = [
            TaskInput(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (3 + n % 5,), generator=draw)), None, task)
            for task in labels
            for n in range(7)
        ]

    def naive_loss(self, task: str, inputs: Any, coefficients: dict[str, Tensor]) -> Tensor:
        """-mean sum p log p of an expert's own model whose backbone is merged with autograd through every sum."""
        merged = {}
        for name, theta_0 in self.base.items():
            merged[name] = theta_0
            for t, expert in enumerate(self.tuned.values()):
                merged[name] = merged[name] + coefficients[name][t].clamp(0, 1) * (expert[name] - theta_0)
        p = torch.softmax(functional_call(self.experts[task], merged, (), inputs).logits, dim=1)
        return -(p * p.log()).sum(dim=1).mean()
