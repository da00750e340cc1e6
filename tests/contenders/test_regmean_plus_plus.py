"""RegMean++ against a second implementation, which runs the whole model anew for every block and every expert."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import twin_bench
from tests.support.models import tiny_causal, tiny_classifier
from twin_bench.contenders.regmean_plus_plus import BlockByBlock
from twin_bench.merging.calibration import Example, gram_matrices

ALPHA = 0.8
BLOCKS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers"}


def solved(weights: list[torch.Tensor], inputs: list[torch.Tensor]) -> torch.Tensor:
    """Return (sum G)^-1 sum G W (in, out), off-diagonals of G times ALPHA, in float64."""
    grams = [x.T @ x / len(x) for x in inputs]
    grams = [ALPHA * g + (1 - ALPHA) * torch.diag(g.diagonal()) for g in grams]
    return torch.linalg.solve(sum(grams), sum(g @ w for g, w in zip(grams, weights, strict=True)))


def naive(base: Any, experts: dict[str, Any], rows: dict[str, list[Example]], kind: str) -> Any:
    """Return the merged model in float64."""
    merged = copy.deepcopy(base).double()
    names = [name for name, _ in base.base_model.named_parameters(prefix=base.base_model_prefix)]
    state = {n: torch.stack([e.state_dict()[n].double() for e in experts.values()]).mean(dim=0) for n in names}
    blocks = [f"{BLOCKS[kind]}.{depth}." for depth in range(2)]
    merged.load_state_dict({n: t for n, t in state.items() if not n.startswith(tuple(blocks))}, strict=False)
    for prefix in [*blocks, "bert.pooler."]:
        paths = [p for p, m in merged.named_modules() if p.startswith(prefix) and isinstance(m, nn.Linear | Conv1D)]
        seen: dict[str, dict[str, torch.Tensor]] = {}
        for task, expert in experts.items():
            hybrid = copy.deepcopy(merged)
            own_block = {n: p.double() for n, p in expert.named_parameters() if n.startswith(prefix)}
            hybrid.load_state_dict(own_block, strict=False)
            kept: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
            for path in paths:
                layer = hybrid.get_submodule(path)
                layer.register_forward_pre_hook(lambda _, args, kept=kept[path]: kept.append(args[0].detach()))
            for row in rows[task]:
                hybrid(**row.inputs)
            seen[task] = {path: torch.cat([x.flatten(0, -2) for x in own]) for path, own in kept.items()}
        for path in paths:
            conv = isinstance(merged.get_submodule(path), Conv1D)
            own = [e.get_parameter(f"{path}.weight").detach().double() for e in experts.values()]
            found = solved([w if conv else w.T for w in own], [seen[task][path] for task in experts])
            state[f"{path}.weight"] = found if conv else found.T
        merged.load_state_dict({n: t for n, t in state.items() if n.startswith(prefix)}, strict=False)
    return merged


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_each_block_is_merged_on_what_the_merged_blocks_below_give_it(kind: str) -> None:
    make = (lambda **o: tiny_causal(kind, **o)) if kind == "llama" else (lambda **o: tiny_classifier(kind, **o))
    base = make()
    experts = {task: make(seed=seed, like=base, noise=0.2) for seed, task in enumerate("ab", 1)}
    draw = torch.Generator().manual_seed(0)
    rows = {
        task: [Example({"input_ids": torch.randint(4, 28, (1, 5 + n), generator=draw)}) for n in range(6)]
        for task in experts
    }
    names = [n for n, _ in base.named_parameters() if n.startswith(base.base_model_prefix)]
    parameters = {t: {n: m.get_parameter(n).detach() for n in names} for t, m in {"": base, **experts}.items()}
    theta_0, tuned = parameters.pop(""), parameters
    merging = BlockByBlock(copy.deepcopy(base), theta_0, tuned, ALPHA, torch.device("cpu"))
    found = merging.merge(rows)
    expected = naive(base, experts, rows, kind)
    assert found.keys() == theta_0.keys()
    statistics = {task: gram_matrices(expert, rows[task]) for task, expert in experts.items()}
    plain = twin_bench.merge("regmean", theta_0, tuned, statistics=statistics, alpha=ALPHA)
    assert max((plain[name] - tensor).abs().max() for name, tensor in found.items()) > 1e-2
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected.get_parameter(name), rtol=1e-3, atol=2e-4, msg=name)
