"""WEMoE against BERT's layers run one sample at a time, each block's MLP merged for it, in float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DebertaV2Config

from tests.support.dense import batch
from tests.support.models import tiny_tokenizer
from tests.support.setting import Setting
from twin_bench import InputError
from twin_bench.adaptive.unlabelled import unlabelled_batches
from twin_bench.adaptive.wemoe import Gate, install_gates, learn_gates, mlp_layers
from twin_bench.checkpoints.factors import Factors
from twin_bench.errors import UnsuitedError
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.parts import Parts

SCALING = 0.3


def task_vectors(setting: Setting) -> dict[str, Exclusive]:
    vectors = {}
    for task, expert in setting.tuned.items():
        taus = {name: parameter - setting.base[name] for name, parameter in expert.items()}
        factors = {n: Factors(tau, torch.eye(tau.shape[1]).double()) for n, tau in taus.items() if tau.ndim == 2}
        vectors[task] = Exclusive(factors, {name: tau for name, tau in taus.items() if tau.ndim == 1})
    return vectors


def wemoe(setting: Setting, noise: float = 0.3) -> tuple[TwinClassifier, nn.ModuleList]:
    """Return a WEMoE of the setting's models, noise on all its gates, so that rows differ in their weights."""
    model = copy.deepcopy(setting.model)
    mlp = {f"{path}.{kind}" for paths in mlp_layers(model) for path in paths for kind in ("weight", "bias")}
    with torch.no_grad():
        for name, theta_0 in setting.base.items():
            if name not in mlp:
                merged = theta_0 + SCALING * sum(expert[name] - theta_0 for expert in setting.tuned.values())
                model.get_parameter(name).copy_(merged)
    gates = install_gates(model, task_vectors(setting), scaling=SCALING, seed=0)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter += noise * torch.randn_like(parameter)
    heads = {t: {n: p for n, p in e.named_parameters() if n not in setting.base} for t, e in setting.experts.items()}
    return TwinClassifier(model, tiny_tokenizer(), Parts(heads=heads), routing="none"), gates


def naive_logits(setting: Setting, gates: nn.ModuleList, task: str, ids: Tensor) -> Tensor:
    """Return one unpadded sample's logits (labels,), from transformers' own sub-modules and dense merged weights."""
    static, expert = copy.deepcopy(setting.model), setting.experts[task]
    arithmetic = {
        name: theta_0 + SCALING * sum(tuned[name] - theta_0 for tuned in setting.tuned.values())
        for name, theta_0 in setting.base.items()
    }
    static.load_state_dict(arithmetic, strict=False)
    hidden = static.bert.embeddings(ids[None])
    for index, (layer, gate) in enumerate(zip(static.bert.encoder.layer, gates, strict=True)):
        attended = layer.attention(hidden)[0]
        per_token = F.relu(attended @ gate.hidden.weight.T + gate.hidden.bias) @ gate.output.weight.T + gate.output.bias
        weights = per_token[0].sum(dim=0) / len(ids)
        dense = {}
        for name in (
            "intermediate.dense.weight",
            "intermediate.dense.bias",
            "output.dense.weight",
            "output.dense.bias",
        ):
            full = f"bert.encoder.layer.{index}.{name}"
            taus = [tuned[full] - setting.base[full] for tuned in setting.tuned.values()]
            dense[name] = setting.base[full] + sum(w * tau for w, tau in zip(weights, taus, strict=True))
        inner = F.gelu(attended @ dense["intermediate.dense.weight"].T + dense["intermediate.dense.bias"])
        outer = inner @ dense["output.dense.weight"].T + dense["output.dense.bias"]
        hidden = layer.output.LayerNorm(outer + attended)
    logits: Tensor = expert.classifier(static.bert.pooler(hidden))[0]
    return logits


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def test_logits_are_those_of_a_loop_over_samples(setting: Setting) -> None:
    """In a padded batch of all tasks, every row as alone and unpadded."""
    twin, gates = wemoe(setting)
    inputs = batch(6)
    tasks = [list(setting.experts)[row % 3] for row in range(6)]
    found = twin(**inputs, task=tasks).logits
    for row, task in enumerate(tasks):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        with torch.no_grad():
            expected = naive_logits(setting, gates, task, ids)
        torch.testing.assert_close(found[row, : len(expected)], expected, rtol=1e-7, atol=1e-9)


def test_steps_are_those_of_adam_on_the_naive_loss(setting: Setting) -> None:
    twin, gates = wemoe(setting)
    reference = copy.deepcopy(gates).requires_grad_(True)
    adam = torch.optim.Adam(reference.parameters(), lr=1e-2)
    options = {"batch_size": 3, "seed": 5}
    for batches in itertools.islice(unlabelled_batches(setting.twin, setting.rows, **options), 3):
        loss = torch.zeros(())
        for task, inputs in batches.items():
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                p = naive_logits(setting, reference, task, ids[mask.bool()]).softmax(dim=0)
                loss = loss - (p * p.log()).sum() / len(inputs["input_ids"])
        adam.zero_grad()
        loss.backward()
        adam.step()
    before = copy.deepcopy(gates)
    learn_gates(twin, gates, unlabelled_batches(twin, setting.rows, **options), steps=3, learning_rate=1e-2)
    for (name, found), expected in zip(gates.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)
        assert (found - before.get_parameter(name)).abs().max() > 1e-3
        assert not found.requires_grad


def test_gates_begin_at_task_arithmetic(setting: Setting) -> None:
    """But for their random matrices, which are small: with none at all it is exact."""
    twin, gates = wemoe(setting, noise=0.0)
    inputs = batch(4)
    arithmetic = {
        name: theta_0 + SCALING * sum(tuned[name] - theta_0 for tuned in setting.tuned.values())
        for name, theta_0 in setting.base.items()
    }
    expert = copy.deepcopy(setting.experts["mnli"])
    expert.load_state_dict(arithmetic, strict=False)
    with torch.no_grad():
        expected = expert(**inputs).logits
        torch.testing.assert_close(twin(**inputs, task="mnli").logits, expected, rtol=0.05, atol=0.05)
        for gate in gates:
            gate.output.weight.zero_()
            gate.output.bias.fill_(SCALING)
    torch.testing.assert_close(twin(**inputs, task="mnli").logits, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "distilbert", "roberta"])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_padding(kind: str) -> None:
    setting = Setting(kind)
    twin, gates = wemoe(setting)
    assert len(gates) == 2
    inputs = batch(8)
    together = twin(**inputs, task="cola").logits
    assert together.std(dim=0).max() > 1e-3
    for row in range(8):
        kept = int(inputs["attention_mask"][row].sum())
        alone = twin(**{name: tensor[row : row + 1, :kept] for name, tensor in inputs.items()}, task="cola").logits[0]
        torch.testing.assert_close(alone, together[row], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shared_keys", [True, False])
@torch.no_grad()
def test_debertas_gates_change_nothing_that_reads_positions(shared_keys: bool) -> None:
    """Its rows share one table of relative positions: a layer that read it would get the weights of several rows."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    positions: dict[str, Any] = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
    }
    config = DebertaV2Config(**shape, **positions, vocab_size=60, share_att_key=shared_keys)
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    vectors = {}
    for task in ("cola", "sst2"):
        factors = {n: Factors(torch.randn_like(p), torch.eye(p.shape[1]).double()) for n, p in matrices.items()}
        vectors[task] = Exclusive(factors, {})
    for gate in install_gates(model, vectors, scaling=SCALING, seed=0):
        gate.output.weight.normal_()
    ids = torch.randint(4, 60, (4, 6))
    alone = torch.cat([model(input_ids=ids[row : row + 1]).logits for row in range(4)])
    torch.testing.assert_close(model(input_ids=ids).logits, alone, rtol=1e-9, atol=1e-11)
    assert alone.std(dim=0).min() > 1e-6


def test_the_gate_written_out_and_the_seed() -> None:
    gate = Gate(5, 3, 0.3, torch.Generator().manual_seed(1)).double()
    hidden, mask = torch.randn(2, 4, 5).double(), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = gate(hidden, mask)
    for row, count in enumerate((3, 1)):
        tokens = [
            gate.output.weight @ (gate.hidden.weight @ h + gate.hidden.bias).clamp(min=0) + gate.output.bias
            for h in hidden[row, :count]
        ]
        torch.testing.assert_close(found[row], sum(tokens) / count)
    torch.testing.assert_close(gate(hidden[:, :1], None), gate(hidden[:, :1], mask[:, :1]))
    again, other = (Gate(5, 3, 0.3, torch.Generator().manual_seed(seed)).double() for seed in (1, 2))
    assert torch.equal(again.hidden.weight, gate.hidden.weight)
    assert not torch.equal(other.hidden.weight, gate.hidden.weight)


def test_what_can_not_be_served(setting: Setting) -> None:
    only_attention = {
        task: Exclusive({n: pair for n, pair in vector.factors.items() if "attention" in n}, {})
        for task, vector in task_vectors(setting).items()
    }
    with pytest.raises(UnsuitedError, match="no expert changes one"):
        install_gates(copy.deepcopy(setting.model), only_attention, scaling=0.3, seed=0)
    twin, gates = wemoe(setting)
    with pytest.raises(InputError, match="learning_rate must be above 0, not 0"):
        learn_gates(twin, gates, iter([]), steps=1, learning_rate=0)
