"""The speed of a twin's model on its device, which a GPU's planner needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from twin_bench.twin.fusion import Fusion
from twin_bench.twin.placement import input_device
from twin_bench.twin.speed import DeviceSpeed, measured_speed, seconds

SMALLEST = 8
"""The number of tokens of the smallest forward that is timed."""


def smallest_forward(model: Any) -> Callable[[], object]:
    """Return what runs a transformers model without its head, for one row of `SMALLEST` tokens."""
    ids = torch.ones(1, SMALLEST, dtype=torch.long, device=input_device(model))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return lambda: model.base_model(**inputs)


@torch.no_grad()
def timed(model: Any, fusion: Fusion) -> DeviceSpeed:
    """Return the speed of a device, and that of a model's smallest forwards on it: plain, and on the low-rank path.

    Args:
        model: the transformers model with twin layers. It is run without its head, for one row.
        fusion: what controls these layers.
    """
    device, run = input_device(model), smallest_forward(model)
    with fusion.shared():
        plain = seconds(run, device)
    with fusion.per_row(torch.full((1, fusion.experts), 1 / max(1, fusion.experts))):
        by_row = seconds(run, device)
    return replace(measured_speed(device, model.dtype), plain=plain, by_row=by_row)
