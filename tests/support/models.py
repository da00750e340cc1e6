"""Tiny models of real architectures, and their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = "the a cat dog bird sat ran saw on under big small red blue quick lazy why who did not and or is it"
WORDS = TEXT.split(" ")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CAUSAL_VOCABULARY = 300  # the bytes, the special tokens and some merges


def tiny_tokenizer(kind: str = "bert") -> Any:
    """Return a word-level tokenizer that wraps texts and pairs as BERT's does; DistilBERT takes no token types."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", *([] if kind == "distilbert" else ["token_type_ids"]), "attention_mask"],
    )


def tiny_config(kind: str, num_labels: int = 2) -> Any:
    """Return the config of a two-layer model: bert, roberta, distilbert or gpt2."""
    vocabulary = len(SPECIAL) + len(WORDS)
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=64,
            n_embd=24,
            n_layer=2,
            n_head=2,
            pad_token_id=0,
            num_labels=num_labels,
        )
    if kind == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=vocabulary, dim=24, hidden_dim=40, n_layers=2, n_heads=2, num_labels=num_labels
        )
    classes = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}
    return classes[kind](
        vocab_size=vocabulary,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=70,
        type_vocab_size=2 if kind == "bert" else 1,
        pad_token_id=0,
        num_labels=num_labels,
    )


def tiny_classifier(
    kind: str,
    num_labels: int = 2,
    seed: int = 0,
    like: Any = None,
    noise: float = 0.05,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """Return a random classifier, or one whose backbone is `like`'s plus noise in every parameter.

    `config` holds settings that differ from those of `tiny_config`.
    """
    torch.manual_seed(seed)
    settings = tiny_config(kind, num_labels)
    settings.update(dict(config or {}))
    model = transformers.AutoModelForSequenceClassification.from_config(settings).eval()
    if like is not None:
        model.base_model.load_state_dict(like.base_model.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            backbone = name.startswith(model.base_model_prefix)
            parameter += (noise if backbone else 0.5) * torch.randn_like(parameter)
    return model


def tiny_causal_config(kind: str) -> Any:
    """Return the config of a two-layer language model: llama, qwen2 or gemma with grouped queries, gpt2 or opt."""
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": CAUSAL_VOCABULARY}
    if kind == "gpt2":
        return transformers.GPT2Config(n_positions=64, n_embd=24, n_layer=2, n_head=2, **tokens)
    shape = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if kind == "opt":
        return transformers.OPTConfig(
            hidden_size=24,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=24,
            **tokens,
        )
    if kind == "gemma":
        return transformers.GemmaConfig(head_dim=6, **shape, **tokens)
    classes = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    return classes[kind](tie_word_embeddings=kind == "llama", **shape, **tokens)


def tiny_causal(kind: str, seed: int = 0, like: Any = None, noise: float = 0.1) -> Any:
    """Return a random language model, or one that is `like` plus noise in every parameter, biases and norms too."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_causal_config(kind)).eval()
    if like is not None:
        model.load_state_dict(like.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def tiny_seq2seq_config(kind: str) -> Any:
    """Return the config of a t5, flan-t5 or mt5 with three and two blocks, or of a bart with three in each half."""
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": CAUSAL_VOCABULARY}
    if kind == "bart":
        return transformers.BartConfig(
            d_model=24,
            encoder_layers=3,  # transformers 4.56 can't generate with more blocks in the decoder
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=2,
            encoder_ffn_dim=40,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            scale_embedding=True,
            decoder_start_token_id=3,
            forced_eos_token_id=None,
            **tokens,
        )
    gated = kind != "t5"
    return (transformers.MT5Config if kind == "mt5" else transformers.T5Config)(
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        decoder_start_token_id=0,
        n_positions=64,
        **tokens,
    )


def tiny_seq2seq(kind: str, seed: int = 0, like: Any = None, noise: float = 0.1) -> Any:
    """Return a random encoder-decoder, or one that is `like` plus noise in every parameter.

    The output layers of flan-t5 and mt5 are their own, and no embedding table.
    """
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForSeq2SeqLM.from_config(tiny_seq2seq_config(kind)).eval()
    if kind in ("flan-t5", "mt5"):
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    if like is not None:
        model.load_state_dict(like.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def tiny_seq2seq_tokenizer() -> Any:
    """Return the tokenizer of `tiny_causal_tokenizer`, which ends a text as T5's does."""
    tokenizer = tiny_causal_tokenizer()
    ending = processors.TemplateProcessing(single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 3)])
    tokenizer.backend_tokenizer.post_processor = ending
    return tokenizer


def tiny_causal_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer, as GPT-2's, Qwen's and SmolLM's are, that adds nothing to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CAUSAL_VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )
