"""What the scheduler costs: the answers of a long request list, by a model whose own forwards cost next to nothing.

    python -m twin_bench.bench.scheduling --rows 100000

All requests begin with the same tokens, as few-shot prompts do. Routing, grouping, prefixes, batches and the
log-likelihoods of the answers count. The memory is the process's peak during the run, less what the model and the
requests took before it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from twin_bench.checkpoints.factors import Factors
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.parts import Parts
from twin_bench.twin.plan import Group
from twin_bench.twin.prefix import NO_PREFIX, Prefix
from twin_bench.twin.requests import Score, score
from twin_bench.twin.routers.base import RouterConfig
from twin_bench.twin.routers.kinds.mlp import MlpRouter

VOCABULARY = 512
EXPERTS = 4
QUESTION_TOKENS = 32
"""The length of the longest question. The shortest has a quarter of that."""


class Instant(TwinCausalLM):
    """A twin whose prefixes and logits are not computed: logits are 0. Its router reads real embeddings."""

    def prefix(self, ids: Sequence[int], group: Group, weights: Tensor) -> Prefix:
        """Return a prefix without keys and values."""
        return Prefix(len(ids), None)

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        positions: Sequence[int],
        group: Group,
        weights: Tensor,
        prefix: Prefix = NO_PREFIX,
    ) -> Tensor:
        """Return zeros (batch, positions, vocabulary)."""
        return torch.zeros(len(rows), len(positions), VOCABULARY)


def instant_twin(window: int, *, top_k: int) -> Instant:
    """Return a twin of four experts with random weights. Of each row's fusion weights, `top_k` are not 0."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=window, **shape)).eval()
    name = "model.layers.0.mlp.up_proj.weight"
    experts = {
        f"expert{number}": Exclusive({name: Factors(torch.randn(8, 1), torch.randn(1, 8))}, {})
        for number in range(EXPERTS)
    }
    router = MlpRouter(RouterConfig(tuple(experts), width=8, layer=0, top_k=top_k)).eval()
    words = Tokenizer(models.WordLevel({"[PAD]": 0}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    return Instant(model, tokenizer, Parts(exclusive=experts, router=router))


def long_list(rows: int, prefix: int) -> list[Score]:
    """Return requests for one token after `prefix` common tokens and a question of 8 to 32 tokens of its own."""
    rng = random.Random(0)
    begin = rng.choices(range(1, VOCABULARY), k=prefix)
    lengths = range(QUESTION_TOKENS // 4, QUESTION_TOKENS + 1)
    return [Score(begin + rng.choices(range(1, VOCABULARY), k=rng.choice(lengths)), [5]) for _ in range(rows)]


def measured(rows: int, *, prefix: int, top_k: int = 1, batch_size: int = 64) -> dict[str, Any]:
    """Return what one run over `rows` requests took: seconds, seconds of the processor, and MB of memory.

    Args:
        rows: the number of requests.
        prefix: the number of tokens that all of them begin with.
        top_k: of each row's four fusion weights, those that are not 0. With 1, rows share weights and so a prefix.
        batch_size: the largest number of rows in a forward.
    """
    twin, requests = instant_twin(prefix + QUESTION_TOKENS, top_k=top_k), long_list(rows, prefix)
    score(twin, requests[:100], batch_size=batch_size)  # what is imported and allocated once
    before, wall, cpu = _peak(), time.perf_counter(), time.process_time()
    score(twin, requests, batch_size=batch_size)
    return {
        "rows": rows,
        "tokens": sum(len(request.context) for request in requests),
        "top_k": top_k,
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "megabytes": round((_peak() - before) / 1e6),
    }


def _peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one run, and print the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m twin_bench.bench.scheduling", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="how many requests (default: 100000)")
    parser.add_argument("--prefix", type=int, default=256, help="how many tokens all begin with (default: 256)")
    parser.add_argument("--top-k", type=int, default=1, help="how many experts a row uses, of 4 (default: 1)")
    options = parser.parse_args(arguments)
    print(json.dumps(measured(options.rows, prefix=options.prefix, top_k=options.top_k)))


if __name__ == "__main__":
    main()
