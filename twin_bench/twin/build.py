"""From a recipe to a twin directory: shared expert, exclusive vectors, heads, router."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from twin_bench.checkpoint import (
    Checkpoint,
    Skeleton,
    TaskType,
    context_window,
    meta_model,
    open_checkpoint,
    open_expert,
    read_config,
    read_json,
    skeleton,
)
from twin_bench.data import TASKS, TaskInput, read_router_rows, scored_inputs, split_path
from twin_bench.errors import InputError
from twin_bench.glue import GLUE
from twin_bench.hub import model_directory
from twin_bench.methods import find_method, merge_lazily
from twin_bench.recipe import Recipe, RouterSettings
from twin_bench.twin.directory import quiet_transformers, require_expert_name, save_twin
from twin_bench.twin.exclusive import exclusive_vector
from twin_bench.twin.model import PaperParts, Parts, TwinModel, twin_class
from twin_bench.twin.plan import Group, batches
from twin_bench.twin.router import RouterConfig, Trained, train_router
from twin_bench.twin.separate import SeparateParts, lora_stacks

ORACLE_PARAMETERS = re.compile(r"bias")
"""Parameters that the paper protocol neither merges nor replaces: the true task's expert supplies them."""

FEATURE_TOKENS = 8192
"""Tokens of a batch whose features are taken: bounds what the hidden states of long prompts need."""


@dataclass(frozen=True)
class Sources:
    """The opened inputs of a merge: configuration, tokenizer and lazily read checkpoints."""

    config: Any
    tokenizer: Any
    bones: Skeleton
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    generation: GenerationConfig | None = None


