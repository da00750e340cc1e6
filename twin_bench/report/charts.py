"""The page's charts, as static SVG: no script, text that stays text, colours that are the page's CSS variables.

A chart is a Vega-Lite specification of Altair's, which vl-convert draws. Each kind has a wide form and a narrow one for
a phone, where the text of the wide one would be too small. Each mark says in words what it shows.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import altair as alt
import pandas as pd

WIDE, NARROW = 640, 330
"""The width of a plot in the two forms, in pixels."""
TONES = {"lead": "var(--lead)", "plain": "var(--plain)", "told": "var(--told)", "bound": "var(--muted)"}
"""What a method is, and the colour of it: of the leading group, another one, told the task, a bound."""
_LETTER, _HEIGHT = 6.8, 14
"""The width and height of a label's letter in pixels, for labels that must not meet."""
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
    """A vertical line that values are compared with. It has no label if its label is empty."""

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
    scale, axis = alt.Scale(domain=domain, nice=False, zero=False), alt.Axis(title=title, tickCount=6)

    def across(column: str) -> alt.X:
        return alt.X(f"{column}:Q", scale=scale, axis=axis)

    down = alt.Y("place:O", sort=None, axis=None, scale=alt.Scale(paddingInner=0, paddingOuter=0))
    table = [
        asdict(line) | {"place": place, "shade": line.band % 2, "label": _cut(line.label)}
        for place, line in enumerate(lines)
    ]
    rows = alt.Chart(pd.DataFrame(table)).encode(y=down)
    tone = alt.Color("tone:N", legend=None, scale=alt.Scale(domain=list(TONES), range=list(TONES.values())))
    shape = alt.condition(alt.datum.tone == "told", alt.value("diamond"), alt.value("circle"))
    lower = 8 if narrow else 0
    above = -9 if narrow else 0
    names = rows.mark_text(aria=False, align="left" if narrow else "right", dy=above)
    notes = rows.mark_text(aria=False, align="right" if narrow else "left", dy=above, fill="var(--muted)")
    layers = [
        rows.mark_rect(aria=False, fill="var(--band)").encode(
            x=alt.value(0), x2=alt.value(width), opacity=alt.Opacity("shade:Q", scale=None)
        ),
        *_reference_lines(references, across("value"), domain, step * len(lines)),
        rows.mark_rule(aria=False, strokeWidth=2, yOffset=lower).encode(x=across("low"), x2="high:Q", color=tone),
        rows.mark_point(filled=True, size=70, opacity=1, yOffset=lower).encode(
            x=across("value"), color=tone, shape=shape, description="words:N"
        ),
        names.encode(x=alt.value(4 if narrow else -8), text="label:N"),
        notes.encode(x=alt.value(width + (-4 if narrow else 8)), text="note:N"),
    ]
    return _svg(alt.layer(*layers).properties(width=width, height=step * len(lines)))


def front(points: Sequence[Point], across: str, down: str, *, narrow: bool) -> str:
    """Return a chart of cost against score, with a line along the points that no other one beats.

    Those points and the bounds have their names beside them, where there is room. All others say theirs when they are
    pointed at. The costs have a logarithmic scale where the largest is over five times the smallest.
    """
    width, height = (NARROW, 280) if narrow else (WIDE, 330)
    costs = [point.x for point in points]
    wide_range = min(costs) > 0 and max(costs) > 5 * min(costs)
    domain = _padded([point.y for point in points], 0.08)
    costs_domain = [min(costs) / 1.25, max(costs) * 1.25] if wide_range else _padded(costs, 0.1)
    kind = "log" if wide_range else "linear"
    x = alt.X("x:Q", axis=alt.Axis(title=across, tickCount=6, format="~g"), scale=alt.Scale(
        type=kind, domain=costs_domain, nice=False, zero=False
    ))  # fmt: skip
    y = alt.Y("y:Q", axis=alt.Axis(title=down, tickCount=6), scale=alt.Scale(domain=domain, nice=False, zero=False))
    tone = alt.Color("tone:N", legend=None, scale=alt.Scale(domain=list(TONES), range=list(TONES.values())))
    shape = alt.Shape("tone:N", legend=None, scale=alt.Scale(
        domain=list(TONES), range=["circle", "circle", "diamond", "square"]
    ))  # fmt: skip
    measure = math.log if wide_range else float
    first, last = measure(costs_domain[0]), measure(costs_domain[1])
    places = [
        (width * (measure(point.x) - first) / (last - first), height * (domain[1] - point.y) / (domain[1] - domain[0]))
        for point in points
    ]
    dots = alt.Chart(pd.DataFrame([asdict(point) for point in points])).encode(x=x, y=y)
    best = pd.DataFrame([asdict(point) for point in sorted(points, key=lambda one: one.x) if point.front])
    layers = [dots.mark_point(filled=True, size=80, opacity=0.9).encode(color=tone, shape=shape, description="words:N")]
    if not best.empty:
        steps = alt.Chart(best).mark_line(aria=False, interpolate="step-after", stroke="var(--lead)", strokeDash=[4, 3])
        layers.insert(0, steps.encode(x=x, y=y))
    labels = pd.DataFrame(_labels(points, places, width, height))
    if not labels.empty:
        for align, part in labels.groupby("align"):
            named = alt.Chart(part).mark_text(aria=False, align=align)
            layers.append(named.encode(
                x=alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, width], nice=False)),
                y=alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[height, 0], nice=False)), text="label:N",
            ))  # fmt: skip
    plot, text = layers[: 1 + (not best.empty)], layers[1 + (not best.empty) :]
    together = alt.layer(alt.layer(*plot), *text).resolve_scale(x="independent", y="independent") if text else plot[0]
    return _svg(together.properties(width=width, height=height))


