"""The page's charts, as static SVG: no script, text that stays text, colours that are the page's CSS variables.

A chart is a Vega-Lite specification, which vl-convert draws. Each kind has a wide form and a narrow one for a phone,
where the text of the wide one would be too small. Each mark says in words what it shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import vl_convert

WIDE, NARROW = 640, 330
"""The width of a plot in the two forms, in pixels."""
TONES = {"lead": "var(--lead)", "plain": "var(--plain)", "told": "var(--told)", "bound": "var(--muted)"}
"""What a method is, and the colour of it: of the leading group, another one, told the task, a bound."""
_VEGA_LITE = "5.20"
_TONE = {"field": "tone", "legend": None, "scale": {"domain": list(TONES), "range": list(TONES.values())}}
_WORDS = {"field": "words"}
_LETTER, _HEIGHT = 6.8, 14
"""The width and height of a label's letter in pixels, for labels that must not meet."""
_WIDER = 1.6
"""By how many pixels a letter of a reader's font may be wider than one of the font that a chart is laid out with."""
_LETTERS = 28
"""How much of a label is shown. The whole of it is in the words of its mark."""


@dataclass(frozen=True)
class Line:
    """A line of a chart of intervals: a method with a value, its interval, and a note at the end of the line.

    `tone` is one of TONES. Neighbours of one `band` have the same background. `words` are for who can't see it.
    """

    label: str
    value: float
    low: float
    high: float
    note: str
    tone: str
    band: int
    words: str


@dataclass(frozen=True)
class Reference:
    """A vertical line that values are compared with."""

    label: str
    value: float


@dataclass(frozen=True)
class Point:
    """A method at its cost (x) and its score (y). `front`: no method is at least as cheap and better."""

    label: str
    x: float
    y: float
    tone: str
    front: bool
    words: str


def intervals(lines: Sequence[Line], references: Sequence[Reference], title: str, *, narrow: bool) -> str:
    """Return a chart with a line for each method, in this order, and a vertical line for each reference."""
    width, step = (NARROW, 38) if narrow else (WIDE, 23)
    values = [value for line in lines for value in (line.low, line.value, line.high)]
    domain = _padded([*values, *(reference.value for reference in references)])
    across = {
        "type": "quantitative",
        "scale": {"domain": domain, "nice": False, "zero": False},
        "axis": {"title": title, "tickCount": 6},
    }
    data = [
        asdict(line) | {"place": place, "shade": line.band % 2, "label": _cut(line.label)}
        for place, line in enumerate(lines)
    ]
    down = {
        "field": "place", "type": "ordinal", "sort": None, "axis": None, "scale": {"paddingInner": 0, "paddingOuter": 0}
    }  # fmt: skip
    lower, above = (8, -9) if narrow else (0, 0)
    shape = {"condition": {"test": "datum.tone === 'told'", "value": "diamond"}, "value": "circle"}
    layers = [
        _layer(
            {"type": "rect", "fill": "var(--band)"},
            x={"value": 0}, x2={"value": width}, opacity={"field": "shade", "type": "quantitative", "scale": None},
        ),
        *_reference_lines(references, across, domain, step * len(lines)),
        _layer(
            {"type": "rule", "strokeWidth": 2, "yOffset": lower},
            x=across | {"field": "low"}, x2={"field": "high"}, color=_TONE,
        ),
        _layer(
            {"type": "point", "filled": True, "size": 70, "opacity": 1, "yOffset": lower, "aria": True},
            x=across | {"field": "value"}, color=_TONE, shape=shape, description=_WORDS,
        ),
        _layer(
            {"type": "text", "align": "left" if narrow else "right", "dy": above},
            x={"value": 4 if narrow else -8}, text={"field": "label"},
        ),
        _layer(
            {"type": "text", "align": "right" if narrow else "left", "dy": above, "fill": "var(--muted)"},
            x={"value": width + (-4 if narrow else 8)}, text={"field": "note"},
        ),
    ]  # fmt: skip
    for layer in layers:
        if "data" not in layer:
            layer["encoding"]["y"] = down
    longest = max(len(_cut(line.label)) for line in lines), max(len(line.note) for line in lines)
    beside = (0.0, 0.0) if narrow else (_WIDER * longest[0], _WIDER * longest[1])
    return _svg({"data": {"values": data}, "width": width, "height": step * len(lines), "layer": layers}, *beside)


