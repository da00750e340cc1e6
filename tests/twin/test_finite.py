"""What is not finite is an error where it first appears. A logit of -inf is none, if others are finite."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twin_bench import InputError, TwinModel
from twin_bench.twin.builder import build_twin
from twin_bench.twin.causal import TwinCausalLM, tokens
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.finite import peaks
from twin_bench.twin.recipe import Recipe
from twin_bench.twin.requests import Generate, Score, generate, score
from twin_bench.twin.routers.base import RouterConfig
from twin_bench.twin.routers.kinds.mlp import MlpRouter, train_router
from twin_bench.twin.sampling import Sampling
from twin_bench.twin.tolerance import sensitivity

pytestmark = pytest.mark.versions

IDS = torch.randint(4, 25, (4, 6), generator=torch.Generator().manual_seed(0))
EVEN = torch.full((4, 3), 1 / 3)


def classifier(twins: Any, **options: Any) -> TwinClassifier:
    twin = TwinModel.from_pretrained(twins("bert"), **options)
    assert isinstance(twin, TwinClassifier)
    return twin


def causal(twins: Any, kind: str = "llama", **options: Any) -> TwinCausalLM:
    twin = TwinModel.from_pretrained(twins(kind), **options)
    assert isinstance(twin, TwinCausalLM)
    return twin


def poisoned(twin: Any) -> Any:
    """Make the embedding of token 25 infinite."""
    hook = lambda module, inputs, out: out.masked_fill((inputs[0] == 25)[..., None], math.inf)  # noqa: E731
    twin.model.get_input_embeddings().register_forward_hook(hook)
    return twin


POISON = IDS.clone()
POISON[1, 2] = 25
MIXED = torch.tensor([[1, 0, 0], [0.5, 0, -2], [0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_given_weights_that_are_not_finite(twins: Any, causal_twins: Any, value: float) -> None:
    weights = EVEN.clone()
    weights[2, 1] = value
    says = r"fusion_weights: row 2 not finite; give each of \w+, \w+, \w+ a finite number"
    twin = classifier(twins)
    with pytest.raises(InputError, match=says):
        twin(IDS, fusion_weights=weights, task="cola")
    with pytest.raises(InputError, match=says):
        twin.classify([("the cat", None)] * 4, ["cola"] * 4, fusion_weights=weights)
    model = causal(causal_twins)
    for run in (model, model.generate):
        with pytest.raises(InputError, match=says):
            run(IDS, fusion_weights=weights)
    with pytest.raises(InputError, match=says):
        score(model, [Score([5], [6])] * 4, fusion_weights=weights)


def test_weights_that_are_negative_or_do_not_sum_to_one_are_weights(twins: Any) -> None:
    twin = classifier(twins)
    whole = torch.tensor([[1, -2, 3]] * 4)
    found = twin(IDS, fusion_weights=whole, task="cola").logits
    torch.testing.assert_close(found, twin(IDS, fusion_weights=whole.double(), task="cola").logits)


@pytest.mark.parametrize("weights", [MIXED, MIXED[1:2].repeat(4, 1)], ids=["rows", "fused"])
def test_logits_that_are_not_finite(twins: Any, causal_twins: Any, weights: Tensor) -> None:
    says = r"logits in float32, of the fusion with cola 0\.5, mnli -2: row 1 not finite; check the experts"
    twin = poisoned(classifier(twins))
    with pytest.raises(InputError, match=says):
        twin(POISON, fusion_weights=weights, task="cola")
    with pytest.raises(InputError, match=says):
        twin.answer([tokens(row) for row in POISON.tolist()], ["cola"] * 4, fusion_weights=weights)
    says = says.replace("cola", "mmlu").replace("mnli", "cnn_dailymail")
    model = poisoned(causal(causal_twins))
    for run in (model, model.generate):
        with pytest.raises(InputError, match=says):
            run(POISON, fusion_weights=weights)
    with pytest.raises(InputError, match=says):
        score(model, [Score(row, [5]) for row in POISON.tolist()], fusion_weights=weights)
    for steps in (1, 3):
        for decoding in (Sampling(), Sampling(temperature=1.0)):
            texts = [Generate(row, steps, decoding) for row in POISON.tolist()]
            with pytest.raises(InputError, match=says):
                generate(model, texts, fusion_weights=weights)
    with pytest.raises(InputError, match="row 1 not finite"):
        score(model, [Score(row[:2], row[2:]) for row in POISON.tolist()], fusion_weights=weights)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_text_that_becomes_not_finite(causal_twins: Any, options: dict[str, Any], value: float) -> None:
    """The third token that is generated is the first that can't be followed. A draw from NaN would end a process."""
    twin = causal(causal_twins)
    calls: list[int] = []

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(0)
        copies = len(output) // 4
        places = torch.arange(copies, 3 * copies) if len(calls) == 3 else torch.arange(0)
        return output.index_fill(0, places, value)

    twin.model.get_output_embeddings().register_forward_hook(spoil)
    with pytest.raises(InputError, match=r"rows 1, (1, 2, )?2 not finite"):
        twin.generate(IDS, fusion_weights=EVEN, max_new_tokens=6, eos_token_id=-1, **options)
    assert not twin.model._forward_hooks


