"""The drawings of the report, as inline SVG.

Drawn here because the report needs four simple shapes and no script: a file of this kind opens under a policy that forbids all script,
prints as it looks, follows the colours of the page, and its drawings are read out by screen readers (`<title>`); every figure also stands
in a table beside it. Horizontal positions are percentages of the drawing's width and text keeps its size in pixels,
so one drawing serves a phone and a wide screen. All text goes through `Markup.format`, which escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor, isfinite, log10

from markupsafe import Markup

from fiducial.app.report.hidden import visible
from fiducial.core.intervals import Rate

SCALES = {0.1: (0, 0.02, 0.04, 0.06, 0.08, 0.1), 0.25: (0, 0.05, 0.1, 0.15, 0.2, 0.25), 0.5: (0, 0.1, 0.2, 0.3, 0.4, 0.5), 1.0: (0, 0.25, 0.5, 0.75, 1)}
"""Ticks of an axis of rates, by where it ends."""

MOST_POINTS = 400
"""A longer curve is drawn as means of equal stretches."""

WIDTHS = (290.0, 600.0)
"""Widths of the trade-off plot, in pixels, at which its labels must not cover one another: a phone and a desk."""

HEIGHT = 340.0
"""Height of the trade-off plot, in pixels."""

APART = 6
"""Pixels from the middle of a row up to the mark for before, and down to the one for after."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A model on the trade-off plot: two rates, both better when lower."""

    name: str
    x: Rate
    y: Rate
    promoted: bool = False
    first: bool = False
    """The model the others are compared with, drawn hollow."""


def percent(value: float) -> str:
    """A share in [0, 1] as whole per cent, with one decimal where rounding would hide that it is not 0 or 1.

    >>> percent(0.384), percent(0.004), percent(0.0001), percent(0.9999), percent(0.0)
    ('38%', '0.4%', '<0.1%', '>99.9%', '0%')
    """
    if 0 < value < 0.01:
        return "<0.1%" if value < 0.001 else f"{value:.1%}"
    if 0.99 < value < 1:
        return ">99.9%" if value > 0.999 else f"{value:.1%}"
    return f"{value:.0%}"


def rate_words(rate: Rate) -> str:
    """A rate with what it rests on.

    >>> rate_words(Rate(2, 40))
    '5% (1% to 17%; 2 of 40)'
    """
    if not rate.n:
        return "not measured (n = 0)"
    low, high = rate.interval()
    return f"{percent(rate.value)} ({percent(low)} to {percent(high)}; {rate.hits} of {rate.n})"


def scale(rates: Sequence[Rate]) -> float:
    """Where an axis from 0 must end to show all `rates` with their intervals: 0.1, 0.25, 0.5 or 1."""
    highest = max((rate.interval()[1] for rate in rates if rate.n), default=1.0)
    return next(end for end in SCALES if highest <= end)


def track(before: Rate, after: Rate | None, *, end: float, title: str) -> Markup:
    """One row of an interval plot, axis 0 to `end`: hollow dot before, filled dot after, whiskers for 95 %; one filled dot when `after` is None."""
    if after is None:
        marks = _dot(before, end, 0, "after")
    else:
        link = _bar("link", before.value / end, -APART, after.value / end, APART) if before.n and after.n else Markup()
        marks = link + _dot(before, end, -APART, "before") + _dot(after, end, APART, "after")
    return _row([tick / end for tick in SCALES[end]], _middle(marks), title)


def axis(end: float) -> Markup:
    """The numbers below the rows of an interval plot."""
    labels = Markup().join(_tick(tick / end, percent(tick)) for tick in SCALES[end])
    return Markup('<svg class="axis" width="100%" height="18" aria-hidden="true">{}</svg>').format(labels)


def change_reach(bounds: Sequence[float]) -> float:
    """Half the width of a symmetric axis that holds all of `bounds`: 0.1, 0.25, 0.5 or 1."""
    return next((end for end in SCALES if max(map(abs, bounds), default=0.0) <= end), 1.0)


def change_track(value: float, low: float, high: float, *, reach: float, title: str) -> Markup:
    """One row of a plot of changes, axis -`reach` to `reach` with a line at 0, interval `low` to `high`."""

    def at(v: float) -> float:
        return min(1.0, max(0.0, 0.5 + v / reach / 2))

    marks = _bar("whisker after", at(low), 0, at(high), 0) + Markup('<circle class="dot after" cx="{}" cy="0" r="5"/>').format(_at(at(value)))
    return _row((0, 0.25, 0.75, 1), _line("zero", 0.5, 0, 0.5, 1) + _middle(marks), title)


