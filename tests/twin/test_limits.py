"""The limits of models that have no token types, no absolute positions, or no vocabulary; and of a window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twin_bench import InputError, TwinModel
from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.skeleton import context_window
from twin_bench.twin.arguments import checked_batch, require_encoded
from twin_bench.twin.causal import tokens
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.layers import install
from twin_bench.twin.requests import Generate, Score, check_generate, generate, score

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "deberta": transformers.DebertaV2Config(
        vocab_size=50, relative_attention=True, position_biased_input=False, pos_att_type=["p2c"], **SMALL
    ),
    "t5": transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=12, d_ff=24, num_layers=1, num_heads=2, eos_token_id=3, decoder_start_token_id=0
    ),
    "xlnet": transformers.XLNetConfig(vocab_size=50, d_model=24, n_layer=1, n_head=2, d_inner=24),
}  # fmt: skip


def answered(config: Any, inputs: dict[str, Tensor]) -> Tensor:
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        logits: Tensor = model(**checked_batch(inputs, model)).logits
    return logits


@pytest.mark.parametrize(("kind", "length"), [("deberta", 40), ("t5", 2100), ("xlnet", 40)])
def test_relative_positions_have_no_window(kind: str, length: int) -> None:
    ids = torch.full((1, length), 5)
    ids[:, -1] = 3
    assert answered(CONFIGS[kind], {"input_ids": ids}).shape == (1, 2)
    require_encoded([tokens(ids[0].tolist())], CONFIGS[kind])
    assert context_window(CONFIGS[kind]) == (32 if kind == "deberta" else 2048)


def test_absolute_positions_beside_relative_ones_have_a_window() -> None:
    config = transformers.DebertaV2Config(vocab_size=50, relative_attention=True, pos_att_type=["p2c"], **SMALL)
    with pytest.raises(InputError, match="an input of 40 tokens; the model's window is 32"):
        answered(config, {"input_ids": torch.full((1, 40), 5)})


def test_a_model_without_token_types_ignores_them() -> None:
    config = transformers.DebertaV2Config(vocab_size=50, type_vocab_size=0, **SMALL)
    ids = torch.tensor([[2, 5, 6, 3, 7, 3]])
    torch.manual_seed(0)
    found = answered(config, {"input_ids": ids, "token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1]])})
    torch.manual_seed(0)
    assert torch.equal(found, answered(config, {"input_ids": ids}))


def test_a_model_without_a_vocabulary_takes_any_token() -> None:
    config = transformers.CanineConfig(downsampling_rate=4, num_hash_buckets=64, local_transformer_stride=16, **SMALL)
    assert answered(config, {"input_ids": torch.full((1, 32), 57344)}).shape == (1, 2)
    require_encoded([tokens([57344] * 32)], config)
    with pytest.raises(InputError, match="the model's window is 32"):
        require_encoded([tokens([57344] * 33)], config)


class Float64Refused(TorchDispatchMode):
    """Stands for MPS, which has no float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        assert not (isinstance(found, Tensor) and found.dtype == torch.float64), func
        return found


def test_inputs_are_checked_without_float64(twins: Any) -> None:
    twin: Any = TwinModel.from_pretrained(twins("bert"))
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "token_type_ids": torch.zeros_like(ids)}
    with Float64Refused():
        assert checked_batch(inputs, twin.model) == inputs
        twin.route(**inputs)
        with pytest.raises(InputError, match="attention_mask has 0 to 2"):
            checked_batch({**inputs, "attention_mask": inputs["attention_mask"] * 2}, twin.model)


def test_a_large_token_is_named_exactly(twins: Any) -> None:
    ids = torch.tensor([[2, 2**62 + 1, 3]])
    with pytest.raises(InputError, match=f"token {2**62 + 1} in a context"):
        TwinModel.from_pretrained(twins("bert"))(ids, task="cola")


def test_whole_numbers_may_be_numpy_s(twins: Any, causal_twins: Any) -> None:
    ids = [2, 5, 6, 3]
    of_numpy: Any = list(np.array(ids))
    classifier, causal = TwinModel.from_pretrained(twins("bert")), TwinModel.from_pretrained(causal_twins("llama"))
    (found,) = classifier.answer([tokens(of_numpy)], ["cola"], batch_size=np.int64(4))
    (expected,) = classifier.answer([tokens(ids)], ["cola"])
    assert torch.equal(found.logits, expected.logits)
    texts: Any = [("the cat sat on a dog", None)]
    for twin in (classifier, causal):
        assert twin.encode(texts, max_length=np.int64(3)) == twin.encode(texts, max_length=3)
    sizes: Any = {"batch_size": np.int64(4), "max_length": np.int64(40)}
    (scored,), (same,) = score(causal, [Score(of_numpy, of_numpy)], **sizes), score(causal, [Score(ids, ids)])
    assert torch.equal(scored.log_probs, same.log_probs)
    few: Any = np.int64(3)
    assert (
        generate(causal, [Generate(of_numpy, few)], **sizes)[0][0].tokens
        == generate(causal, [Generate(ids, 3)])[0][0].tokens
    )
    for wrong in (True, np.True_, np.float64(4.0)):
        with pytest.raises(InputError, match="batch_size must be a whole number"):
            score(causal, [Score(ids, ids)], batch_size=wrong)
        with pytest.raises(InputError, match="in a context: a token's id is a whole number"):
            score(causal, [Score([5, wrong], ids)])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_request_list_keeps_to_the_window(causal_twins: Any, kind: str) -> None:
    twin: Any = TwinModel.from_pretrained(causal_twins(kind))
    says = "max_length 200: the model's window is 64"
    with pytest.raises(InputError, match=says):
        check_generate(twin, Generate([5] * 100, 2), 200)
    for given in ({"max_length": 200}, {}):
        with pytest.raises(InputError, match=says):
            score(twin, [Score([5] * 100, [6])], **given)
        with pytest.raises(InputError, match=says):
            generate(twin, [Generate([5] * 100, 2)], **given)
        twin.max_length = 200


@pytest.mark.parametrize(
    ("kind", "changed", "says"),
    [
        ("xlnet", "layer.0.ff.layer_1", "its layers take tokens before rows"),
        ("deberta", "rel_embeddings", "the model reads the whole table"),
    ],
)
def test_models_whose_layers_do_not_see_rows_are_refused(kind: str, changed: str, says: str) -> None:
    """Their low-rank path gave wrong answers in silence: XLNet's where a batch had as many rows as tokens."""
    model = transformers.AutoModelForSequenceClassification.from_config(CONFIGS[kind])
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith(f"{changed}.weight"))
    factors = Factors(torch.ones(len(weight), 1), torch.ones(1, weight.shape[1]))
    with pytest.raises(InputError, match=says):
        install(model, {"a": Exclusive({name: factors}, {})})
    install(model, {})