def test_the_check_of_a_text_asks_the_device_once(causal_twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are generated. transformers itself asks at each token whether all rows have ended."""
    twin = causal(causal_twins)
    asked: list[Any] = []
    for name in ("__bool__", "item", "tolist"):
        plain = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, plain=plain: asked.append(0) or plain(self))

    def asks(run: Any, steps: int) -> int:
        asked.clear()
        run(steps)
        return len(asked)

    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    options = {"eos_token_id": 299, "pad_token_id": 0}
    ours = lambda steps: twin.generate(IDS, fusion_weights=EVEN, max_new_tokens=steps, **options)  # noqa: E731
    theirs = lambda steps: twin.model.generate(**inputs, max_new_tokens=steps, **options)  # noqa: E731
    assert asks(ours, 12) - asks(ours, 4) == asks(theirs, 12) - asks(theirs, 4)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_a_text_of_beams_or_draws(causal_twins: Any, options: dict[str, Any]) -> None:
    twin = poisoned(causal(causal_twins))
    with pytest.raises(InputError, match="row"):
        twin.generate(POISON, fusion_weights=MIXED, max_new_tokens=3, **options)
    assert twin.generate(IDS[:1], fusion_weights=EVEN[:1], max_new_tokens=3, **options).shape[1] <= 9


def test_weights_that_are_too_large(twins: Any) -> None:
    """A norm would divide by an infinite variance, and its output would be finite."""
    weights = EVEN.clone()
    weights[1, 1] = -1e7
    with pytest.raises(InputError, match=r"fusion_weights has 1e\+07; the largest size is 1e\+06"):
        classifier(twins)(IDS, fusion_weights=weights, task="cola")


def test_float16_is_told_from_what_holds_larger_numbers(twins: Any) -> None:
    def scaled(dtype: str) -> TwinClassifier:
        twin = classifier(twins, dtype=dtype)
        head: Any = twin.heads["mnli"].parts["classifier"]
        head.weight.copy_(torch.tensor([[6e4], [-6e4], [0]]).expand(3, 24))
        head.bias.fill_(6.5e4)
        return twin

    tasks = ["cola", "mnli", "stsb", "mnli"]
    says = r"logits in float16, of the fusion with .*: rows 1, 3 not finite; float16 holds nothing above 65504"
    with pytest.raises(InputError, match=says):
        scaled("float16")(IDS, fusion_weights=EVEN, task=tasks)
    logits = scaled("bfloat16")(IDS, fusion_weights=EVEN, task=tasks).logits
    assert torch.isfinite(logits[1::2]).all()
    assert torch.isneginf(logits[0, 2])  # cola has two labels, and mnli three


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_token_that_is_never_said_is_no_error(causal_twins: Any, kind: str) -> None:
    """Models pad their vocabulary with logits of -inf. The rest is distributed as if the token were not there."""
    twin, never = causal(causal_twins, kind), [0, 9, 250]
    plain = twin(IDS, fusion_weights=EVEN).logits
    twin.model.get_output_embeddings().register_forward_hook(
        lambda *all: all[-1].index_fill(-1, torch.tensor(never), -math.inf)
    )
    found = twin(IDS, fusion_weights=EVEN).logits
    assert torch.isneginf(found[..., never]).all()
    expected = torch.log_softmax(plain.index_fill(-1, torch.tensor(never), -1e30), dim=-1)
    torch.testing.assert_close(torch.log_softmax(found, dim=-1)[..., 10:250], expected[..., 10:250])
    scored = score(twin, [Score([5, 6], [9]), Score([5, 6], [11])], fusion_weights=EVEN[:2])
    assert scored[0].log_probs.tolist() == [-math.inf]
    assert not scored[0].greedy
    assert math.isfinite(scored[1].log_probs.item())
    text = twin.generate(IDS, fusion_weights=EVEN, max_new_tokens=5)[:, 6:]
    assert not set(text.flatten().tolist()) & {9, 250}
    assert len(generate(twin, [Generate([5, 6], 4)], fusion_weights=EVEN[:1])[0][0].tokens) == 4


def test_padding_may_hold_anything(causal_twins: Any) -> None:
    """Only what stands on tokens is an answer."""
    twin = causal(causal_twins)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output[1, :3] = math.nan
        return output

    expected = twin(IDS, mask, fusion_weights=EVEN).logits[1, 3:]
    hook = twin.model.get_output_embeddings().register_forward_hook(spoil)
    torch.testing.assert_close(twin(IDS, mask, fusion_weights=EVEN).logits[1, 3:], expected)
    with pytest.raises(InputError, match="row 1 not finite"):
        twin(IDS, fusion_weights=EVEN)
    hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_peaks_are_finite_where_logits_make_a_distribution(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0, 3], logits[1, 999], logits[2, 0], logits[3] = math.nan, math.inf, -math.inf, -math.inf
    finite = torch.log_softmax(logits.float(), dim=-1).isnan().any(dim=-1).logical_not()
    assert torch.isfinite(peaks(logits)).tolist() == finite.tolist() == [False, False, True, False, True]


def test_a_router_that_is_not_finite(twins: Any, causal_twins: Any) -> None:
    for twin in (classifier(twins), causal(causal_twins)):
        assert twin.router is not None
        rows = [tokens([5]), tokens([9, 8]), tokens([5])]
        twin.route_all(rows)
        with torch.no_grad():
            twin.router.mlp[-1].bias[1] = math.nan
        with pytest.raises(InputError, match="the router's weights: row"):
            twin.route(IDS)
        with pytest.raises(InputError, match="the router's weights: rows 0, 1, 2, 3 not finite; its logits overflow"):
            twin(IDS, **({"task": "cola"} if isinstance(twin, TwinClassifier) else {}))
        with pytest.raises(InputError, match="the router's weights: rows"):
            twin.route_all(rows)


def test_features_that_are_not_finite_name_the_requests(twins: Any) -> None:
    """Equal requests are routed once. The first of them is named."""
    twin = classifier(twins)
    embedding = twin.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, out: out.masked_fill((inputs[0] == 9)[..., None], math.inf))
    rows = [tokens(row) for row in ([5, 6], [5, 6], [9, 5], [4, 4], [9, 5])]
    says = r"the features that the router reads on layer -1: row \b(2|4)\b not finite; the model overflows"
    with pytest.raises(InputError, match=says):
        twin.route_all(rows)


def test_a_temperature_that_divides_by_almost_nothing(twins: Any) -> None:
    twin = classifier(twins)
    assert twin.router is not None
    twin.router.config = dataclasses.replace(twin.router.config, temperature=1e-300)
    with pytest.raises(InputError, match="the router's weights"):
        twin.route(IDS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("temperature", "1"),
        ("top_k", True),
        ("top_k", 1.5),
        ("top_k", None),
        ("width", 0),
        ("width", 2.5),
        ("layer", 1.5),
        ("layer", "last"),
    ],
)
def test_a_routers_config_is_checked(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"router: {name} must be"):
        MlpRouter(RouterConfig(**{"experts": ("a", "b"), "width": 4, name: value}))


def test_training_on_features_that_are_not_finite(families: Any, tmp_path: Path) -> None:
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    tasks = torch.arange(20) % 2
    bad = features.index_fill(0, torch.tensor([3]), math.nan)
    with pytest.raises(InputError, match="router: the loss on the selection rows is not finite"):
        train_router(RouterConfig(("a", "b"), 4), bad, tasks, features, tasks, epochs=2)
    family = families("bert")
    for name in ("base", *family.experts):
        shutil.copytree(family.root / name, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["bert.embeddings.word_embeddings.weight"][7] += 1e6
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    recipe = {**family.recipe, "base_model": str(tmp_path / "base"), "dtype": "float16"}
    recipe["experts"] = {name: str(tmp_path / name) for name in family.experts}
    with pytest.raises(InputError, match=r"router: .* on layer -1 is not finite for a row of \w+; set dtype: float32"):
        build_twin(Recipe.model_validate(recipe), tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


def test_a_twin_whose_logits_are_all_zero_has_no_sensitivity() -> None:
    class Silent:
        expert_names = ("a", "b")

        def probe(self, encoded: Any, tasks: Any, weights: Tensor) -> list[Tensor]:
            return [torch.zeros(3) for _ in encoded]

    with pytest.raises(InputError, match="expert 'a': all its logits are 0"):
        sensitivity(Silent(), [{}, {}], ["a", "b"], torch.eye(2))


def test_the_check_of_a_batch_asks_the_device_once(twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's own check would stop the device as often as there are layers."""
    twin = classifier(twins)
    asked = []
    plain = Tensor.__bool__
    monkeypatch.setattr(Tensor, "__bool__", lambda self: asked.append(self.shape) or plain(self))
    twin.answer([tokens([5, 6, 7])], ["cola"], fusion_weights=EVEN[:1])
    few = len(asked)
    asked.clear()
    twin.answer([tokens([5, 6, 7])] * 20 + [tokens([8, 6, 7])], ["cola"] * 21, fusion_weights=EVEN[:1].repeat(21, 1))
    assert len(asked) <= few + 1
