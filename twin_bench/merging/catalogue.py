"""The catalogue of merge methods as a page, made from their headers and docstrings."""

from __future__ import annotations

from itertools import groupby

from twin_bench.merging.registry import Method, methods

_INTRODUCTION = """\
# Merge methods

Made by `twin-bench methods --markdown` from the headers in [twin_bench/methods/](../twin_bench/methods/), not by hand.

theta_0 is the base model, theta_t the expert of task t (t = 1..T), tau_t = theta_t - theta_0 its task vector. What the
authors' code and other libraries do otherwise stands in each method's docstring.
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
