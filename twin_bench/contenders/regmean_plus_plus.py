"""RegMean++ (Nguyen et al., 2025): RegMean block by block, on the inputs that the merged blocks below give."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twin_bench.checkpoints.sources import load_model
from twin_bench.contenders.context import Contender, Context, static_contender
from twin_bench.errors import UnsuitedError
from twin_bench.measured import Meter
from twin_bench.merging.by_name import merge_lazily
from twin_bench.merging.calibration import Example, InputGrams, experts_examples, linear_layers
from twin_bench.merging.device import exact_device
from twin_bench.merging.registry import Statistics, require_fraction, served_method
from twin_bench.twin.features import blocks_of


def check_alpha(context: Context, *, alpha: float) -> None:
    """Raise an InputError unless alpha is in (0, 1]."""
    require_fraction("regmean_plus_plus", "alpha", alpha)


@served_method(
    title="RegMean++",
    paper="arXiv:2508.03121",
    track="calibration",
    needs=("training inputs", "seed"),
    sees=("training rows",),
    check_options=check_alpha,
)
def regmean_plus_plus(context: Context, *, alpha: float = 0.9) -> Iterator[Contender]:
    """(sum_t G_t)^-1 sum_t G_t W_t as in RegMean, G_t = X_t^T X_t of inputs X_t that the *merged* blocks below give.

    The blocks are merged from the first to the last. Expert t's inputs are its tasks' training rows, which run through
    the merged embeddings and the merged blocks below. They then run through expert t's own block, where each linear
    layer's inputs are X_t. RegMean runs expert t's own blocks below instead. Off-diagonal entries of G_t are multiplied
    by `alpha`; see `regmean` for it and for how the regression is computed. Norms and biases are averaged.

    This is the authors' code. It is for image encoders, whose blocks alone have linear layers. Elsewhere, parameters
    outside the blocks are averaged first, as the embeddings are there. Linear layers above the blocks (BERT's pooler)
    are merged last, on the inputs that the merged blocks give them. The rows and the counting of tokens are those of
    `regmean`. Raises UnsuitedError for encoder-decoders, whose decoder is a second row of blocks.
    """
    if context.task_type == "seq2seq_lm":
        raise UnsuitedError("regmean_plus_plus merges one row of blocks, and an encoder-decoder has two")
    with Meter(context.device) as meter:
        sources, device = context.sources, exact_device(context.device)
        drawn: dict[str, Any] = {
            "rows": context.calibration_rows,
            "seed": context.seed,
            "max_length": context.max_length,
        }
        examples = experts_examples(context.tasks, sources, **drawn)
        model = load_model(sources, dict(sources.base.items()), "float32").to(device)
        placed = {name: [example.to(device) for example in own] for name, own in examples.items()}
        merged = BlockByBlock(model, sources.base, sources.experts, alpha, device).merge(placed)
        contender = static_contender(merged, context.names, context)
    rows = {name: len(own) for name, own in examples.items()}
    notes = {"calibration": {"statistics": "gram", "split": "train", "rows": rows}}
    yield dataclasses.replace(contender, build=meter.taken, notes=notes)


@dataclass
class BlockByBlock:
    """A merge that goes up the blocks of `model`, which holds what is merged so far.

    `base` and `experts` hold parameters under the model's names. All computing is done on `device`, where the model is.
    """

    model: Any
    base: Mapping[str, Tensor]
    experts: Mapping[str, Mapping[str, Tensor]]
    alpha: float
    device: torch.device

    @torch.no_grad()
    def merge(self, examples: Mapping[str, Sequence[Example]]) -> dict[str, Tensor]:
        """Return the merged parameters, in the base's dtypes, on the CPU. `examples` are each expert's inputs."""
        self.model.config.use_cache = False  # a cache would grow each time that a block runs
        blocks = blocks_of(self.model.base_model, self.model.config.num_hidden_layers)
        paths = {id(module): path for path, module in self.model.named_modules()}
        prefixes = [f"{paths[id(block)]}." for block in blocks]
        layers = linear_layers(self.model)
        outside = [name for name in self.base if not name.startswith(tuple(prefixes))]
        merged = self._settle(outside, {task: {} for task in self.experts})
        rows = {task: [_Row(self.model, blocks, example) for example in own] for task, own in examples.items()}
        for depth, (block, prefix) in enumerate(zip(blocks, prefixes, strict=True)):
            names = [name for name in self.base if name.startswith(prefix)]
            own = {name: layer for name, layer in layers.items() if name.startswith(prefix)}
            grams: dict[str, dict[str, Tensor]] = {}
            for task, expert in self.experts.items():
                self._load({name: expert[name] for name in names})
                with InputGrams(own) as watched:
                    for row in rows[task]:
                        row.through(block, depth)
                grams[task] = watched.means()
            merged |= self._settle(names, grams)
            for row in (row for own_rows in rows.values() for row in own_rows):
                row.hidden = row.through(block, depth)
        below = _ran_below(self.model, blocks[0], layers, next(example for own in examples.values() for example in own))
        above = {n: layer for n, layer in layers.items() if n.removesuffix(".T") in outside and n not in below}
        return merged | self._merged_above(above, examples)

    def _merged_above(
        self, layers: Mapping[str, nn.Module], examples: Mapping[str, Sequence[Example]]
    ) -> dict[str, Tensor]:
        """Return the weights of linear layers above the blocks, merged on what the merged model gives them."""
        if not layers:
            return {}
        grams: dict[str, dict[str, Tensor]] = {}
        for task, own in examples.items():
            with InputGrams(layers) as watched:
                for example in own:
                    self.model(**example.inputs)
            grams[task] = watched.means()
        return self._settle([name.removesuffix(".T") for name in layers], grams)

    def _settle(self, names: Iterable[str], grams: Statistics) -> dict[str, Tensor]:
        """Merge parameters with Gram matrices, or average those that have none; put them into the model."""
        part = {name: self.base[name] for name in names}
        merged = merge_lazily("regmean", part, self.experts, statistics=grams, alpha=self.alpha, device=self.device)
        found = dict(merged.items())
        self._load(found)
        return found

    def _load(self, parameters: Mapping[str, Tensor]) -> None:
        for name, tensor in parameters.items():
            self.model.get_parameter(name).copy_(tensor)


class _Row:
    """One input on its way up: its `hidden` states before the next block, and each block's other arguments."""

    def __init__(self, model: Any, blocks: nn.ModuleList, example: Example) -> None:
        self._others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = dict(kwargs)
            first.append(args[0] if args else others.pop("hidden_states"))
            self._others.append((args[1:], others))

        hooks = [block.register_forward_pre_hook(see, with_kwargs=True) for block in blocks]
        try:
            model(**example.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        self.hidden = first[0]

    def through(self, block: nn.Module, depth: int) -> Tensor:
        """Return the hidden states (1, length, width) after the block of a depth."""
        args, others = self._others[depth]
        found = block(self.hidden, *args, **others)
        hidden: Tensor = found[0] if isinstance(found, tuple) else found
        return hidden


def _ran_below(model: Any, first: nn.Module, layers: Mapping[str, nn.Module], example: Example) -> set[str]:
    """Return the names of the linear layers that run before the first block, such as ELECTRA's projection."""
    ran: list[str] = []
    below: set[str] = set()
    hooks = [first.register_forward_pre_hook(lambda *_: below.update(ran))]
    hooks += [layer.register_forward_pre_hook(lambda *_, name=n: ran.append(name)) for n, layer in layers.items()]
    try:
        model(**example.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return below
