"""AdaRank (Lee et al., 2025): which singular components of each task vector are kept is learned on test inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from twin_bench.adaptive.adamerging import combined
from twin_bench.adaptive.entropy import Gradient, at_test_time
from twin_bench.adaptive.learning import Learning, check_learning
from twin_bench.adaptive.unlabelled import adapted_note
from twin_bench.contenders import Contender, Context
from twin_bench.contenders.context import static_contender
from twin_bench.errors import InputError
from twin_bench.measured import Meter
from twin_bench.merging.device import OnDevice
from twin_bench.merging.registry import served_method
from twin_bench.merging.spectral import rounding, svd
from twin_bench.merging.task_vectors import TaskVectors

START = 0.1
"""The logit of every mask before the first step, as in the authors' code. A component is kept while it is above 0."""


def check_options(
    context: Context, *, steps: int, learning_rate: float, batch_size: int, temperature: float, **others: object
) -> None:
    """Raise an InputError unless AdaRank's options are in their ranges."""
    check_learning(context, steps=steps, learning_rate=learning_rate, batch_size=batch_size)
    if not temperature > 0:
        raise InputError(f"adarank: temperature must be above 0, not {temperature}")


@served_method(
    title="AdaRank",
    paper="arXiv:2503.22178",
    track="test-time",
    needs=("unlabelled test inputs", "seed"),
    sees=("scored rows",),
    check_options=check_options,
)
def adarank(
    context: Context,
    *,
    scaling: float = 0.3,
    steps: int = 5000,
    learning_rate: float = 5e-5,
    batch_size: int = 8,
    temperature: float = 10.0,
    seed: int = 0,
) -> Iterator[Contender]:
    """theta_0 + sum_t lambda_t^l U_t diag(m_t s_t) V_t^T, binary m learned from the entropy on unlabelled test inputs.

    U_t diag(s_t) V_t^T is the SVD of tau_t, matrix by matrix. Each singular component has a logit, and its mask is 1
    where the logit is above 0. Its gradient is straight-through: that of sigmoid(logit / temperature) in the mask's
    place. The coefficients lambda are learned with the masks, one for each expert and parameter, as in AdaMerging but
    not clamped. Vectors have coefficients alone. Both minimise the sum over tasks of the mean entropy of predictions on
    batches of *test* inputs, each task under its own head. Learning runs in float32, and no label decides anything.

    The defaults are the authors' for RoBERTa on task arithmetic. All components are kept at first, with logits of 0.1.
    Adam moves a logit by about `learning_rate` a step, so no component is dropped before step 0.1 / learning_rate,
    which is 2,000. A shorter run needs a higher rate. The authors' second start, from the experts' mean with 4% of the
    components (CART), is not built. As in their code, embedding tables stay the base model's. Components that are
    rounding error are left out: a LoRA expert's task vector has as many as its rank.
    """
    with Meter(context.device) as meter:
        known = at_test_time(context, batch_size=batch_size, seed=seed, steps=steps)
        sources = context.sources
        learned = LearnedRanks(
            known.vectors, unmerged=sources.skeleton.embeddings, scaling=scaling, temperature=temperature
        )
        learned.learn(known.gradient, steps=steps, learning_rate=learning_rate, learning=known.learning)
        merged = {**sources.base, **OnDevice(learned.parameters(), "cpu")}
        contender = static_contender(merged, context.names, context)
    build = meter.taken.after(known.learning.earlier)
    yield dataclasses.replace(contender, build=build, notes=adapted_note(known.inputs))


class Components(NamedTuple):
    """The singular components of all experts' task vectors of one matrix (m, n): U (m, R), S (R), V (n, R).

    `owner` (R) is the number of each component's expert.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    owner: Tensor

    def combined(self, base: Tensor, coefficients: Tensor, kept: Tensor) -> Tensor:
        """Return base + sum_t coefficients[t] U_t diag(kept_t s_t) V_t^T."""
        return base + (self.U * (coefficients[self.owner] * kept * self.S)) @ self.V.T

    def slopes(self, gradient: Tensor) -> Tensor:
        """Return s_k u_k^T G v_k (R): the derivative of a loss for each component's weight, G (m, n) being its own."""
        return self.S * ((gradient @ self.V) * self.U).sum(dim=0)


