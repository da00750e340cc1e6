"""What depends on a version of transformers or peft: either version's names, and one line where a fast path is off."""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import twin_bench
from tests.support.families import built
from tests.support.models import tiny_causal
from twin_bench import compat
from twin_bench.twin.causal import TwinCausalLM, tokens
from twin_bench.twin.requests import Score, score

pytestmark = pytest.mark.versions

Said = Callable[[], list[logging.LogRecord]]

CONTEXT = [*range(4, 24)]
REQUESTS = [Score([*CONTEXT, 5 + row], [6, 7]) for row in range(3)]


@pytest.fixture(scope="module")
def directory(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = {**causal_families("llama").recipe, "router": None}
    return built(recipe, tmp_path_factory.mktemp("compat") / "twin")


@pytest.fixture
def load(directory: Path) -> Callable[[], TwinCausalLM]:
    """Return a function that loads a twin, which has found out nothing of its model yet."""
    return lambda: TwinCausalLM.from_pretrained(directory)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """Return a function that lists what compat said so far. transformers 4 has words of its own, once a process."""
    compat.say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger=compat.__name__)
    return lambda: [record for record in caplog.records if record.name == compat.__name__]


def scores(twin: TwinCausalLM) -> torch.Tensor:
    weights = torch.eye(len(twin.expert_names))[:1].repeat(len(REQUESTS), 1)
    scored = score(twin, REQUESTS, fusion_weights=weights, batch_size=4)
    return torch.stack([one.log_probs for one in scored])


def test_the_cache_goes_by_either_name() -> None:
    assert compat.cache_argument(lambda input_ids, cache=None: None) == "cache"
    assert compat.cache_argument(lambda input_ids, past_key_values=None: None) == "past_key_values"
    assert compat.cache_argument(lambda input_ids, past_key_values=None, cache=None: None) == "cache"
    assert compat.cache_argument(lambda input_ids: None) is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt2"])
def test_installed_models_share_prefixes_and_select_logits_without_a_word(kind: str, said: Said) -> None:
    """Not OPT, whose logits transformers 4 can't select."""
    model = tiny_causal(kind)
    assert compat.prefix_argument(model) in compat.CACHE_ARGUMENTS
    assert compat.selects_logits(model)
    assert not said()


def renamed(module: Any, name: str) -> None:
    """Have a module's forward take the cache under `name` alone, as in the version that calls it so."""
    forward, own = module.forward, compat.cache_argument(module.forward)
    assert own

    def cache(input_ids: Any = None, *, cache: Any = None, logits_to_keep: Any = 0, **rest: Any) -> Any:
        return run(input_ids, cache, logits_to_keep, rest)

    def past_key_values(
        input_ids: Any = None, *, past_key_values: Any = None, logits_to_keep: Any = 0, **rest: Any
    ) -> Any:
        return run(input_ids, past_key_values, logits_to_keep, rest)

    def run(input_ids: Any, kept: Any, logits_to_keep: Any, rest: Any) -> Any:
        given = {own: kept} if kept is not None else {}
        if isinstance(logits_to_keep, torch.Tensor):
            given["logits_to_keep"] = logits_to_keep
        return forward(input_ids, **given, **rest)

    module.forward = {"cache": cache, "past_key_values": past_key_values}[name]


def hide(module: Any, *names: str) -> None:
    """Have a module's forward take what it takes without naming these arguments."""
    forward = module.forward
    signature = inspect.signature(forward)

    def unnamed(*args: Any, **options: Any) -> Any:
        return forward(*args, **options)

    shown = [argument for argument in signature.parameters.values() if argument.name not in names]
    unnamed.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    module.forward = unnamed


