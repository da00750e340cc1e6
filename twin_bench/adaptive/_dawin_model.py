"""DaWin as a twin: the shared expert is theta_0, the exclusive vectors whole task vectors, the experts the router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import SequenceClassifierOutput

from twin_bench.adaptive.dawin import confidence_weights
from twin_bench.checkpoints.checkpoint import Checkpoint
from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.skeleton import Skeleton
from twin_bench.errors import InputError
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.model import Encoded
from twin_bench.twin.parts import Parts


class DawinClassifier(TwinClassifier):
    """A twin whose weights are its experts' confidence (see `twin_bench.adaptive.dawin`).

    An expert's own forward is one-hot weights. The row's task must be told: its head is what all experts are read by.
    """

    def __init__(self, model: Any, tokenizer: Any, parts: Parts, *, scaling: float = 1.0) -> None:
        """Make one of `model`, which holds theta_0, and of whole task vectors (see `TwinModel`)."""
        super().__init__(model, tokenizer, parts)
        self.scaling = scaling

    @torch.no_grad()
    def route_all(
        self, encoded: Sequence[Encoded], tasks: Sequence[str] | None = None, *, batch_size: int = 32
    ) -> Tensor:
        """Return each row's weights (rows, experts) from T passes over the rows, one with each expert alone."""
        if tasks is None:
            raise InputError("an expert's confidence is read under a row's own head: name the rows' tasks")
        if not encoded:
            return torch.zeros(0, len(self.expert_names), device=self.device)
        logits = []
        for alone in torch.eye(len(self.expert_names)):
            answers = self.answer(encoded, tasks, batch_size=batch_size, fusion_weights=alone.repeat(len(encoded), 1))
            logits.append(pad_sequence([answer.logits for answer in answers], True, -torch.inf))
        return confidence_weights(torch.stack(logits), self.scaling).to(self.device)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        fusion_weights: Tensor | None = None,
        task: str | Sequence[str] | None = None,
    ) -> SequenceClassifierOutput:
        """Run a batch as `TwinClassifier.forward` does; where weights are not given, the experts run first."""
        inputs = (input_ids, attention_mask, token_type_ids)
        if fusion_weights is None:
            logits = []
            for alone in torch.eye(len(self.expert_names)):
                answer = super().forward(*inputs, fusion_weights=alone.repeat(len(input_ids), 1), task=task)
                assert answer.logits is not None
                logits.append(answer.logits.float())
            fusion_weights = confidence_weights(torch.stack(logits), self.scaling)
        return super().forward(*inputs, fusion_weights=fusion_weights, task=task)


def whole_task_vector(expert: Checkpoint, base: Mapping[str, Tensor], skeleton: Skeleton) -> Exclusive:
    """Return tau_t as a twin has it, nothing truncated.

    A LoRA delta is its own factors; any other matrix (m, n) is itself times the identity of its shorter side.

    Raises InputError for a tensor of three or more dimensions that differs.
    """
    factors: dict[str, Factors] = {}
    vectors: dict[str, Tensor] = {}
    for name in skeleton.backbone:
        if name in expert.low_rank:
            lora = expert.low_rank[name]
            A, B = lora.A().float(), lora.scale * lora.B().float()
            turned = name in skeleton.transposed | skeleton.embeddings
            factors[name] = Factors(A.T.contiguous(), B.T.contiguous()) if turned else Factors(B, A)
            continue
        exact = torch.promote_types(base[name].dtype, torch.float32)
        tau = expert[name].to(exact) - base[name].to(exact)
        if not tau.any():
            continue
        if tau.ndim == 1:
            vectors[name] = tau
        elif tau.ndim == 2:
            tall = tau.shape[0] >= tau.shape[1]
            identity = torch.eye(min(tau.shape), dtype=tau.dtype)
            factors[name] = Factors(tau, identity) if tall else Factors(identity, tau)
        else:
            raise InputError(f"tensor {name} has {tau.ndim} dimensions: a twin fuses matrices and vectors")
    return Exclusive(factors, vectors)
