"""Conversion of a GGUF file to a Hugging Face checkpoint. Experts are trained on and merged with the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from twin_bench.checkpoints.finite import require_finite
from twin_bench.checkpoints.skeleton import quiet_transformers
from twin_bench.checkpoints.tokenizers import save_tokenizer
from twin_bench.errors import InputError, first_line
from twin_bench.files import written_at_once


def convert(gguf: Path, directory: Path) -> None:
    """Write the language model and the tokenizer of a GGUF file to `directory`, which appears whole or not at all.

    Quantised weights are dequantised to float32. The embeddings are tied if the output layer's weight equals the
    embedding table.

    Raises:
        InputError: The file does not exist or is not GGUF, a weight is NaN or inf, `directory` exists already, or the
            package gguf is missing.
    """
    try:
        with gguf.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise InputError(f"{gguf}: not a GGUF file")
    except OSError as error:  # It is missing, a directory, or may not be read.
        raise InputError(
            f"{gguf}: {(error.strerror or str(error)).lower()}; give a GGUF file that can be read"
        ) from None
    with written_at_once(directory) as root, quiet_transformers():
        tokenizer, quantised, config = _read(gguf)
        model = _dequantised(quantised, config)
        for name, tensor in model.state_dict().items():
            require_finite(tensor, name, str(gguf), "give another file of that model")
        model.save_pretrained(root)
        save_tokenizer(tokenizer, root)


def _read(gguf: Path) -> tuple[Any, Any, Any]:
    """Return tokenizer, model and config of a GGUF file. InputError if transformers can't read it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        return tokenizer, quantised, AutoConfig.from_pretrained(**source)
    except ImportError as error:
        raise InputError(f"{gguf}: {first_line(error)} (pip install gguf)") from None
    except Exception as error:  # The file is damaged, or transformers can't read this architecture from GGUF.
        raise InputError(
            f"{gguf}: can't be read ({first_line(error)}); give a whole GGUF file of a causal language model"
        ) from None


def _dequantised(quantised: Any, config: Any) -> Any:
    """Return a new model of the same config and weights, in float32.

    transformers refuses to save a model that it read as a quantised one.
    """
    from transformers import AutoModelForCausalLM

    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, key):
            delattr(config, key)
    config.tie_word_embeddings = quantised.get_output_embeddings().weight.equal(quantised.get_input_embeddings().weight)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    return model
