"""Twins of random numbers in shapes whose activations, keys and logits take more memory than all else."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.support.models import tiny_causal_tokenizer, tiny_seq2seq_tokenizer
from twin_bench.checkpoints.factors import Factors
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.parts import Parts
from twin_bench.twin.seq2seq import TwinSeq2Seq

WIDTH, LAYERS, HEADS, VOCABULARY = 128, 3, 4, 2000
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 344,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 1024,
}
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def random_model(kind: str) -> Any:
    """Return a random llama, `eager` or with `grouped` queries or `longrope`, or a model of another family."""
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **TOKENS))
    if kind == "opt":
        shape = {**SHAPE, "ffn_dim": 512, "word_embed_proj_dim": WIDTH}
        return transformers.OPTForCausalLM(transformers.OPTConfig(**shape, **TOKENS))
    if kind == "bart":
        halves = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in BART.items()}
        config = transformers.BartConfig(d_model=WIDTH, forced_eos_token_id=None, **halves, **TOKENS)
        return transformers.BartForConditionalGeneration(config)
    if kind == "t5":
        shape = {"d_model": WIDTH, "d_kv": 32, "d_ff": 512, "num_layers": LAYERS, "num_heads": HEADS}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(decoder_start_token_id=0, **shape, **TOKENS)
        )
    if kind == "gemma2":  # whose logits take more than all else
        shape = {**SHAPE, **TOKENS, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 20_000}
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**shape))
    if kind == "bloom":
        shape = {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
        return transformers.BloomForCausalLM(transformers.BloomConfig(**shape, **TOKENS))
    if kind == "roberta":  # whose positions begin after the padding's
        shape = {**SHAPE, "max_position_embeddings": 1025, "is_decoder": True, "bos_token_id": 2}
        shape |= {"pad_token_id": 0, "vocab_size": VOCABULARY}
        return transformers.RobertaForCausalLM(transformers.RobertaConfig(**shape))
    if kind == "longrope":
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "factor": 4.0}
        rope |= {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
        name = "rope_parameters" if "rope_parameters" in transformers.LlamaConfig().to_dict() else "rope_scaling"
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{name: rope}, **SHAPE, **TOKENS))
    groups, attention = (1 if kind == "grouped" else HEADS), ("eager" if kind == "eager" else None)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_key_value_heads=groups, attn_implementation=attention, **SHAPE, **TOKENS)
    )


BLOCKS = (".layers.", ".layer.", ".h.", ".block.")
BART = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 512}


def random_twin(kind: str, dtype: torch.dtype = torch.float32, *, experts: int = 4, rank: int = 2) -> Any:
    """Return a twin of a random model whose experts change the matrices of its blocks."""
    model = random_model(kind).to(dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # every text has its full length
    model.generation_config.pad_token_id = 0
    blocks = {n: p.shape for n, p in model.named_parameters() if p.ndim == 2 and any(part in n for part in BLOCKS)}
    blocks = {n: shape for n, shape in blocks.items() if "relative" not in n}
    exclusive = {
        f"expert{number}": Exclusive(
            {n: Factors(0.02 * torch.randn(m, rank), torch.randn(rank, k)) for n, (m, k) in blocks.items()}, {}
        )
        for number in range(experts)
    }
    tokenizer = tiny_seq2seq_tokenizer() if kind in ("bart", "t5") else tiny_causal_tokenizer()
    served = TwinSeq2Seq if kind in ("bart", "t5") else TwinCausalLM
    return served(model, tokenizer, Parts(exclusive=exclusive, max_length=1024))
