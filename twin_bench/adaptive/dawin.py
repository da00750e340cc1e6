"""DaWin (Oh et al., 2025): experts interpolated for every input by the confidence of their predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import SequenceClassifierOutput

from twin_bench.adaptive.unlabelled import entropy, require_classifiers
from twin_bench.adaptive.vectors import stored_bytes, stored_numbers, whole_task_vector
from twin_bench.checkpoints.sources import load_model
from twin_bench.contenders import Contender, Context
from twin_bench.contenders.context import size
from twin_bench.contenders.storage import base_bytes, head_bytes
from twin_bench.errors import InputError
from twin_bench.measured import Meter
from twin_bench.merging.registry import served_method
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.encoded import Encoded
from twin_bench.twin.parts import Parts


@served_method(title="DaWin, per sample", paper="arXiv:2410.03782", track="per-input")
def dawin(context: Context, *, scaling: float = 1.0) -> Iterator[Contender]:
    """theta_0 + sum_t w_t(x) tau_t, w_t(x) = scaling * exp(-H(p_t(x))) / sum_u exp(-H(p_u(x))).

    p_t(x) is expert t's prediction under the head of x's own task. An input takes T forward passes, and one of the
    interpolated model. Nothing is trained.

    This is the paper's sample-wise rule. The authors' multi-task code takes scaling = 0.3 T, which is task arithmetic's
    0.3 for each expert. The default 1 here interpolates, as the paper's equation and its two-model code do. The
    multi-task code also does not use a row's own weights. It uses one set of weights for each *dataset*: the parameters
    of a Dirichlet fitted to the weights of all its rows. The two-model code offers cluster means of a Beta mixture, an
    offset from the spread of the entropies over the dataset, and temperatures tuned on validation rows. All of these
    make a row's answer depend on other rows, so they are left out.

    A regression head has one output, whose entropy is 0 under every expert. Its rows weigh all experts equally.
    """
    require_classifiers(context)
    with Meter(context.device) as meter:
        sources = context.sources
        base = dict(sources.base.items())
        vectors = {task: whole_task_vector(expert, base, sources.skeleton) for task, expert in sources.experts.items()}
        parts = Parts(heads={task: expert.head() for task, expert in sources.experts.items()}, exclusive=vectors)
        model = load_model(sources, base, context.dtype)
        twin = DawinClassifier(model, sources.tokenizer, parts, scaling=scaling)
    numbers = size(base) + sum(map(stored_numbers, vectors.values()))
    stored = base_bytes(sources) + sum(map(stored_bytes, vectors.values())) + head_bytes(sources)
    yield Contender(twin, context.names, meter.taken, numbers, stored)


def confidence_weights(logits: Tensor, scaling: float = 1.0) -> Tensor:
    """Return the weights (rows, T) from the experts' logits (T, rows, labels). A row's weights sum to `scaling`."""
    return scaling * (-entropy(logits)).softmax(dim=0).T


class DawinClassifier(TwinClassifier):
    """A twin whose weights are its experts' confidence (see `dawin`).

    One-hot weights give an expert's own forward pass. A row's task must be given, because all experts are read under
    the head of that task.
    """

    def __init__(self, model: Any, tokenizer: Any, parts: Parts, *, scaling: float = 1.0) -> None:
        """Build a twin from `model`, which holds theta_0, and whole task vectors (see `TwinModel`)."""
        super().__init__(model, tokenizer, parts)
        self.scaling = scaling

    @torch.no_grad()
    def route_all(
        self,
        encoded: Sequence[Encoded],
        tasks: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return each row's weights (rows, experts) from T passes over the rows, one with each expert alone."""
        if tasks is None:
            raise InputError("an expert's confidence is read under the head of the row's task: name the rows' tasks")
        if not encoded:
            return torch.zeros(0, len(self.expert_names), device=self.device)
        logits = []
        for alone in torch.eye(len(self.expert_names)):
            answers = self.answer(encoded, tasks, batch_size=batch_size, fusion_weights=alone.repeat(len(encoded), 1))
            logits.append(pad_sequence([answer.logits for answer in answers], True, -torch.inf))
        if progress:
            progress(len(encoded))
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
        """Run a batch as `TwinClassifier.forward` does. If no weights are given, the experts run first."""
        inputs = (input_ids, attention_mask, token_type_ids)
        if fusion_weights is None:
            logits = []
            for alone in torch.eye(len(self.expert_names)):
                answer = super().forward(*inputs, fusion_weights=alone.repeat(len(input_ids), 1), task=task)
                assert answer.logits is not None
                logits.append(answer.logits.float())
            fusion_weights = confidence_weights(torch.stack(logits), self.scaling)
        return super().forward(*inputs, fusion_weights=fusion_weights, task=task)