def front(points: Sequence[Point], across: str, down: str, *, narrow: bool) -> str:
    """Return a chart of cost against score, with a line along the points that no other one beats.

    Those points, the bounds and methods that are told the task have their names beside them, where there is room. All
    others say theirs when they are pointed at. Costs have a logarithmic scale where the largest is over five times the
    smallest.
    """
    width, height = (NARROW, 280) if narrow else (WIDE, 330)
    costs = [point.x for point in points]
    logarithmic = min(costs) > 0 and max(costs) > 5 * min(costs)
    horizontal = [min(costs) / 1.25, max(costs) * 1.25] if logarithmic else _padded(costs, 0.1)
    vertical = _padded([point.y for point in points], 0.08)
    x = {
        "field": "x",
        "type": "quantitative",
        "axis": {"title": across, "tickCount": 6, "format": "~g"},
        "scale": {"type": "log" if logarithmic else "linear", "domain": horizontal, "nice": False, "zero": False},
    }
    y = {
        "field": "y",
        "type": "quantitative",
        "axis": {"title": down, "tickCount": 6, "grid": True},
        "scale": {"domain": vertical, "nice": False, "zero": False},
    }
    shape = {
        "field": "tone",
        "legend": None,
        "scale": {"domain": list(TONES), "range": ["circle", "circle", "diamond", "square"]},
    }
    dots = _layer(
        {"type": "point", "filled": True, "size": 80, "opacity": 0.9, "aria": True},
        x=x, y=y, color=_TONE, shape=shape, description=_WORDS,
    )  # fmt: skip
    steps = _layer(
        {"type": "line", "interpolate": "step-after", "stroke": "var(--lead)", "strokeDash": [4, 3]}, x=x, y=y
    )
    best = [asdict(point) for point in sorted(points, key=lambda one: one.x) if point.front]
    measure = math.log if logarithmic else float
    first, last = map(measure, horizontal)
    places = [
        (
            width * (measure(point.x) - first) / (last - first),
            height * (vertical[1] - point.y) / (vertical[1] - vertical[0]),
        )
        for point in points
    ]
    labels = [
        _layer(
            {"type": "text", "align": label["align"]},
            x={"value": label["x"]}, y={"value": label["y"]}, text={"value": label["label"]},
        )
        for label in _labels(points, places, width, height)
    ]  # fmt: skip
    data = {"values": [asdict(point) for point in points]}
    layers = [steps | {"data": {"values": best}}, dots, *(label | {"data": {"values": [{}]}} for label in labels)]
    return _svg({"data": data, "width": width, "height": height, "layer": layers})


def shares(own: Sequence[int], other: Sequence[int], title: str) -> str:
    """Return a histogram of values from 0 to 1 in bins of equal width, `own` below `other` in each bar."""
    bins = len(own)
    kinds = (("a", "on the task's own expert", own), ("b", "on another expert", other))
    bars = [
        {
            "low": place / bins,
            "high": (place + 1) / bins,
            "rows": rows,
            "whose": whose,
            "words": f"{place / bins:.2f} to {(place + 1) / bins:.2f}: {rows} rows, {said}",
        }
        for whose, said, counts in kinds
        for place, rows in enumerate(counts)
        if rows
    ]
    colours = {"domain": ["a", "b"], "range": ["var(--lead)", "var(--less)"]}
    scale = {"domain": [0, 1], "nice": False}
    layer = _layer(
        {"type": "bar", "binSpacing": 1, "aria": True},
        x={"field": "low", "bin": "binned", "axis": {"title": title, "tickCount": 5}, "scale": scale},
        x2={"field": "high"},
        y={"field": "rows", "type": "quantitative", "axis": {"title": "rows", "tickCount": 4, "grid": True}},
        color={"field": "whose", "legend": None, "scale": colours},
        order={"field": "whose"},
        description=_WORDS,
    )
    return _svg({"data": {"values": bars}, "width": NARROW - 40, "height": 150, "layer": [layer]})


