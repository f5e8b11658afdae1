"""Lines and points as SVG, with axes at round numbers; a script of the page reads values out under the pointer."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 548, 10, 262
COLORS = tuple(f"var(--{letter})" for letter in "abcdefgh")
MOST_POINTS = 400
"""Of a line: more than there are pixels, less than make a page heavy."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Args:
    name: In the legend.
    points: By rising x.
    is_faint: Of another run.
    color: Left out: the next one.
    """

    name: str
    points: Sequence[Point]
    is_faint: bool = False
    color: str = ""


@dataclass(frozen=True)
class Axis:
    """From the least to the most of what is shown, and a little beyond where it is no logarithm."""

    low: float
    high: float
    is_log: bool
    begin: float
    end: float

    def place(self, value: float) -> float:
        return self.begin + (self._at(value) - self.low) / (self.high - self.low) * (self.end - self.begin)

    def holds(self, value: float) -> bool:
        return self.low <= self._at(value) <= self.high

    def _at(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def ticks(self) -> list[float]:
        if self.is_log:
            powers = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
            found = [10.0**power for power in powers]
            return found if len(found) > 1 else [10**self.low, 10**self.high]
        step = round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, first + 8) if step * i <= self.high + 1e-9 * step]


def axis(values: Sequence[float], is_log: bool, begin: float, end: float, margin: float = 0.0) -> Axis:
    at = [math.log10(value) if is_log else value for value in values]
    low, high = min(at), max(at)
    if high - low < 1e-12 * max(1.0, abs(high)):
        around = 0.5 if is_log or not high else abs(high) / 2
        low, high = low - around, high + around
    return Axis(low - margin * (high - low), high + margin * (high - low), is_log, begin, end)


def round_step(about: float) -> float:
    """1, 2 or 5 times a power of ten, near so much."""
    power = 10.0 ** math.floor(math.log10(about))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= 0.7 * about)


def lines(title: str, x_label: str, some: Sequence[Line], is_log: bool = False) -> str:
    """ "" where no line has two points."""
    some = [replace(line, points=thinned(finite(line.points, is_log))) for line in some]
    some = [line for line in some if len(line.points) > 1]
    if not some:
        return ""
    own = [line for line in some if not line.is_faint] or some
    end = max(a for line in own for a, _ in line.points)  # a longer neighbour goes on beyond the picture
    some = [replace(line, points=[p for p in line.points if p[0] <= 1.02 * end]) for line in some]
    some = [line for line in some if len(line.points) > 1]
    x = axis([p[0] for line in some for p in line.points], False, LEFT, RIGHT)
    y = axis(_most(own, some), is_log, BOTTOM, TOP, 0.04)
    some = [line for line in some if any(y.holds(b) for _, b in line.points)]
    drawn, legend = [], []
    for number, line in enumerate(some):
        color = line.color or COLORS[number % len(COLORS)]
        places = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in line.points)
        faint = ' stroke-opacity=".45"' if line.is_faint else ""
        width = 1.2 if line.is_faint else 1.8
        drawn.append(f'<polyline fill="none" stroke="{color}" stroke-width="{width}"{faint} points="{places}"/>')
        legend.append((line.name, color))
    mark = f'<line class="mark axis" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}" visibility="hidden"/>'
    series = [{"name": line.name, "points": [[a, b] for a, b in line.points]} for line in some if not line.is_faint]
    series = series or [{"name": line.name, "points": [[a, b] for a, b in line.points]} for line in some]
    data = {"left": LEFT, "right": RIGHT, "width": WIDTH, "x0": x.low, "x1": x.high, "logX": False, "label": x_label}
    return _figure(title, _frame(x, y, x_label) + _clipped("".join(drawn)) + mark, legend, data | {"series": series})


def points(
    title: str,
    x_label: str,
    y_label: str,
    some: Sequence[tuple[str, Point]],
    best: Sequence[Point],
    colors: Sequence[str] = COLORS,
) -> str:
    """With the line through those that nothing beats."""
    if not some:
        return ""
    x = axis([p[0] for _, p in some], False, LEFT, RIGHT, 0.06)
    y = axis([p[1] for _, p in some], False, BOTTOM, TOP, 0.08)
    steps = []
    for place, (a, b) in enumerate(best):
        steps += [f"{x.place(a):.1f},{y.place(best[place - 1][1]):.1f}"] if place else []
        steps.append(f"{x.place(a):.1f},{y.place(b):.1f}")
    front = f'<polyline fill="none" class="axis" stroke-dasharray="3 3" points="{" ".join(steps)}"/>'
    drawn, legend = [front] if len(best) > 1 else [], []
    for number, (name, (a, b)) in enumerate(some):
        color = colors[number % len(colors)]
        at = f'cx="{x.place(a):.1f}" cy="{y.place(b):.1f}"'
        told = escape(f"{name}: {x_label} {a:.6g}, {y_label} {b:.5g}")
        drawn.append(f'<circle {at} r="5" fill="{color}"><title>{told}</title></circle>')
        legend.append((name, color))
    return _figure(f"{title}", _frame(x, y, x_label) + "".join(drawn), legend, None)


def finite(some: Sequence[Point], positive: bool) -> list[Point]:
    return [(a, b) for a, b in some if math.isfinite(a) and math.isfinite(b) and (b > 0 or not positive)]


def thinned(some: Sequence[Point]) -> list[Point]:
    """Means of neighbours where there are more than can be seen; the last point as it is."""
    size = -(-len(some) // MOST_POINTS)
    if size < 2:
        return list(some)
    parts = [some[begin : begin + size] for begin in range(0, len(some) - 1, size)]
    return [(part[-1][0], sum(b for _, b in part) / len(part)) for part in parts] + [some[-1]]


def _most(own: Sequence[Line], some: Sequence[Line]) -> list[float]:
    """What the axis shows: all of this run, but of a start far above the rest, and of other runs, only what fits."""
    values = sorted(b for line in own for _, b in line.points)
    cut = values[-1 - len(values) // 50] if len(values) > 50 else values[-1]
    low, high = values[0], cut if values[-1] > cut + 2 * (cut - values[0]) else values[-1]
    others = [b for line in some for _, b in line.points if low - (high - low) / 4 <= b <= high]
    return [low, high, *others]


def _frame(x: Axis, y: Axis, x_label: str) -> str:
    parts = []
    for value, label in labelled(y.ticks()):
        at = y.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in labelled(x.ticks()):
        parts.append(f'<text x="{x.place(value):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    parts.append(f'<text x="{RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts)


def _figure(title: str, inside: str, legend: Sequence[tuple[str, str]], data: dict | None) -> str:
    keys = "".join(f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in legend)
    points_of = f' data-points="{escape(json.dumps(data))}"' if data else ""
    read = '<div class="read"></div>' if data else ""
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{inside}</svg>'
    return (
        f"<figure{points_of}><figcaption>{escape(title)}</figcaption>{picture}"
        f'<div class="legend">{keys}</div>{read}</figure>'
    )


def _clipped(lines: str) -> str:
    """Of what goes on beyond the axes, what lies between them: an SVG within another shows nothing outside itself."""
    inside = f"{LEFT} {TOP} {RIGHT - LEFT} {BOTTOM - TOP}"
    x, y, width, height = inside.split()
    return f'<svg x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{inside}">{lines}</svg>'


def labelled(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Each with as many digits as it takes to tell them apart."""
    for digits in range(4, 12):
        labels = [short(value, digits) for value in ticks]
        if len(set(labels)) == len(labels):
            break
    return list(zip(ticks, labels, strict=True))


def short(value: float, digits: int = 4) -> str:
    """12, 1.5k, 3M, 2e-4."""
    if value == 0:
        return "0"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.{digits - 3}e}".replace("e-0", "e-")
