"""SMILE (Tang et al., 2024): in every linear layer, each token is routed to the experts whose inputs it resembles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.sources import load_model
from twin_bench.compat import Conv1D
from twin_bench.contenders import Contender, Context
from twin_bench.contenders.context import size
from twin_bench.contenders.storage import base_bytes, head_bytes
from twin_bench.errors import InputError
from twin_bench.measured import Meter
from twin_bench.merging.device import OnDevice, exact_device
from twin_bench.merging.linear_algebra import truncated_svd
from twin_bench.merging.registry import served_method
from twin_bench.merging.task_vectors import TaskVectors
from twin_bench.twin.model import twin_class
from twin_bench.twin.parts import Parts


def check_ranks(context: Context, *, rank: int, gate_rank: int, top_k: int) -> None:
    """Raise an InputError unless SMILE's options are in their ranges."""
    require_ranks(len(context.experts), rank, gate_rank, top_k)


def require_ranks(experts: int, rank: float, gate_rank: float, top_k: float) -> None:
    """Raise an InputError unless ranks are whole numbers from 1, and top_k is one from 1 to the number of experts."""
    for option, value, most in (("rank", rank, None), ("gate_rank", gate_rank, None), ("top_k", top_k, experts)):
        if value < 1 or value != int(value) or (most is not None and value > most):
            limit = f"from 1 to {most}, the number of experts" if most else "from 1"
            raise InputError(f"smile: {option} must be a whole number {limit}, not {value}")


@served_method(title="SMILE", paper="arXiv:2408.10174", track="per-input", check_options=check_ranks)
def smile(context: Context, *, rank: int = 32, gate_rank: int = 16, top_k: int = 1) -> Iterator[Contender]:
    """W_0 x + b_0 + sum_t w_t(x) (U_t S_t V_t^T x + b_t - b_0), U_t S_t V_t^T the truncated SVD of W_t - W_0.

    The gate is ||V_t^T x|| over the first `gate_rank` right singular vectors. w is its softmax over the experts, with
    all but the `top_k` largest set to 0 and the rest renormalised. Nothing is trained. Parameters outside linear layers
    (embeddings, norms) stay the base model's, as in the authors' code.

    The defaults are the paper's smaller setting for CLIP (k_gate 16, k 32, top 1). The authors' FusionBench has other
    values in each of its configurations. FusionBench keeps `gate_rank` vectors of every expert. A LoRA delta has many
    singular values that are rounding error, and their singular vectors are arbitrary. These are left out of the gate
    here. FusionBench replaces nn.Linear alone; here GPT-2's Conv1D is replaced as well.
    """
    with Meter(context.device) as meter:
        sources = context.sources
        base = dict(sources.base.items())
        device = exact_device(context.device)
        model = load_model(sources, base, context.dtype).to(device)
        vectors = TaskVectors(OnDevice(base, device), sources.experts)
        added = install_smile(model, vectors, rank=rank, gate_rank=gate_rank, top_k=top_k)
        parts = Parts(heads={task: expert.head() for task, expert in sources.experts.items() if sources.skeleton.head})
        twin = twin_class(context.task_type)(model, sources.tokenizer, parts, routing="none")
    stored = base_bytes(sources) + added_bytes(model, base) + head_bytes(sources)
    yield Contender(twin, context.names, meter.taken, size(base) + added, stored)


def gate(x: Tensor, V: Tensor, owner: Tensor, experts: int, top_k: int) -> Tensor:
    """Return each token's weights (..., T). At most `top_k` of them are not 0, and they sum to 1.

    Args:
        x: tokens, (..., n).
        V: right singular vectors of all experts as rows, (R, n).
        owner: the expert of each row, (R,).
        experts: T.
        top_k: the number of experts for a token.
    """
    squares = (x @ V.T).square()
    norms = squares.new_zeros(*squares.shape[:-1], experts).index_add_(-1, owner, squares).sqrt()
    largest, chosen = norms.topk(top_k, dim=-1)
    return torch.zeros_like(norms).scatter_(-1, chosen, largest.softmax(dim=-1))