def on_the_front(costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Return which points no other point beats: one that costs no more, scores no less, and is better in one."""
    pairs = list(zip(costs, scores, strict=True))
    return [not any(x <= cost and y >= score and (x, y) != (cost, score) for x, y in pairs) for cost, score in pairs]


def _layer(mark: dict[str, Any], **encoding: Any) -> dict[str, Any]:
    """Return a layer. Its marks are for the eye alone, unless `aria` is set."""
    return {"mark": {"aria": False, **mark}, "encoding": encoding}


def _reference_lines(
    references: Sequence[Reference], across: dict[str, Any], domain: Sequence[float], height: int
) -> list[dict[str, Any]]:
    """Return the vertical lines. Their labels stand above the plot, one a line, so that none meets another."""
    edge = domain[0] + 0.7 * (domain[1] - domain[0])
    left = sorted((one for one in references if one.value <= edge), key=lambda one: -one.value)
    right = sorted((one for one in references if one.value > edge), key=lambda one: one.value)
    layers = []
    for place, reference in enumerate([*left, *right]):
        data = {"data": {"values": [{"value": reference.value}]}}
        top, align, shift = -5 - 15 * place, *(("right", -4) if reference in right else ("left", 4))
        x = across | {"field": "value"}
        rule = {"type": "rule", "stroke": "var(--muted)", "strokeDash": [2, 3]}
        layers.append(data | _layer(rule, x=x, y={"value": top}, y2={"value": height}))
        text = {"type": "text", "align": align, "dx": shift, "dy": 5, "fill": "var(--muted)"}
        layers.append(data | _layer(text, x=x, y={"value": top}, text={"value": _cut(reference.label)}))
    return layers


def _labels(
    points: Sequence[Point], places: Sequence[tuple[float, float]], width: int, height: int
) -> list[dict[str, object]]:
    """Return names for the points on the front and the bounds, each where it meets no point, label or edge."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    labels: list[dict[str, object]] = []
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda pair: not pair[0].front):
        if not point.front and point.tone not in ("bound", "told"):
            continue
        length = len(_cut(point.label)) * _LETTER
        tried = [(x + 9, y - 11, "left"), (x - 9, y - 11, "right"), (x, y - 15, "center"), (x + 9, y + 12, "left")]
        tried += [(x - 9, y + 12, "right"), (x, y + 16, "center"), (x + 9, y, "left"), (x - 9, y, "right")]
        for at, down, align in tried:
            start = at - {"left": 0, "center": length / 2, "right": length}[align]
            box = (start, down - _HEIGHT / 2, start + length, down + _HEIGHT / 2)
            inside = box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= height
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                labels.append({"x": at, "y": down, "align": align, "label": _cut(point.label)})
                break
    return labels


def _meet(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _cut(label: str) -> str:
    return label if len(label) <= _LETTERS else f"{label[: _LETTERS - 1]}…"


def _padded(values: Iterable[float], share: float = 0.03) -> list[float]:
    """Return the range of the values with a margin at both ends."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    margin = share * (high - low) or 1.0
    return [low - margin, high + margin]


def _svg(chart: dict[str, Any], left: float = 0.0, right: float = 0.0) -> str:
    """Return a chart as an SVG element that takes the page's font and colours and shrinks with its box.

    `left` and `right` are added to its margins.
    """
    line, text = "var(--line)", "var(--ink)"
    axis = {"gridColor": line, "domainColor": line, "tickColor": line, "labelColor": text, "titleColor": text}
    config = {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "padding": {"left": 4 + left, "top": 4, "bottom": 4, "right": 14 + right},
        "view": {"stroke": None},
        "text": {"fill": text, "fontSize": 12},
        "axis": axis | {"titleFontWeight": "normal", "labelFontSize": 12, "titleFontSize": 12, "titlePadding": 8},
    }
    return _tidied(vl_convert.vegalite_to_svg(chart | {"config": config}, vl_version=_VEGA_LITE))


_COORDINATES = re.compile(r' (?:d|transform|x|y|x1|x2|y1|y2)="[^"]*"')
_DIGITS = re.compile(r"(\.\d\d)\d+")
_MARK = re.compile(r'<path aria-label="([^"]*)" role="graphics-symbol"([^>]*)/>')


def _tidied(svg: str) -> str:
    """Return an SVG that is smaller, and whose marks say their words when they are pointed at."""
    svg = _COORDINATES.sub(lambda found: _DIGITS.sub(r"\1", found[0]), svg)
    svg = _MARK.sub(r'<path aria-label="\1" role="graphics-symbol"\2><title>\1</title></path>', svg)
    return svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace(' version="1.1"', "")
