"""DaWin (Oh et al., 2025): experts interpolated for every input by how sure each of them is of it.

theta_0 + sum_t w_t(x) tau_t with w_t(x) = scaling * exp(-H(p_t(x))) / sum_u exp(-H(p_u(x))), where p_t(x) is expert t's
prediction under the head of x's own task: T forwards, then the interpolated model's. Nothing is trained.

This is the paper's sample-wise rule. The authors' multi-task code takes scaling = 0.3 T (task arithmetic's 0.3 for
each expert; the default 1 here interpolates, as the paper's equation and its two-model code do), and then not
a row's own weights but one set for each *dataset*, the parameters of a Dirichlet fitted to all its rows' weights; the
two-model code offers cluster means of a Beta mixture, an offset from the entropies' spread over the dataset and
temperatures tuned on validation rows. All of these make a row's answer depend on the other rows, and are left out.

A regression's head has one output, whose entropy is 0 under every expert: its rows weigh all experts equally.
"""

from __future__ import annotations

from torch import Tensor

from twin_bench.adaptive.adamerging import entropy
from twin_bench.merging.registry import unmerged_method

unmerged_method("dawin", title="DaWin, per sample", paper="arXiv:2410.03782", track="routed", scaling=1.0)


def confidence_weights(logits: Tensor, scaling: float = 1.0) -> Tensor:
    """Return the weights (rows, T) of experts' logits (T, rows, labels); a row's sum to `scaling`."""
    return scaling * (-entropy(logits)).softmax(dim=0).T
