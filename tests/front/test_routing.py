"""The front routes as the twin does, and takes the adapter that is nearest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.families import Family
from twin_bench import InputError, TwinModel
from twin_bench.export.served import Served
from twin_bench.front.routing import PromptRouter, nearest_adapter

ONE_HOT = {"a": (1.0, 0.0, 0.0), "b": (0.0, 1.0, 0.0), "c": (0.0, 0.0, 1.0)}


def test_the_largest_weight_decides_among_experts() -> None:
    served = Served(experts=("a", "b", "c"), adapters=ONE_HOT, max_length=8)
    weights = torch.softmax(torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    assert [nearest_adapter(row, served) for row in weights] == ["abc"[i] for i in weights.argmax(dim=1)]
    assert nearest_adapter(torch.zeros(3), served) == "twin/shared"


def test_a_mixture_answers_what_is_nearer_to_it_than_to_an_expert() -> None:
    served = Served(experts=("a", "b", "c"), adapters={**ONE_HOT, "ab": (0.5, 0.5, 0.0)}, max_length=8)
    assert nearest_adapter(torch.tensor([0.55, 0.45, 0.0]), served) == "ab"
    assert nearest_adapter(torch.tensor([0.8, 0.2, 0.0]), served) == "a"
    assert nearest_adapter(torch.tensor([0.2, 0.1, 0.7]), served) == "c"


def test_prompts_have_the_twin_s_own_weights(router: PromptRouter, matrix_family: Family, matrix_twin: Path) -> None:
    rows = [json.loads(line)["text"] for line in (matrix_family.root / "router.jsonl").read_text().splitlines()]
    rows += [" ".join(rows)]  # over the window: the last tokens count
    twin: Any = TwinModel.from_pretrained(matrix_twin)
    expected = twin.route_all(twin.encode([(text, None) for text in rows]))
    prompts = router.completion_prompts({"prompt": rows})
    assert len(prompts[-1]) > router.served.max_length
    torch.testing.assert_close(router.weights(prompts), expected)
    assert router.completion_prompts({"prompt": prompts[:2]}) == prompts[:2]
    assert router.completion_prompts({"prompt": prompts[0]}) == prompts[:1]


def test_a_chat_is_read_through_the_template(router: PromptRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = router.tokenizer
    messages = [{"role": "system", "content": "a cat"}, {"role": "user", "content": [{"type": "text", "text": "why"}]}]
    with pytest.raises(InputError, match="chat template can't take them"):
        router.chat_prompt({"messages": messages})
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<x>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert tokenizer.decode(router.chat_prompt({"messages": messages})) == "<system>a cat<user>why<x>"
    with pytest.raises(InputError, match="reads texts alone"):
        router.chat_prompt({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})
    with pytest.raises(InputError, match="expected a list of messages"):
        router.chat_prompt({"messages": []})


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "expected a text or token ids"),
        ("", "an empty prompt"),
        ([], "an empty prompt"),
        ([1, "a"], "whole number"),
        ([300], "vocabulary has 300 tokens"),
        ([["a"]], "whole number"),
        ({"a": 1}, "expected a text or token ids"),
    ],
)
def test_what_is_no_prompt_is_refused(router: PromptRouter, prompt: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        router.completion_prompts({"prompt": prompt})


def test_a_folder_that_is_no_whole_export_is_refused(exported: Path, matrix_twin: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no serving\.json there; write one with twin-bench export"):
        PromptRouter.open(matrix_twin)
    copy = shutil.copytree(exported, tmp_path / "copy")
    served = json.loads((copy / "serving.json").read_text())
    served["adapters"]["bbq"] = [1, 0]
    (copy / "serving.json").write_text(json.dumps(served))
    with pytest.raises(InputError, match=r"adapters\.bbq: 2 weights for 3 experts"):
        PromptRouter.open(copy)
    shutil.copy(exported / "serving.json", copy / "serving.json")
    shutil.rmtree(copy / "router")
    with pytest.raises(InputError, match="no router there"):
        PromptRouter.open(copy)