def shares(own: Sequence[int], other: Sequence[int], title: str) -> str:
    """Return a histogram of values from 0 to 1 in bins of equal width, `own` below `other` in each bar."""
    bins = len(own)
    bars = [
        {
            "low": place / bins,
            "high": (place + 1) / bins,
            "rows": rows,
            "whose": whose,
            "words": f"{place / bins:.2f} to {(place + 1) / bins:.2f}: {rows} rows, {said}",
        }
        for whose, said, counts in (
            ("a", "on the task's own expert", own),
            ("b", "on another expert", other),
        )
        for place, rows in enumerate(counts)
        if rows
    ]
    chart = alt.Chart(pd.DataFrame(bars)).mark_bar(binSpacing=1)
    colour = alt.Color("whose:N", legend=None, scale=alt.Scale(domain=["a", "b"], range=["var(--lead)", "var(--less)"]))
    return _svg(
        chart.encode(
            x=alt.X("low:Q", bin="binned", axis=alt.Axis(title=title, tickCount=5), scale=alt.Scale(domain=[0, 1])),
            x2="high:Q",
            y=alt.Y("rows:Q", axis=alt.Axis(title="rows", tickCount=4)),
            color=colour,
            order=alt.Order("whose:N"),
            description="words:N",
        ).properties(width=NARROW - 40, height=150)
    )


def on_the_front(costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Return which points no other point beats: one that costs no more, scores no less, and is better in one."""
    pairs = list(zip(costs, scores, strict=True))
    return [not any(x <= cost and y >= score and (x, y) != (cost, score) for x, y in pairs) for cost, score in pairs]


def _reference_lines(
    references: Sequence[Reference], across: alt.X, domain: Sequence[float], height: int
) -> list[alt.Chart]:
    """Return the vertical lines. Their labels stand above the plot, one a line, so that none meets another."""
    edge = domain[0] + 0.7 * (domain[1] - domain[0])
    left = sorted((one for one in references if one.value <= edge), key=lambda one: -one.value)
    right = sorted((one for one in references if one.value > edge), key=lambda one: one.value)
    charts = []
    for place, reference in enumerate([*left, *right]):
        chart = alt.Chart(pd.DataFrame([{"value": reference.value, "label": reference.label}])).encode(x=across)
        top = -5 - 15 * place if reference.label else 0
        rule = chart.mark_rule(aria=False, stroke="var(--muted)", strokeDash=[2, 3])
        charts.append(rule.encode(y=alt.value(top), y2=alt.value(height)))
        align = "right" if reference in right else "left"
        text = chart.mark_text(aria=False, align=align, dx=-4 if align == "right" else 4, dy=5, fill="var(--muted)")
        if reference.label:
            charts.append(text.encode(y=alt.value(top), text="label:N"))
    return charts


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


def _svg(chart: alt.Chart | alt.LayerChart) -> str:
    """Return a chart as an SVG element that takes the page's font and colours and shrinks with its box."""
    line, text = "var(--line)", "var(--ink)"
    drawn = chart.configure(
        background="transparent", font="system-ui, sans-serif", padding={"left": 4, "top": 4, "bottom": 4, "right": 14}
    )
    drawn = drawn.configure_view(stroke=None).configure_text(fill=text, fontSize=12)
    drawn = drawn.configure_axis(
        gridColor=line, domainColor=line, tickColor=line, labelColor=text, titleColor=text, titleFontWeight="normal",
        labelFontSize=12, titleFontSize=12, titlePadding=8,
    ).configure_axisY(grid=False)  # fmt: skip
    stream = io.StringIO()
    drawn.save(stream, format="svg")
    return _tidied(stream.getvalue())


_COORDINATES = re.compile(r' (?:d|transform|x|y|x1|x2|y1|y2)="[^"]*"')
_DIGITS = re.compile(r"(\.\d\d)\d+")
_MARK = re.compile(r'<path aria-label="([^"]*)" role="graphics-symbol"([^>]*)/>')


def _tidied(svg: str) -> str:
    """Return an SVG that is smaller, and whose marks say their words when they are pointed at."""
    svg = _COORDINATES.sub(lambda found: _DIGITS.sub(r"\1", found[0]), svg)
    svg = _MARK.sub(r'<path aria-label="\1" role="graphics-symbol"\2><title>\1</title></path>', svg)
    return svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace(' version="1.1"', "")
