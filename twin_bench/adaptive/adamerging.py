"""AdaMerging (Yang et al., 2024), layer-wise: coefficients learned from the entropy of predictions on test inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from twin_bench.adaptive.entropy import Gradient, at_test_time
from twin_bench.adaptive.learning import Learning, check_learning
from twin_bench.adaptive.unlabelled import adapted_note
from twin_bench.contenders import Contender, Context
from twin_bench.contenders.context import static_contender
from twin_bench.measured import Meter
from twin_bench.merging.device import OnDevice
from twin_bench.merging.registry import served_method
from twin_bench.merging.task_vectors import TaskVectors


@served_method(
    title="AdaMerging, layer-wise",
    paper="arXiv:2310.02575",
    track="test-time",
    needs=("unlabelled test inputs", "seed"),
    sees=("scored rows",),
    check_options=check_learning,
)
def adamerging(
    context: Context,
    *,
    scaling: float = 0.3,
    steps: int = 500,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
) -> Iterator[Contender]:
    """theta_0 + sum_t clamp(lambda_t^l, 0, 1) tau_t^l, lambda learned from the entropy on unlabelled test inputs.

    lambda minimises the sum over tasks of the mean entropy of the merged model's predictions on batches of *test*
    inputs. Each task is predicted under its own head. A layer l is one parameter tensor, as in the authors' layer-wise
    code and in FusionBench's, so a weight and its bias have separate coefficients.

    The clamp comes from the authors' code; the paper has none. lambda's start (`scaling`, 0.3) and Adam with 1e-3 and
    500 steps come from that code as well. A step takes one batch of `batch_size` inputs of every task, as in the paper
    and FusionBench; the authors' loop takes two. No label decides anything. A regression head has no entropy, so its
    task adds no loss, and its coefficients follow the other tasks' losses. Learning runs in float32.
    """
    with Meter(context.device) as meter:
        known = at_test_time(context, batch_size=batch_size, seed=seed, steps=steps)
        coefficients = learn_coefficients(
            known.vectors,
            known.gradient,
            scaling=scaling,
            steps=steps,
            learning_rate=learning_rate,
            learning=known.learning,
        )
        merged = OnDevice(merge_with_coefficients(known.vectors, coefficients), "cpu")
        contender = static_contender(merged, context.names, context)
    build = meter.taken.after(known.learning.earlier)
    yield dataclasses.replace(contender, build=build, notes=adapted_note(known.inputs))


def learn_coefficients(
    vectors: TaskVectors,
    gradient: Gradient,
    *,
    scaling: float,
    steps: int,
    learning_rate: float,
    learning: Learning | None = None,
) -> dict[str, Tensor]:
    """Return the coefficients of each changed parameter, clamped to [0, 1]: (T,) in float32.

    The loss is never differentiated through the sum over experts. Its gradient G^l at the merged parameters gives d
    loss / d lambda_t^l = <G^l, tau_t^l>. Memory holds the activations of one model, and all task vectors of the
    parameters that some expert changed.

    Args:
        vectors: the task vectors.
        gradient: maps the merged parameters that some expert changed to the loss's gradient at them. It is called once
            a step, so it can draw the next batch.
        scaling: the initial value of all coefficients.
        steps: the number of Adam's steps.
        learning_rate: Adam's.
        learning: the steps that earlier runs have taken. `gradient` is called for the remaining steps.

    Raises:
        InputError: steps is not a whole number from 0, or learning_rate is not above 0.
    """
    floats = [name for name in vectors if vectors.base[name].is_floating_point()]
    taus = {name: tau for name in floats if (tau := vectors[name]).any()}
    base = {name: vectors.base[name].to(tau.dtype) for name, tau in taus.items()}
    coefficients = torch.full((len(taus), len(vectors.experts)), float(scaling))

    def set_slopes() -> None:
        clamped = coefficients.clamp(0, 1)
        gradients = gradient(
            {name: combined(base[name], tau, row) for row, (name, tau) in zip(clamped, taus.items(), strict=True)}
        )
        slopes = [tau.reshape(len(tau), -1) @ gradients[name].to(tau).flatten() for name, tau in taus.items()]
        coefficients.grad = torch.where(coefficients == clamped, torch.stack(slopes).to(coefficients), 0.0)

    (learning or Learning()).descend(
        {"coefficients": coefficients},
        set_slopes,
        method="adamerging",
        steps=steps if taus else 0,
        learning_rate=learning_rate,
    )
    return dict(zip(taus, coefficients.clamp(0, 1), strict=True))


def merge_with_coefficients(vectors: TaskVectors, coefficients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """theta_0^l + sum_t lambda_t^l tau_t^l for coefficients (T,). A parameter without coefficients stays theta_0's."""

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        return combined(base, taus, coefficients[name]) if name in coefficients else base

    return vectors.merged(merge)


def combined(base: Tensor, taus: Tensor, coefficients: Tensor) -> Tensor:
    """Return base + sum_t coefficients[t] taus[t]."""
    return base + torch.tensordot(coefficients.to(taus), taus, dims=1)
