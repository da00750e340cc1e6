"""From a GGUF file to an ordinary Hugging Face checkpoint, once: experts are trained on, and merged with, those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from twin_bench.checkpoints.skeleton import quiet_transformers
from twin_bench.errors import InputError
from twin_bench.files import written_at_once


def convert(gguf: Path, directory: Path) -> None:
    """Write the language model and the tokenizer of a GGUF file to `directory`, which appears whole or not at all.

    Quantised weights are taken as what they stand for, in float32; a model without an output layer of its own
    is one whose output layer is its embedding table.

    Raises:
        InputError: no such file, not GGUF, `directory` is there already, or the package gguf is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not gguf.is_file():
        raise InputError(f"{gguf}: no such file")
    with gguf.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{gguf}: not a GGUF file")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with written_at_once(directory) as root, quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(**source)
            quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            config = AutoConfig.from_pretrained(**source)
        except ImportError as error:
            raise InputError(f"{gguf}: {str(error).strip().splitlines()[0]} (pip install gguf)") from None
        except Exception as error:  # a damaged file, or an architecture that transformers can't read from GGUF
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise InputError(
                f"{gguf}: can't be read ({reason}); give a whole GGUF file of a causal language model"
            ) from None
        weights = quantised.state_dict()
        table: Any = quantised.get_input_embeddings().weight
        # transformers refuses to save what it read as quantised: so a model of the same config, and its weights.
        for key in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(config, key):
                delattr(config, key)
        config.tie_word_embeddings = quantised.get_output_embeddings().weight.equal(table)
        config.dtype = torch.float32
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(weights)
        model.tie_weights()
        model.save_pretrained(root)
        tokenizer.save_pretrained(root)