class SmileLinear(nn.Module):
    """A linear layer (weight (m, n)) whose tokens are routed one by one; see `smile`."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    V: Tensor
    owner: Tensor
    gate_owner: Tensor
    bias_vectors: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        factors: Sequence[Factors],
        bias_vectors: Tensor | None,
        *,
        rank: int,
        gate_rank: int,
        top_k: int,
    ) -> None:
        """Build a layer from the base's weight and bias, the SVD of each expert as factors, and bias_vectors (T, m)."""
        super().__init__()
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.experts, self.top_k = len(factors), top_k
        self.register_buffer("A", torch.cat([f.A[:rank] for f in factors]).to(weight))
        self.register_buffer("B", torch.cat([f.B[:, :rank] for f in factors], dim=1).to(weight))
        rows = [F.normalize(f.A[:gate_rank], dim=1) for f in factors]  # A = sqrt(S) V^T
        self.register_buffer("V", torch.cat(rows))
        self.register_buffer("owner", _owners([len(f.A[:rank]) for f in factors]).to(weight.device))
        self.register_buffer("gate_owner", _owners([len(own) for own in rows]).to(weight.device))
        self.register_buffer("bias_vectors", None if bias_vectors is None else bias_vectors.to(weight))

    @property
    def added(self) -> list[Tensor]:
        """The tensors that the experts add to the base model's layer."""
        return [tensor for tensor in (self.A, self.B, self.V, self.bias_vectors) if tensor is not None]

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., m) for x (..., n). Each token uses the experts that its own gate chooses."""
        weights = gate(x.to(self.V), self.V, self.gate_owner, self.experts, self.top_k).to(x)
        y = F.linear(x, self.weight, self.bias)
        y = y + F.linear(F.linear(x, self.A) * weights[..., self.owner], self.B)
        return y if self.bias_vectors is None else y + weights @ self.bias_vectors


def install_smile(model: nn.Module, vectors: TaskVectors, *, rank: int, gate_rank: int, top_k: int) -> int:
    """Replace every linear layer of `model` that an expert changes. Return how many numbers the experts add.

    Args:
        model: holds the base model and is changed in place.
        vectors: the task vectors, under `model`'s parameter names.
        rank: the number of singular values kept of each expert.
        gate_rank: the number of right singular vectors in the gate.
        top_k: the number of experts for a token.

    Raises:
        InputError: an option is out of its range.
    """
    require_ranks(len(vectors.experts), rank, gate_rank, top_k)
    added = 0
    for path, layer in list(model.named_modules()):
        if type(layer) not in (nn.Linear, Conv1D) or f"{path}.weight" not in vectors:
            continue
        taus, bias_taus = vectors[f"{path}.weight"], _changed(vectors, f"{path}.bias")
        if not taus.any() and bias_taus is None:
            continue
        weight, taus = (layer.weight.T, taus.mT) if type(layer) is Conv1D else (layer.weight, taus)
        factors = [truncated_svd(tau, int(max(rank, gate_rank))) if tau.any() else _nothing(tau) for tau in taus]
        smile = SmileLinear(
            weight, layer.bias, factors, bias_taus, rank=int(rank), gate_rank=int(gate_rank), top_k=int(top_k)
        )
        model.set_submodule(path, smile)
        added += sum(tensor.numel() for tensor in smile.added)
    return added


def added_bytes(model: nn.Module, base: Mapping[str, Tensor]) -> int:
    """Return how many bytes the experts add, in the dtypes of the base model. The gates' vectors keep their own."""
    total = 0
    for path, layer in model.named_modules():
        if isinstance(layer, SmileLinear):
            cast = (layer.A, layer.B, layer.bias_vectors)
            numbers = sum(tensor.numel() for tensor in cast if tensor is not None)
            total += numbers * base[f"{path}.weight"].element_size() + layer.V.nbytes
    return total


def _changed(vectors: TaskVectors, name: str) -> Tensor | None:
    taus = vectors.get(name)
    return taus if taus is not None and taus.any() else None


def _nothing(tau: Tensor) -> Factors:
    return Factors(tau.new_zeros(len(tau), 0), tau.new_zeros(0, tau.shape[1]))


def _owners(ranks: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
