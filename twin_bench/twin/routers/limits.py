"""What a base model, its experts and training rows allow of a router's settings: said before a merge is made."""

from __future__ import annotations

from twin_bench.checkpoints.sources import Sources
from twin_bench.data.rows import RouterRows
from twin_bench.errors import InputError
from twin_bench.twin.recipe import Recipe, RouterSettings
from twin_bench.twin.routers.registry import RouterKind, find_kind
from twin_bench.twin.routers.rows import divided
from twin_bench.twin.routers.task_loss import require_answers


def check_router(recipe: Recipe, sources: Sources) -> None:
    """Raise an InputError for settings of a router that this base model or this number of experts does not allow."""
    router = recipe.router
    if router is None:
        return
    kind = find_kind(router.kind)
    _check_layers(recipe, router, kind, sources.config.num_hidden_layers)
    if router.objective == "task_loss" and not sources.skeleton.head:
        raise InputError("router.objective task_loss: it is the loss of classifiers; leave it out for a language model")
    if router.objective == "task_loss" and not kind.router.trains:
        raise InputError(f"router.objective task_loss: kind {kind.name} has no parameters to train; give mlp or linear")
    if router.pooling == "first" and sources.skeleton.task_type == "causal_lm":
        raise InputError("router.pooling first: a causal model's first token sees no other; give mean or last")
    if router.top_k > len(recipe.experts):
        raise InputError(f"router.top_k {router.top_k}: there are {len(recipe.experts)} experts; 0 keeps all")
    if router.fallback and len(recipe.experts) == 1 and kind.router.confidence_of == "probability":
        raise InputError("router.fallback: the weight of one expert alone is always 1; leave fallback out")


def _check_layers(recipe: Recipe, router: RouterSettings, kind: RouterKind, depth: int) -> None:
    if kind.router.reads_experts and recipe.exclusive.kind != "svd":
        raise InputError(
            f"router.kind {kind.name}: it reads factors, and exclusive.kind {recipe.exclusive.kind} has none; give "
            "another kind of router, or exclusive.kind svd"
        )
    top = depth - 1 if kind.router.reads_experts else depth
    lowest = recipe.exclusive.from_layer or 0
    for layer in router.layers or [router.layer]:
        if layer != "auto" and not -1 <= layer <= depth:
            raise InputError(f"router.layer {layer}: the base model has {depth} blocks; -1 to {depth}, or auto")
        if layer != "auto" and kind.router.reads_experts and not lowest <= layer <= top:
            raise InputError(
                f"router.layer {layer}: kind {kind.name} needs exclusive vectors in the block above it; {lowest} to "
                f"{top}, or auto"
            )
    if {-1, depth} <= {*router.layers}:
        raise InputError(f"router.layers: -1 and {depth} are the same layer of {depth} blocks; remove one")
    if router.layers and kind.router.reads_experts:
        raise InputError(f"router.layers: kind {kind.name} reads one layer; give layer")
    if router.layers and router.pooling == "auto":
        raise InputError("router.pooling auto: it is chosen for one layer; give mean, first or last with layers")


def check_rows(recipe: Recipe, sources: Sources, given: RouterRows) -> None:
    """Raise an InputError if the recipe's router can't be made from these rows. No feature is computed.

    A task has too few rows, none of its rows has a label that `objective: task_loss` needs, or an option of the
    router's kind asks for more rows than there are.
    """
    settings, names = recipe.router, tuple(recipe.experts)
    if settings is None:
        return
    rows = divided(given.train, names, limit=settings.max_rows, held_out=settings.held_out, seed=recipe.seed)
    if settings.objective == "task_loss":
        require_answers(given.answers(), names)
    kind = find_kind(settings.kind)
    width = sources.config.hidden_size * len(settings.layers or (settings.layer,))
    kind.router.check(rows.fitted(names), width, kind.checked(settings.options))
