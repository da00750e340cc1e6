"""The bytes that a twin's model takes, read off its config and the shapes of its layers."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from twin_bench.compat import Conv1D
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers.linear import TwinConv1D
from twin_bench.twin.layers.quantised import TwinQuantised
from twin_bench.twin.memory import EXACT, Sizes

MANY_PARTS = ("gelu_new", "gelu_fast", "gelu_python", "quick_gelu", "gelu_accurate")
"""Activations that are computed from many operations, which hold two more vectors."""


def sizes_of(model: Any, fusion: Fusion, held: int) -> Sizes:
    """Return the bytes of a transformers model with twin layers.

    Args:
        model: the transformers model.
        fusion: what controls its twin layers.
        held: the bytes of everything that the twin always holds.
    """
    config, itemsize = model.config.get_text_config(), model.dtype.itemsize
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    hidden = int(getattr(config, "hidden_size", None) or 1)
    width = int(getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    layers = int(getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None) or 0)
    layers = layers or int(getattr(config, "num_hidden_layers", None) or 1)
    wide, factors = _feed_forward(model, hidden), [_factor_bytes(layer) for layer in fusion.layers]
    mixed = [cores[0].nbytes for layer in fusion.layers if (cores := getattr(layer, "basis_cores", None)) is not None]
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    many = activation in MANY_PARTS
    ranks = max((sum(layer.ranks) for layer in fusion.layers if layer.is_matrix), default=0)
    plain = (5 if many else 4) * hidden + max(sum(wide) + max(wide) * (3 if many else 1), _routed(config, hidden))
    eager = getattr(config, "_attn_implementation", None) == "eager"
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    vocabulary = 0 if output is None else int(config.vocab_size)
    cached = 2 * groups * width
    return Sizes(
        held=held,
        copy=sum(_copy_bytes(layer) for layer in fusion.layers) if fusion.keeps_copies else math.inf,
        hidden=hidden * itemsize,
        block=plain * itemsize,
        by_row=max(plain + sum(wide[1:]), 4 * hidden + sum(wide) + 2 * ranks) * itemsize,
        attention=((6 if eager else 4) * hidden + heads * width + cached) * itemsize,
        together=(heads * width + cached) * itemsize,
        rotated=3 * heads * width * itemsize,
        mask=itemsize if eager else 1,
        masked=0 if eager else itemsize,
        scores=heads * _score_bytes(config, itemsize, eager=eager),
        cached=layers * cached * itemsize,
        layer=cached * itemsize,
        repeated=0 if groups == heads else 2 * heads * width * itemsize,
        logit=vocabulary * itemsize * _logit_copies(config, output),
        exact=vocabulary * EXACT,
        factors=max(factors, default=0),
        mixed=max(mixed, default=0),
        kept_factors=sum(factors),
        kept_mixed=sum(mixed),
        encodes=bool(config.is_encoder_decoder),
    )


def _routed(config: Any, hidden: int) -> int:
    """Return the width of what a mixture of experts computes of one token at one time, for all experts it is given."""
    width = int(getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 0)
    return int(getattr(config, "num_experts_per_tok", None) or 0) * (4 * width + hidden)


def _score_bytes(config: Any, itemsize: int, *, eager: bool) -> int:
    """Return the bytes of what attention writes of a pair of tokens, of one head."""
    scores = itemsize + EXACT * (2 if itemsize < EXACT else 1) if eager else 0
    if getattr(config, "alibi", False) or config.model_type == "bloom":  # they stay while the softmax runs
        return scores + 3 * itemsize
    biased = getattr(config, "relative_attention_num_buckets", None) is not None
    return scores + 2 * itemsize if biased else scores  # each row's bias with its mask, and a copy


def _logit_copies(config: Any, output: Any) -> int:
    """Return how many copies of the logits are there at one time."""
    if type(output).__name__ == "TiedLinear":
        return 3
    return 2 if getattr(config, "final_logit_softcapping", None) else 1


def _feed_forward(model: Any, hidden: int) -> list[int]:
    """Return the widths of the widest vectors of a block that exist at one time, without the result of the last."""
    blocks: dict[str, list[int]] = {}
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        number = next((i for i, part in enumerate(name.split(".")) if part.isdecimal()), None)
        if number is None or weight is None or weight.ndim != 2 or isinstance(layer, nn.Embedding | TwinQuantised):
            continue
        out = getattr(layer, "out_features", weight.shape[isinstance(layer, Conv1D | TwinConv1D)])
        blocks.setdefault(".".join(name.split(".")[: number + 1]), []).append(int(out))
    outputs = max(blocks.values(), key=lambda own: (max(own), len(own)), default=[hidden])
    widest = max(outputs)
    return [widest] * min(outputs.count(widest), 2)


def _copy_bytes(layer: Any) -> int:
    """Return the bytes of a layer's fused copy."""
    whole = layer.is_matrix or getattr(layer, "entries", None) is not None
    return int(layer.weight.nbytes) if whole and layer.fusible else 0


def _factor_bytes(layer: Any) -> int:
    """Return the bytes of a layer's factors of all experts."""
    return math.prod((sum(layer.ranks), sum(layer.weight.shape))) * layer.weight.itemsize if layer.is_matrix else 0
