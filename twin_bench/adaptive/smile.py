"""SMILE (Tang et al., 2024): in every linear layer, each token takes the expert whose inputs it resembles.

y = W_0 x + b_0 + sum_t w_t(x) (U_t S_t V_t^T x + b_t - b_0), U_t S_t V_t^T the truncated SVD of tau_t = W_t - W_0.
The gate is ||V_t^T x|| over the first `gate_rank` right singular vectors; a softmax over the experts, all but the
`top_k` largest set to 0 and the rest renormalised, makes it w. Nothing is trained. What is no linear layer
(embeddings, norms) stays the base model's, as in the authors' code.

The defaults are the paper's smaller setting for CLIP (k_gate 16, k 32, top 1); the authors' FusionBench has others in
each of its configurations. It keeps `gate_rank` vectors of every expert; singular vectors of a singular value that is
rounding, of which a LoRA delta has many, point anywhere, and are left out of the gate here. FusionBench replaces
nn.Linear alone; here GPT-2's Conv1D as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twin_bench.merging.registry import unmerged_method

unmerged_method("smile", title="SMILE", paper="arXiv:2408.10174", track="routed", rank=32, gate_rank=16, top_k=1)


def gate(x: Tensor, V: Tensor, owner: Tensor, experts: int, top_k: int) -> Tensor:
    """Return each token's weights (..., T), at most `top_k` of them not 0 and summing to 1.

    Args:
        x: tokens, (..., n).
        V: right singular vectors of all experts as rows, (R, n).
        owner: the expert of each row, (R,).
        experts: T.
        top_k: experts a token takes.
    """
    squares = (x @ V.T).square()
    norms = squares.new_zeros(*squares.shape[:-1], experts).index_add_(-1, owner, squares).sqrt()
    largest, chosen = norms.topk(top_k, dim=-1)
    return torch.zeros_like(norms).scatter_(-1, chosen, largest.softmax(dim=-1))
