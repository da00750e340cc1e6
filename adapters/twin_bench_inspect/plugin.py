"""The module of Inspect's entry-point group: it registers the provider `twin_merged`. It does not import torch."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="twin_merged")  # type: ignore[untyped-decorator]
def twin_merged() -> type[ModelAPI]:
    """Return the provider of `--model twin_merged/MY_TWIN`."""
    from twin_bench_inspect.provider import TwinMerged

    return TwinMerged