@pytest.mark.parametrize("name", compat.CACHE_ARGUMENTS)
def test_prefixes_are_shared_under_either_name(
    load: Callable[[], TwinCausalLM], name: str, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    expected, twin = scores(load()), load()
    renamed(twin.model.base_model, name)
    renamed(twin.model, name)
    passes: list[int] = []
    prefix = twin.prefix

    def watched(ids: Any, *rest: Any) -> Any:
        passes.append(len(ids))
        return prefix(ids, *rest)

    monkeypatch.setattr(twin, "prefix", watched)
    torch.testing.assert_close(scores(twin), expected)
    assert passes == [len(CONTEXT)]
    assert not said()


def test_no_name_is_deprecated(load: Callable[[], TwinCausalLM]) -> None:
    twin = load()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        scores(twin)
        rows = [tokens(request.context) for request in REQUESTS]
        assert len(twin.features_of(rows, [-1], batch_size=4)[0]) == len(rows)


def test_a_model_without_either_name_shares_nothing_and_says_so_once(
    load: Callable[[], TwinCausalLM], said: Said
) -> None:
    expected = scores(load())
    for twin in (load(), load()):
        hide(twin.model.base_model, *compat.CACHE_ARGUMENTS)
        torch.testing.assert_close(scores(twin), expected, rtol=1e-4, atol=1e-5)
    (record,) = said()
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"LlamaForCausalLM (transformers {transformers.__version__}) takes none of cache, past_key_values: "
        "what rows begin with alike is run for each of them"
    )


def test_a_model_that_computes_all_logits_says_so_once(load: Callable[[], TwinCausalLM], said: Said) -> None:
    expected = scores(load())
    for twin in (load(), load()):
        hide(twin.model, "logits_to_keep")
        torch.testing.assert_close(scores(twin), expected, rtol=1e-4, atol=1e-5)
    (record,) = said()
    assert "takes no logits_to_keep: the logits of all tokens are computed" in record.message


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1"])
def test_a_state_that_is_no_keys_and_values_is_not_shared(kind: str, said: Said) -> None:
    """Falcon-H1's layers keep both: repeating its keys and values alone would leave its state at one row."""
    shape: dict[str, Any] = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2}
    config = {
        "mamba": lambda: transformers.MambaConfig(**shape, state_size=4),
        "falcon_h1": lambda: transformers.FalconH1Config(
            **shape, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, mamba_d_ssm=16, mamba_n_heads=2
        ),
    }[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert compat.prefix_argument(model) is None
    assert compat.prefix_argument(model) is None
    (record,) = said()
    assert "keeps a state that is no keys and values" in record.message


def test_a_lora_config_s_patterns() -> None:
    assert compat.pattern_of(["layers.1.q_proj", "v_proj"], "model.layers.1.q_proj") == "layers.1.q_proj"
    assert compat.pattern_of(["v_proj"], "model.layers.1.q_proj") == "model.layers.1.q_proj"


@pytest.mark.parametrize("has_mapping", [True, False])
def test_names_that_transformers_gives_on_loading(monkeypatch: pytest.MonkeyPatch, has_mapping: bool) -> None:
    """transformers 4 has the table at the class, whose first pattern that matches counts."""
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    model = tiny_causal("llama")
    table = {r"^old\.": "model.", r"^model\.x": "y"} if has_mapping else {}
    monkeypatch.setattr(type(model), "_checkpoint_conversion_mapping", table, raising=False)
    name = compat.own_names(model)
    assert name("old.x.weight") == ("model.x.weight" if has_mapping else "old.x.weight")
    assert name("lm_head.weight") == "lm_head.weight"


def test_peft_is_imported_without_what_bitsandbytes_says_of_quantised_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT imports bitsandbytes, which warns of the speed of weights that nobody has quantised."""
    (tmp_path / "bitsandbytes").mkdir()
    says = "import logging\nlogging.getLogger('bitsandbytes.backends.cpu.ops').warning('no kernels')\n"
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(says)
    (tmp_path / "peft.py").write_text("import bitsandbytes")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("peft", "bitsandbytes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    compat.import_peft()
    assert sys.modules["peft"].__file__ == str(tmp_path / "peft.py")
    assert not caplog.records
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    importlib.import_module("bitsandbytes")  # who quantises imports it, and is told
    assert [record.getMessage() for record in caplog.records] == ["no kernels"]


def test_whatever_imports_peft_does_so_quietly() -> None:
    """The first import decides what is said, so each comes after compat's."""
    imports = [
        (f"{file}: {line}", before.strip())
        for file in Path(twin_bench.__file__).parent.rglob("*.py")
        for before, line in itertools.pairwise(["", *file.read_text(encoding="utf-8").splitlines()])
        if re.match(r" *(from|import) peft\b", line)
    ]
    for place, before in imports:
        assert before in ("import_peft()", "if TYPE_CHECKING:"), place
    assert len(imports) == 6
