"""The catalogue of merge methods as a page, made from their headers and docstrings."""

from __future__ import annotations

from itertools import groupby

from twin_bench.merging.registry import Method, methods

_INTRODUCTION = """\
# Merge methods

This page is made by `twin-bench methods --markdown`, not by hand. It shows the headers of the methods in
[twin_bench/merging/methods/](../twin_bench/merging/methods/), [twin_bench/contenders/](../twin_bench/contenders/) and
[twin_bench/adaptive/](../twin_bench/adaptive/).

theta_0 is the base model, theta_t the expert of task t (t = 1..T), and tau_t = theta_t - theta_0 its task vector. Each
method's docstring says how the authors' code and other libraries differ.
"""


def markdown() -> str:
    """Return the catalogue page: every method by track, with its paper, needs, defaults and formula."""
    tracks = groupby(methods().values(), key=lambda method: method.track)
    sections = (f"\n## {track}\n" + "".join(map(_entry, found)) for track, found in tracks)
    return _INTRODUCTION + "".join(sections)


def _entry(method: Method) -> str:
    identifier = method.paper.removeprefix("arXiv:")
    defaults = ", ".join(f"{option}={value!r}" for option, value in method.defaults.items())
    facts = [
        f"[{method.paper}](https://arxiv.org/abs/{identifier})" if identifier else "",
        f"needs {', '.join(method.needs)}" if method.needs else "",
        f"defaults `{defaults}`" if defaults else "",
    ]
    line = " · ".join(fact for fact in facts if fact)
    return f"\n### {method.name}: {method.title}\n\n" + (f"{line}\n\n" if line else "") + f"{method.formula}\n"