def change_axis(reach: float) -> Markup:
    """The numbers below a plot of changes, in percentage points."""
    labels = Markup().join(_tick(0.5 + f / 2, f"{100 * f * reach:+.3g}".replace("-", "\u2212") if f else "0") for f in (-1, -0.5, 0, 0.5, 1))
    return Markup('<svg class="axis" width="100%" height="18" aria-hidden="true">{}</svg>').format(labels)


def trade_off(spots: Sequence[Spot], *, title: str) -> Markup:
    """Models on two rates, best in the lower left corner, joined in the order given. Spots without a measurement are left out."""
    shown = [s for s in spots if s.x.n and s.y.n]
    right, top = scale([s.x for s in shown]), scale([s.y for s in shown])
    places = [(s.x.value / right, 1 - s.y.value / top) for s in shown]
    parts = _plane(right, top)
    parts += Markup().join(_line("path", a[0], a[1], b[0], b[1]) for a, b in pairwise(places))
    for spot, (x, y) in zip(shown, places, strict=True):
        (left, far), (low, high) = spot.x.interval(), spot.y.interval()
        look = "before" if spot.first and not spot.promoted else "after" if spot.promoted else "between"
        parts += _line(f"whisker {look}", left / right, y, far / right, y) + _line(f"whisker {look}", x, 1 - low / top, x, 1 - high / top)
        if spot.promoted:
            parts += Markup('<circle class="ring" cx="{}" cy="{}" r="10"/>').format(_at(x), _at(y))
        parts += Markup('<circle class="dot {}" cx="{}" cy="{}" r="5.5"/>').format(look, _at(x), _at(y))
    names = [_short(visible(s.name)) + (" (promoted)" if s.promoted else "") for s in shown]
    for name, (x, y), (dx, dy, anchor) in zip(names, places, place_labels(names, places), strict=True):
        parts += Markup('<text class="name" x="{}" y="{}" dx="{}" dy="{}" text-anchor="{}">{}</text>').format(_at(x), _at(y), dx, dy, anchor, name)
    return Markup('<svg class="plane" role="img" width="100%" height="{:.0f}"><title>{}</title>{}</svg>').format(HEIGHT, visible(title), parts)