class LearnedRanks:
    """Masks and coefficients over the singular components of task vectors; see `adarank`.

    `coefficients` is (parameters, T), its rows in the order of `components` and then of `vectors`. `logits` holds the
    logits (R) of each matrix's masks.
    """

    def __init__(
        self, vectors: TaskVectors, *, unmerged: Collection[str] = (), scaling: float, temperature: float
    ) -> None:
        """Decompose the task vectors. The parameters `unmerged` stay the base's, as do those that no expert changed."""
        self._temperature = temperature
        self._base: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self.components: dict[str, Components] = {}
        self.vectors: dict[str, Tensor] = {}
        for name in vectors.floating():
            taus, base = vectors[name], vectors.base[name]
            if name in unmerged or not taus.any():
                continue
            self._base[name], self._dtypes[name] = base.to(taus), base.dtype
            if taus.ndim == 3:
                self.components[name] = decomposed(name, self._base[name], taus)
            else:
                self.vectors[name] = taus
        names = [*self.components, *self.vectors]
        device = next(iter(self._base.values())).device if names else None
        self._rows = {name: row for row, name in enumerate(names)}
        self.coefficients = torch.full((len(names), len(vectors.experts)), float(scaling), device=device)
        self.logits = {name: torch.full_like(own.S, START) for name, own in self.components.items()}

    def parameters(self) -> dict[str, Tensor]:
        """Return the merged parameters that an expert changed, in the base's dtypes."""
        return {name: tensor.to(self._dtypes[name]) for name, tensor in self._exact().items()}

    def learn(self, gradient: Gradient, *, steps: int, learning_rate: float, learning: Learning | None = None) -> None:
        """Take `steps` of Adam, those that `learning` has taken included.

        `gradient` maps merged parameters to a loss's gradient at them. It is called once a step. The loss is not
        differentiated through the merge: the derivative for a component follows from the gradient at its matrix.

        Raises:
            InputError: steps is not a whole number from 0, or learning_rate is not above 0.
        """
        parameters = {"coefficients": self.coefficients, **{f"logits.{n}": own for n, own in self.logits.items()}}
        (learning or Learning()).descend(
            parameters,
            lambda: self._set_slopes(gradient(self._exact())),
            method="adarank",
            steps=steps if self._base else 0,
            learning_rate=learning_rate,
        )

    def _exact(self) -> dict[str, Tensor]:
        found = {
            name: own.combined(self._base[name], self._row(name), self.logits[name] > 0)
            for name, own in self.components.items()
        }
        return found | {n: combined(self._base[n], taus, self._row(n)) for n, taus in self.vectors.items()}

    def _set_slopes(self, gradients: Mapping[str, Tensor]) -> None:
        rows = []
        for name, own in self.components.items():
            slopes, logits = own.slopes(gradients[name].to(own.U)), self.logits[name]
            soft = (logits / self._temperature).sigmoid()
            logits.grad = self._row(name)[own.owner] * slopes * soft * (1 - soft) / self._temperature
            kept = torch.where(logits > 0, slopes, 0.0)
            rows.append(torch.zeros_like(self._row(name)).index_add_(0, own.owner, kept.to(self.coefficients)))
        for name, taus in self.vectors.items():
            slopes = taus.reshape(len(taus), -1) @ gradients[name].to(taus).flatten()
            rows.append(slopes.to(self.coefficients))
        self.coefficients.grad = torch.stack(rows)

    def _row(self, name: str) -> Tensor:
        return self.coefficients[self._rows[name]]


def decomposed(name: str, base: Tensor, taus: Tensor) -> Components:
    """Return the singular components of task vectors (T, m, n), without those of rounding error."""
    parts = [svd(tau, name, above=rounding(base, taus)) for tau in taus]
    U, S, V = (torch.cat([factor.to(taus) for factor in factors], dim=-1) for factors in zip(*parts, strict=True))
    counts = torch.tensor([len(part[1]) for part in parts], device=taus.device)
    return Components(U, S, V, torch.repeat_interleave(torch.arange(len(parts), device=taus.device), counts))