def open_sources(
    base_model: str,
    experts: Mapping[str, str],
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Sources:
    """Open the base model and its experts; nothing but names and shapes is read yet.

    Raises InputError for a name that is nowhere, experts of another kind, or unsafe expert names.
    """
    for name in experts:
        require_expert_name(name)
    directory = model_directory(base_model)
    config = read_config(directory, trust_remote_code=trust_remote_code)
    folders = {name: model_directory(path) for name, path in experts.items()}
    task_type = _common_task_type(folders, config)
    for name, folder in folders.items():
        if not (folder / "adapter_config.json").is_file():
            expert_config = read_config(folder, trust_remote_code=trust_remote_code)
            _require_same_architecture(name, expert_config, config)
            _require_same_labels(name, expert_config)
        else:
            _require_same_base(name, folder, base_model)
    bones = skeleton(config, task_type)
    base = open_checkpoint(directory, bones, allow_pickle=allow_pickle)
    opened = {name: open_expert(folder, base, bones, allow_pickle=allow_pickle) for name, folder in folders.items()}
    for name, expert in opened.items():
        missing = bones.head - expert.head().keys()
        if missing:
            raise InputError(
                f"expert {name!r}: {folders[name]} has no head tensor {min(missing)}; a full checkpoint has one, an "
                "adapter with modules_to_save"
            )
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:  # GPT-2 and Llama come without one
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    generation = (
        GenerationConfig.from_pretrained(directory) if (directory / "generation_config.json").is_file() else None
    )
    return Sources(config, tokenizer, bones, base, opened, generation)


def load_model(sources: Sources, parameters: Mapping[str, Tensor], dtype: str | None = None) -> Any:
    """Return a transformers model that holds `parameters` (names of the skeleton's backbone), in `dtype` or theirs."""
    kind = type(meta_model(sources.config, sources.bones.task_type, num_labels=2))
    with quiet_transformers():
        model = kind.from_pretrained(
            None, config=sources.config, state_dict=dict(parameters.items()), dtype=_dtype(parameters)
        )
    if sources.generation is not None:
        model.generation_config = sources.generation
    return model.to(getattr(torch, dtype)) if dtype else model


def build_twin(recipe: Recipe, directory: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Build a twin and write it to `directory`, which appears whole or not at all.

    Returns what twin.json says of the build (settings, the router's accuracy, parameters stored). Raises
    InputError for whatever is wrong with the inputs, before anything is written.
    """
    progress = progress or Progress(disable=True)
    _require_writable(directory)
    for name in recipe.experts:
        require_expert_name(name)
    rows = read_router_rows(Path(recipe.router.data), list(recipe.experts)) if recipe.router else []
    sources = open_sources(
        recipe.base_model,
        recipe.experts,
        allow_pickle=recipe.allow_pickle,
        trust_remote_code=recipe.trust_remote_code,
    )
    _check_limits(recipe, sources)
    options = {**find_method(recipe.shared.method).seeded(recipe.seed), **recipe.shared.options}
    merged = merge_lazily(recipe.shared.method, sources.base, sources.experts, **options)
    shared = {n: merged[n] for n in progress.track(sources.bones.backbone, description="shared expert")}
    limits = recipe.exclusive.model_dump()
    parts = Parts(
        heads={name: expert.head() for name, expert in sources.experts.items()},
        exclusive={
            name: exclusive_vector(expert, shared, seed=recipe.seed, **limits)
            for name, expert in progress.track(
                sources.experts.items(), len(sources.experts), description="exclusive vectors"
            )
        },
        paper=_paper_parts(recipe, sources),
        max_length=recipe.max_length,
    )
    chosen: dict[str, Any] = {}
    if recipe.router:
        parts, chosen = _with_routers(recipe, recipe.router, sources, shared, parts, rows, progress)
    stored = sum(
        tensor.numel()
        for exclusive in parts.exclusive.values()
        for tensor in (*(t for f in exclusive.factors.values() for t in f), *exclusive.vectors.values())
    )
    settings = {
        "twin_bench": version("twin-bench"),
        "base_model": recipe.base_model,
        "shared": {"method": recipe.shared.method, **options},
        "exclusive": recipe.exclusive.model_dump(exclude_none=True),
        "router": chosen,
        "seed": recipe.seed,
        "max_length": recipe.max_length,  # None: the kind's own default
        "parameters": {"shared": sum(t.numel() for t in shared.values()), "exclusive": stored},
    }
    save_twin(directory, load_model(sources, shared), sources.tokenizer, parts, sources.bones, settings)
    return settings


def _with_routers(
    recipe: Recipe,
    settings: RouterSettings,
    sources: Sources,
    shared: Mapping[str, Tensor],
    parts: Parts,
    rows: Sequence[TaskInput],
    progress: Progress,
) -> tuple[Parts, dict[str, Any]]:
    """Return the parts with their routers, and how these were chosen."""
    names = tuple(recipe.experts)
    rows = _sampled(rows, names, settings.max_rows, recipe.seed)
    depth = sources.config.num_hidden_layers
    layers = list(range(depth + 1)) if settings.layer == "auto" else [settings.layer]
    twin = twin_class(sources.bones.task_type)(load_model(sources, shared, recipe.dtype), sources.tokenizer, parts)
    features = _features(twin, rows, layers, progress, "router features")
    held_out = _held_out(rows, names, settings.held_out, recipe.seed)
    owner = torch.tensor([names.index(row.task) for row in rows])
    best: Trained | None = None
    layer_accuracy: dict[str, float] = {}
    for layer, hidden in progress.track(list(zip(layers, features, strict=True)), description="router"):
        config = RouterConfig(names, hidden.shape[1], layer, settings.top_k, settings.temperature)
        fit, chosen = (hidden[~held_out], owner[~held_out]), (hidden[held_out], owner[held_out])
        trained = train_router(config, *fit, *chosen, epochs=settings.epochs, seed=recipe.seed)
        layer_accuracy[str(layer)] = trained.accuracy
        best = trained if best is None or trained.accuracy > best.accuracy else best
    assert best is not None
    parts = dataclasses.replace(parts, router=best.router)
    summary = {
        **settings.model_dump(exclude={"data"}),
        "layer": best.router.config.layer,
        "selected_on": "held-out training rows",
        **_summary(best),
        "layer_accuracy": layer_accuracy,
    }
    test_rows = _test_rows(Path(settings.data), names, settings.max_rows) if settings.paper and parts.paper else []
    if test_rows:
        paper = _paper_router(recipe, settings, sources, shared, parts, rows, test_rows, progress)
        assert parts.paper is not None
        parts = dataclasses.replace(parts, paper=dataclasses.replace(parts.paper, router=paper.router))
        summary["paper"] = {"layer": -1, "selected_on": "test rows, as the authors do", **_summary(paper)}
    return parts, summary


def _paper_router(
    recipe: Recipe,
    settings: RouterSettings,
    sources: Sources,
    shared: Mapping[str, Tensor],
    parts: Parts,
    rows: Sequence[TaskInput],
    test_rows: Sequence[TaskInput],
    progress: Progress,
) -> Trained:
    """Train the authors' router: last layer, pretrained biases, its epoch chosen on the test rows."""
    kind = twin_class(sources.bones.task_type)
    twin = kind(load_model(sources, shared, recipe.dtype), sources.tokenizer, parts, protocol="paper")
    names = tuple(recipe.experts)
    both = [*rows, *test_rows]
    hidden = _features(twin, both, [-1], progress, "router features (paper)")[0]
    owner = torch.tensor([names.index(row.task) for row in both])
    fit, chosen = (hidden[: len(rows)], owner[: len(rows)]), (hidden[len(rows) :], owner[len(rows) :])
    config = RouterConfig(names, hidden.shape[1])
    return train_router(config, *fit, *chosen, epochs=settings.epochs, seed=recipe.seed)


def _features(
    twin: TwinModel,
    rows: Sequence[TaskInput],
    layers: Sequence[int],
    progress: Progress,
    what: str,
) -> list[Tensor]:
    """Return the (rows, width) features of each layer, on the CPU."""
    encoded = twin.encode([(row.text, row.text_pair) for row in rows])
    lengths = [len(row["input_ids"]) for row in encoded]
    if not all(lengths):
        raise InputError(
            f"router: the tokenizer makes no token of a row of {rows[lengths.index(0)].task}; mend the row"
        )
    order: list[int] = []
    chunks: list[list[Tensor]] = [[] for _ in layers]
    whole = Group(tuple(range(len(rows))), None)
    rows_a_batch = max(1, min(64, FEATURE_TOKENS // max(lengths)))
    for batch in progress.track(batches(whole, lengths, rows_a_batch), description=what):
        for kept, hidden in zip(
            chunks, twin.features(twin.collate([encoded[r] for r in batch.rows]), layers), strict=True
        ):
            kept.append(hidden.float().cpu())
        order += batch.rows
    restore = torch.argsort(torch.tensor(order))
    return [torch.cat(kept)[restore] for kept in chunks]


def _sampled(rows: Sequence[TaskInput], names: Sequence[str], limit: int, seed: int) -> list[TaskInput]:
    """Return at most `limit` rows of each task, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[TaskInput] = []
    for name in names:
        own = [row for row in rows if row.task == name]
        kept += [own[index] for index in torch.randperm(len(own), generator=generator)[:limit].tolist()]
    return kept


def _held_out(rows: Sequence[TaskInput], names: Sequence[str], fraction: float, seed: int) -> Tensor:
    """Return a mask of the rows that choose the router: a fraction of each task's, at least one.

    Equal texts go to the same side, so that no row chooses what it was trained on.
    """
    texts = sorted({(row.text, row.text_pair or "") for row in rows})
    shuffled = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    rank = dict(zip(texts, shuffled, strict=True))
    mask = torch.zeros(len(rows), dtype=torch.bool)
    for name in names:
        own = sorted((rank[row.text, row.text_pair or ""], i) for i, row in enumerate(rows) if row.task == name)
        if len(own) < 2:
            raise InputError(f"router: expert {name!r} has {len(own)} rows; it needs two, one of them held out")
        cut = own[max(1, int(fraction * len(own))) - 1][0]
        mask[[i for position, i in own if position <= cut]] = True
    return mask


def _test_rows(data: Path, names: Sequence[str], limit: int) -> list[TaskInput]:
    """Return every expert's validation rows, which the authors select their router on; empty if any lacks."""
    files = {name: split_path(data, name) for name in names if name in TASKS}
    if len(files) < len(names) or not all(file.is_file() for file in files.values()):
        return []
    return [row for name, file in files.items() for row in scored_inputs(TASKS[name], data, file, min(limit, 1000))]


def _summary(trained: Trained) -> dict[str, Any]:
    return {
        "epoch": trained.epoch,
        "accuracy": trained.accuracy,
        "task_accuracy": trained.task_accuracy,
        "rows": trained.rows,
        "selection_rows": trained.selection_rows,
    }


def _dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in parameters.values() if tensor.is_floating_point())


def _paper_parts(recipe: Recipe, sources: Sources) -> PaperParts | None:
    """Return what the paper protocol needs; None where it can't be had of these experts."""
    if sources.bones.head:
        return PaperParts({n: sources.base[n] for n in sources.bones.backbone if ORACLE_PARAMETERS.search(n)})
    if recipe.shared.method != "task_arithmetic" or not all(expert.low_rank for expert in sources.experts.values()):
        return None
    adapted = {name for expert in sources.experts.values() for name in expert.low_rank}
    if adapted & (sources.bones.transposed | sources.bones.embeddings):
        return None
    try:
        stacks = lora_stacks(sources.experts)
    except InputError:  # adapters of several ranks: a twin all the same, under the other protocols
        return None
    scaling = {**find_method("task_arithmetic").defaults, **recipe.shared.options}["scaling"]
    limits = recipe.exclusive
    return PaperParts(separate=SeparateParts(stacks, scaling, limits.density, limits.rank))


def _require_writable(directory: Path) -> None:
    """Raise an InputError unless a twin can be written to `directory`: before hours are spent on it."""
    if directory.exists():
        raise InputError(f"{directory}: exists already; give another name, or remove it first")
    parent = next(parent for parent in directory.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{directory}: {parent} can't be written to; give another place")


def _check_limits(recipe: Recipe, sources: Sources) -> None:
    """Raise an InputError for settings that this base model, or this number of experts, can't have."""
    config, router = sources.config, recipe.router
    window = context_window(config)
    if recipe.max_length and recipe.max_length > window:
        raise InputError(f"max_length {recipe.max_length}: the base model has a window of {window}; give no more")
    if router is None:
        return
    depth = config.num_hidden_layers
    if router.layer != "auto" and not -1 <= router.layer <= depth:
        raise InputError(f"router.layer {router.layer}: the base model has {depth} blocks; -1 to {depth}, or auto")
    if router.top_k > len(recipe.experts):
        raise InputError(f"router.top_k {router.top_k}: there are {len(recipe.experts)} experts; 0 keeps all")


def _require_same_architecture(name: str, expert: Any, base: Any) -> None:
    """Raise an InputError where an expert computes something else than the base with its weights."""
    for key in COMPUTES:
        theirs, ours = getattr(expert, key, None), getattr(base, key, None)
        if theirs != ours:
            hint = "; resize its vocabulary to the base model's" if key == "vocab_size" else ""
            raise InputError(
                f"expert {name!r}: {key} is {theirs}, the base model's is {ours}; they can't be merged{hint}"
            )


COMPUTES = (
    *("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "vocab_size"),
    *("layer_norm_eps", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
)
"""What of a config decides a model's results and can differ under equal shapes; the vocabulary, for a clear word."""


def _require_same_base(name: str, adapter: Path, base_model: str) -> None:
    """Raise an InputError where an adapter names another model on the hub as its base; a path says nothing."""
    said = str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    on_hub = all(re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists() for model in (said, base_model))
    if on_hub and said.split("/")[1].lower() != base_model.split("/")[1].lower():
        raise InputError(
            f"expert {name!r}: an adapter on {said}, the base model is {base_model}; if they are the same, say so in "
            f"{adapter / 'adapter_config.json'} (base_model_name_or_path)"
        )


def _require_same_labels(name: str, expert: Any) -> None:
    """Raise an InputError where an expert of a GLUE task names its labels in another order than GLUE."""
    ours = list(GLUE[name].label_names) if name in GLUE else []
    theirs = [str(expert.id2label[index]).lower() for index in sorted(expert.id2label or {})]
    if sorted(ours) == sorted(theirs) and ours != theirs:
        raise InputError(
            f"expert {name!r}: its labels are {', '.join(theirs)}, in GLUE's order {', '.join(ours)}; reorder its "
            "head's rows and id2label"
        )


def _common_task_type(folders: Mapping[str, Path], config: Any) -> TaskType:
    """Return what all experts are; InputError unless they are of one kind."""
    kinds = {name: _task_type(name, folder, config) for name, folder in folders.items()}
    first = next(iter(kinds))
    for name, kind in kinds.items():
        if kind != kinds[first]:
            raise InputError(
                f"expert {name!r} is a {kind} model and {first!r} a {kinds[first]} one; a twin has one kind"
            )
    return kinds[first]


def _task_type(name: str, folder: Path, base: Any) -> TaskType:
    """Return what the expert in `folder` is, from its adapter's config or its architecture."""
    adapter, full = folder / "adapter_config.json", folder / "config.json"
    if adapter.is_file():
        said = read_json(adapter).get("task_type")
        architectures = getattr(base, "architectures", None) or []
        if said is None:  # PEFT leaves it open: then what the base is
            said = "CAUSAL_LM" if any("CausalLM" in a or "LMHead" in a for a in architectures) else "SEQ_CLS"
        known: dict[str, TaskType] = {"SEQ_CLS": "sequence_classification", "CAUSAL_LM": "causal_lm"}
    elif full.is_file():
        architectures = read_json(full).get("architectures") or []
        said = ", ".join(architectures) or "of no architecture"
        classifies = any("ForSequenceClassification" in a for a in architectures)
        generates = any("ForCausalLM" in a or a.endswith("LMHeadModel") for a in architectures)
        known = {said: "sequence_classification"} if classifies else {said: "causal_lm"} if generates else {}
    else:
        raise InputError(f"expert {name!r}: {folder} holds no config.json and no adapter_config.json")
    if said not in known:
        raise InputError(f"expert {name!r}: {folder} is {said}; twins are made of sequence classifiers or causal LMs")
    return known[said]