def place_labels(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[tuple[int, int, str]]:
    """For each name at a place (x and y in [0, 1], y downwards) an offset in pixels and an anchor, so that no label covers another or a dot."""
    options = [(d, v, a) for v in (-9, 18, -25, 34, -41, 50) for d, a in ((12, "start"), (-12, "end"), (0, "middle"))]
    # in small print at the foot stands the word that marks the target corner
    taken = {w: [(0.0, HEIGHT - 20, 60.0, HEIGHT)] + [(x * w - 8, y * HEIGHT - 8, x * w + 8, y * HEIGHT + 8) for x, y in places] for w in WIDTHS}
    chosen = []
    for name, (x, y) in zip(names, places, strict=True):
        boxes = [{w: _label_box(name, x * w, y * HEIGHT, option) for w in WIDTHS} for option in options]
        free = (i for i, box in enumerate(boxes) if all(_fits(box[w], w) and not any(_overlap(box[w], t) for t in taken[w]) for w in WIDTHS))
        best = next(free, 0)
        for w in WIDTHS:
            taken[w].append(boxes[best][w])
        chosen.append(options[best])
    return chosen


def curve(values: Sequence[float | None], *, title: str) -> Markup:
    """A figure per step, with gaps where it was not finite, and its running mean where there are enough steps."""
    points, each = thinned(values)
    known = [v for v in points if v is not None]
    if not known:
        return Markup()
    ticks = nice_ticks(min(0.0, *known), max(known))
    low, high = ticks[0], ticks[-1]
    parts = Markup().join(_line("grid", 0, (high - t) / (high - low), 1, (high - t) / (high - low)) for t in ticks)
    for t in ticks:
        parts += Markup('<text x="0" y="{}" dx="-8" dy="4" text-anchor="end">{:g}</text>').format(_at((high - t) / (high - low)), t)
    lines = _stretches(points, low, high, "raw")
    if len(known) >= 20:
        lines += _stretches(_running_mean(points), low, high, "smooth")
    parts += Markup('<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">{}</svg>').format(lines)
    for x, anchor, step in ((0, "start", 1), (1, "end", len(values))):
        parts += Markup('<text x="{}" y="100%" dy="18" text-anchor="{}">step {}</text>').format(_at(x), anchor, step)
    note = f"; each point is the mean of {each} steps" if each > 1 else ""
    return Markup('<svg class="plane curve" role="img" width="100%" height="180"><title>{}</title>{}</svg>').format(visible(title) + note, parts)


def thinned(values: Sequence[float | None]) -> tuple[list[float | None], int]:
    """At most MOST_POINTS values: means over stretches of equal length, and that length. What is not finite becomes None.

    >>> thinned([1.0, float("nan")])
    ([1.0, None], 1)
    """
    clean = [v if v is not None and isfinite(v) else None for v in values]
    each = -(-len(clean) // MOST_POINTS) or 1
    if each == 1:
        return clean, 1
    stretches = [[v for v in clean[i : i + each] if v is not None] for i in range(0, len(clean), each)]
    return [sum(s) / len(s) if s else None for s in stretches], each


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose `low` to `high`.

    >>> nice_ticks(0.0, 0.69)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    spread = high - low or abs(high) or 1.0
    unit = 10 ** floor(log10(spread / 4))
    step = next(unit * m for m in (1, 2, 5, 10) if spread / (unit * m) <= 5)
    first = floor(low / step)
    last = max(first + 1, -floor(-high / step + 1e-9))
    return [round(i * step, 12) for i in range(first, last + 1)]


def _at(share: float) -> str:
    return f"{100 * share:.2f}%"


def _line(look: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    """A line on a plane, everything in shares of width and height."""
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(look, _at(x1), _at(y1), _at(x2), _at(y2))


def _bar(look: str, x1: float, y1: int, x2: float, y2: int) -> Markup:
    """A line in a row: x in shares of the width, y in pixels from the middle."""
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(look, _at(x1), y1, _at(x2), y2)


def _tick(x: float, text: str) -> Markup:
    return Markup('<text x="{}" y="13" text-anchor="middle">{}</text>').format(_at(x), text)


def _row(ticks: Sequence[float], marks: Markup, title: str) -> Markup:
    """A drawing that fills its cell, with vertical lines at `ticks` so that those of all rows join."""
    lines = Markup().join(_line("grid", x, 0, x, 1) for x in ticks)
    text = '<svg class="track" role="img" width="100%" height="100%"><title>{}</title>{}{}</svg>'
    return Markup(text).format(visible(title), lines, marks)


def _middle(marks: Markup) -> Markup:
    """Marks whose y is 0 in the middle of the row."""
    return Markup('<svg y="50%" width="100%" height="1" overflow="visible">{}</svg>').format(marks)


def _dot(rate: Rate, end: float, y: int, look: str) -> Markup:
    if not rate.n:
        return Markup()
    low, high = rate.interval()
    dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="5"/>').format(look, _at(rate.value / end), y)
    return _bar(f"whisker {look}", low / end, y, high / end, y) + dot


def _plane(right: float, top: float) -> Markup:
    """Grid, numbers on both axes, and the target corner."""
    # of a fixed size: a corner to go for, not a limit
    corner = Markup('<svg width="100%" height="100%" overflow="hidden"><circle class="target" cx="0" cy="100%" r="62"/></svg>')
    parts = corner + Markup('<text class="aim" x="0" y="100%" dx="8" dy="-8">target</text>')
    for tick in SCALES[right]:
        parts += _line("grid", tick / right, 0.0, tick / right, 1.0)
        parts += Markup('<text x="{}" y="100%" dy="18" text-anchor="middle">{}</text>').format(_at(tick / right), percent(tick))
    for tick in SCALES[top]:
        parts += _line("grid", 0.0, 1 - tick / top, 1.0, 1 - tick / top)
        parts += Markup('<text x="0" y="{}" dx="-8" dy="4" text-anchor="end">{}</text>').format(_at(1 - tick / top), percent(tick))
    return parts


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _label_box(name: str, x: float, y: float, option: tuple[int, int, str]) -> Box:
    dx, dy, anchor = option
    width = 7.0 * len(name)
    left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return left, y + dy - 12, left + width, y + dy + 3


def _fits(box: Box, width: float) -> bool:
    return box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= HEIGHT


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _running_mean(points: Sequence[float | None]) -> list[float | None]:
    """Mean of the ninth part of the points that lies around each."""
    half = max(1, len(points) // 18)
    windows = [[v for v in points[max(0, i - half) : i + half + 1] if v is not None] for i in range(len(points))]
    return [sum(w) / len(w) if w and points[i] is not None else None for i, w in enumerate(windows)]


def _stretches(points: Sequence[float | None], low: float, high: float, look: str) -> Markup:
    """Lines through the points, broken at gaps; a point alone between two gaps is a short dash."""
    lines, stretch = Markup(), []
    for i, value in enumerate([*points, None]):
        if value is not None:
            stretch.append((100 * i / max(1, len(points) - 1), 100 * (1 - (value - low) / (high - low))))
            continue
        if len(stretch) == 1:
            stretch.append((stretch[0][0] + 1, stretch[0][1]))
        if stretch:
            lines += Markup('<polyline class="{}" points="{}"/>').format(look, " ".join(f"{x:.2f},{y:.2f}" for x, y in stretch))
        stretch = []
    return lines
