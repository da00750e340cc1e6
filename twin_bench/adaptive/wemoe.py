"""WEMoE (Tang et al., 2024): every MLP block mixes the experts' task vectors for each input; the rest is merged.

theta_0 + sum_t w_t(x) tau_t in the linear layers of an MLP block, with weights of each block's own, and task arithmetic
with `scaling` everywhere else. w(x) is the mean over x's tokens of W_2 relu(W_1 h + b_1) + b_2, h being what enters the
block; it is no distribution. The gates start at `scaling` (b_2; their matrices normal with deviation 0.01) and learn
from the entropy of predictions on *unlabelled test inputs*, one batch of `batch_size` of every task a step, by Adam.

The authors' code (FusionBench) averages the gate over the batch while it learns, and over padding tokens always;
here every input has weights of its own, in learning as in scoring, and padding does not count, so that an answer
depends on nothing else in the batch. A regression's head has no entropy: such a task adds no loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twin_bench.merging.registry import unmerged_method

unmerged_method(
    "wemoe",
    title="WEMoE",
    paper="arXiv:2402.00433",
    track="routed",
    needs=("unlabelled test inputs", "seed"),
    scaling=0.3,
    steps=1000,
    learning_rate=1e-4,
    batch_size=16,
    seed=0,
)


class Gate(nn.Module):
    """One block's gate: d -> d -> T."""

    def __init__(self, width: int, experts: int, scaling: float, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(width, width), nn.Linear(width, experts)
        with torch.no_grad():
            for layer, bias in ((self.hidden, 0.0), (self.output, scaling)):
                layer.weight.normal_(std=0.01, generator=generator)
                layer.bias.fill_(bias)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Return each row's weights (batch, T) of hidden states (batch, length, d), padding (mask 0) left out."""
        weights: Tensor = self.output(torch.relu(self.hidden(hidden)))
        if mask is None:
            return weights.mean(dim=1)
        kept = mask.to(weights)[..., None]
        return (weights * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
