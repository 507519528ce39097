"""Charts as inline SVG: which curves a stage has, and how they are drawn. Without a script they are readable; with
``report.js`` they show the values under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup, escape

from .stage_record import StageRecord, is_number

WIDTH, HEIGHT = 400, 215
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
POINTS = 240  # drawn of a curve at most
DOTS = 24  # drawn of a held-out curve at most; more would hide the line
SMOOTHED = 40  # points from which a curve is drawn faintly with a smoothed one on top
Kind = Literal["line", "faint", "dots"]


@dataclass
class Series:
    """One curve.

    Attributes:
        label: in the legend.
        xs, ys: steps and values; a value may be infinite or NaN.
        hue: index of the page's color.
        kind: line; faint (below a smoothed line); dots (a line with dots: held-out values).
        dashed: whether the line is dashed (the second quantity of a run, when two runs are compared).
    """

    label: str
    xs: list[int]
    ys: list[float]
    hue: int = 0
    kind: Kind = "line"
    dashed: bool = False

    def finite(self) -> list[float]:
        return [y for y in self.ys if math.isfinite(y)]


@dataclass
class Figure:
    """One chart: curves, horizontal ``rules`` (value, label), and ``marks`` at steps that were left out.

    Attributes:
        bounds: values that are always in view.
    """

    title: str
    unit: str
    series: list[Series] = field(default_factory=list)
    rules: list[tuple[float, str]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Spec:
    title: str
    unit: str
    metrics: dict[str, str]  # name → label
    held_out: bool = True
    smooth: bool = True
    bounds: tuple[float, float] | None = None


_SFT = (
    _Spec("Loss", "nats a token", {"loss": "training"}),
    _Spec("Token accuracy", "share of supervised tokens", {"mean_token_accuracy": "training"}),
    _Spec("Entropy", "nats a token", {"entropy": "training"}),
)
_DPO = (
    _Spec("Loss", "DPO loss", {"loss": "training"}),
    _Spec("Preference accuracy", "share of pairs", {"rewards/accuracies": "training"}, bounds=(0.0, 1.0)),
    _Spec("Reward margin", "chosen − rejected, β · nats", {"rewards/margins": "training"}),
    _Spec("Rewards", "β · nats", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    _Spec("Log-probabilities", "nats a response", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
)
_BOTH = (
    _Spec("Learning rate", "", {"learning_rate": "training"}, held_out=False, smooth=False),
    _Spec("Gradient norm", "before clipping", {"grad_norm": "training"}, held_out=False),
    _Spec("Throughput", "tokens a second", {"tokens_per_second": "training"}, held_out=False),
    _Spec("Throughput", "pairs a second", {"pairs_per_second": "training"}, held_out=False),
    _Spec(
        "Memory", "GiB at the peak", {"peak_memory_gib": "measured"}, held_out=False, smooth=False, bounds=(0.0, 0.0)
    ),
)


def figures_of(records: Sequence[StageRecord], labels: Sequence[str]) -> list[Figure]:
    """The charts of a stage, or of two stages of one method; charts without a finite value are omitted."""
    specs = (_DPO if records[0].method == "dpo" else _SFT) + _BOTH
    figures = [_figure(spec, records, labels) for spec in specs]
    return [figure for figure in figures if any(s.finite() for s in figure.series)]


def _figure(spec: _Spec, records: Sequence[StageRecord], labels: Sequence[str]) -> Figure:
    process = spec.title == "Memory" and any(record.on_cpu for record in records)
    figure = Figure(spec.title, spec.unit + (", the whole process" if process else ""), bounds=spec.bounds)
    several, compared = len(spec.metrics) > 1, len(records) > 1
    for which, record in enumerate(records):
        who = f"{labels[which]}: " if compared else ""
        for place, (metric, label) in enumerate(spec.metrics.items()):
            # the color is the quantity of one run, or the run of two
            hue, dashed = (which, place > 0) if compared else (place, False)
            name = labels[which] if compared and not several and spec.title != "Memory" else f"{who}{label}"
            xs, ys = record.points(metric)
            if spec.smooth and len(xs) >= SMOOTHED:
                figure.series.append(Series(name, xs, ys, hue, "faint", dashed))
                figure.series.append(Series(f"{name}, smoothed", xs, smoothed(ys), hue, "line", dashed))
            elif xs:
                figure.series.append(Series(name, xs, ys, hue, "line", dashed))
            xs, ys = record.points(f"eval_{metric}") if spec.held_out else ([], [])
            if xs:
                name = f"{who}held-out{f' {label}' if several else ''}"
                figure.series.append(Series(name, xs, ys, hue if compared or several else 1, "dots", dashed))
        figure.marks += [line["step"] for line in record.left_out if isinstance(line.get("step"), int)]
    figure.rules = list(dict.fromkeys(rule for record in records for rule in _rules(spec, record)))
    return figure


def _rules(spec: _Spec, record: StageRecord) -> Iterator[tuple[float, str]]:
    if spec.title == "Loss" and record.method == "dpo" and record.config.get("loss_type", "sigmoid") == "sigmoid":
        yield math.log(2), "start (ln 2)"
    if spec.title == "Preference accuracy":
        yield 0.5, "chance"
    if spec.title == "Reward margin":
        yield 0.0, "the reference"
    if spec.title == "Gradient norm" and is_number(limit := record.config.get("max_grad_norm")):
        norms = [y for y in record.points("grad_norm")[1] if math.isfinite(y)]
        if norms and max(norms) > limit / 3:  # far above the curve it would only compress it
            yield float(limit), "clipped above"
    if spec.title == "Memory" and (peak := record.planned.get("peak")):
        yield peak / 2**30, "planned"


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a window of a twentieth of the curve around each point; values that are not finite are skipped."""
    wing = max(2, len(values) // 40)
    windows = [values[max(0, i - wing) : i + wing + 1] for i in range(len(values))]
    finite = [[y for y in window if math.isfinite(y)] for window in windows]
    return [sum(window) / len(window) if window else math.nan for window in finite]


def chart(figure: Figure) -> Markup:
    """A line chart as ``<figure>``: title, curves, legend, and the values as JSON for the script."""
    series = [_thinned(s) for s in figure.series if s.xs]
    xs = [x for s in series for x in s.xs]
    low_x, high_x = min(xs), max(xs)
    if low_x == high_x:
        low_x, high_x = low_x - 1, high_x + 1
    low, high, cut = _range(figure, series)
    ticks = _ticks(low, high, 4)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        down = TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(min(max(down, TOP), HEIGHT - BOTTOM), 1)

    parts = [_grid(at(low_x, tick)[1], f"{tick:,.6g}") for tick in ticks]
    for tick in _ticks(low_x, high_x, 5):
        if low_x <= tick <= high_x and float(tick).is_integer():
            parts.append(_label_below(at(tick, low)[0], number(int(tick))))
    for value, label in figure.rules:
        if low <= value <= high:
            y = at(low_x, value)[1]
            parts.append(f'<path class=rule d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
            above = y - 3 if y > TOP + 12 else y + 11
            parts.append(f"<text class=note x={WIDTH - RIGHT - 2} y={above} text-anchor=end>{escape(label)}</text>")
    for place in sorted({round(at(mark, low)[0]) for mark in figure.marks if low_x <= mark <= high_x}):
        parts.append(f'<path class=mark d="M{place} {HEIGHT - BOTTOM}v-7"/>')
    for s in sorted(series, key=lambda s: ("faint", "line", "dots").index(s.kind)):
        parts.append(_curve(s, at))
    said = [f"{s.label} from {number(f[0])} to {number(f[-1])}" for s in figure.series if (f := s.finite())]
    values = {
        "x": [low_x, high_x],
        "plot": [LEFT, WIDTH - RIGHT, WIDTH],
        "series": [
            {
                "n": s.label,
                "h": s.hue,
                "k": s.kind,
                "x": s.xs,
                "y": [float(f"{y:.5g}") if math.isfinite(y) else None for y in s.ys],
            }
            for s in series
        ],
    }
    data = json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")  # a label may not end the script
    legend = "".join(_legend(s) for s in series if s.kind != "faint" or len(series) == 1)
    return _frame(
        f'<svg class=plot viewBox="0 0 {WIDTH} {HEIGHT}" role=img '
        f'aria-label="{escape(figure.title)}: {escape("; ".join(said))}">{"".join(parts)}</svg>'
        f"<p class=legend>{legend}</p>"
        + (f"<p class=aside>{escape(cut)}</p>" if cut else "")
        + f'<script type="application/json">{data}</script>',
        figure.title,
        figure.unit,
    )


def histogram(title: str, unit: str, edges: Sequence[float], stacks: Sequence[tuple[str, Sequence[int]]]) -> Markup:
    """A stacked bar chart as ``<figure>``.

    Args:
        edges: one more than there are bars.
        stacks: (label, counts), bottom first.
    """
    sums = [sum(counts) for counts in zip(*(counts for _, counts in stacks))]
    ticks = _ticks(0, max([*sums, 1]), 3)
    high, inner, tall = max(ticks[-1], *sums), WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    wide = inner / len(sums)
    parts = []
    for tick in ticks:
        label = f"{tick:,.6g}" if float(tick).is_integer() else ""
        parts.append(_grid(round(TOP + (1 - tick / high) * tall, 1), label))
    for place, total in enumerate(sums):
        if not total:
            continue
        bottom = float(HEIGHT - BOTTOM)
        said = f"{number(round(edges[place]))} to {number(round(edges[place + 1]))}: {number(total)}"
        said += "".join(f", {number(counts[place])} {label}" for label, counts in stacks[1:] if counts[place])
        parts.append(f"<g><title>{escape(said)}</title>")
        for hue, (_, counts) in enumerate(stacks):
            bar = counts[place] / high * tall
            bottom -= bar
            if bar:
                parts.append(
                    f'<rect class="fill{hue}" x={LEFT + place * wide + 0.6:.1f} y={bottom:.1f} '
                    f"width={max(wide - 1.2, 1):.1f} height={bar:.1f} />"
                )
        parts.append("</g>")
    for tick in _ticks(edges[0], edges[-1], 5):
        if edges[0] <= tick <= edges[-1]:
            x = LEFT + (tick - edges[0]) / (edges[-1] - edges[0]) * inner
            parts.append(_label_below(round(x, 1), number(round(tick))))
    keys = [
        f'<span><i class="box fill{hue}"></i>{escape(label)}</span>' for hue, (label, c) in enumerate(stacks) if any(c)
    ]
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return _frame(f"{svg}<p class=legend>{''.join(keys) if len(keys) > 1 else ''}</p>", title, unit)


def _frame(inner: str, title: str, unit: str) -> Markup:
    small = f" <small>{escape(unit)}</small>" if unit else ""
    return Markup(f"<figure class=chart><figcaption>{escape(title)}{small}</figcaption>{inner}</figure>")


def _grid(y: float, label: str) -> str:
    text = f"<text x={LEFT - 5} y={y + 3.5} text-anchor=end>{label}</text>" if label else ""
    return f'<path class=grid d="M{LEFT} {y}H{WIDTH - RIGHT}"/>{text}'


def _label_below(x: float, text: str) -> str:
    """A label of the horizontal axis, moved left where it would be cut off."""
    half = 3.1 * len(text)  # at 11 pixels
    return f"<text x={min(x, round(WIDTH - half, 1))} y={HEIGHT - 7} text-anchor=middle>{text}</text>"


def _curve(s: Series, at: Callable[[float, float], tuple[float, float]]) -> str:
    """A curve's path, interrupted where a value is not finite, and its dots."""
    path, points = "", []
    pen = "M"
    for x, y in zip(s.xs, s.ys):
        if not math.isfinite(y):
            pen = "M"
            continue
        points.append(at(x, y))
        path += f"{pen}{points[-1][0]} {points[-1][1]}"
        pen = "L"
    drawn = f'<path class="{_style(s)}" d="{path}"/>' if len(points) > 1 else ""
    if (s.kind == "dots" and len(points) <= DOTS) or len(points) == 1:
        drawn += "".join(f'<circle class="dot hue{s.hue}" cx={x} cy={y} r=3 />' for x, y in points)
    return drawn


def _legend(s: Series) -> str:
    dot = f'<circle class="dot hue{s.hue}" cx=11 cy=5 r=3 />' if s.kind == "dots" and len(s.xs) <= DOTS else ""
    line = f'<path class="{_style(s)}" d="M1 5H21"/>'
    label = escape(s.label.removesuffix(", smoothed"))
    return f'<span><svg width=22 height=10 viewBox="0 0 22 10">{line}{dot}</svg>{label}</span>'


def _style(s: Series) -> str:
    return f"{s.kind} hue{s.hue}{' dashed' if s.dashed else ''}"


def _range(figure: Figure, series: Sequence[Series]) -> tuple[float, float, str]:
    """(lowest, highest, a note if a spike is cut off)."""
    values: list[float] = []
    ceilings: dict[str, float] = {}
    note = ""
    for s in series:  # a faint curve comes before its smoothed one
        fine = sorted(s.finite())
        if s.kind == "faint" and len(fine) > 20:  # noise and spikes would flatten the rest
            low, high = fine[int(len(fine) * 0.02)], fine[int(len(fine) * 0.98)]
            room = 0.3 * (high - low)
            values += [max(fine[0], low - room), min(fine[-1], high + room)]
            if fine[-1] - high > 8 * (high - low) > 0:
                note = f"cut off: the highest value is {number(fine[-1])}"
                ceilings[f"{s.label}, smoothed"] = high + room  # a spike raises the mean around it, too
        else:
            values += [y for y in fine if y <= ceilings.get(s.label, math.inf)]
    values += figure.bounds or ()
    low, high = min(values), max(values)
    for value, label in figure.rules:
        near = (high - low) * 1.5 or abs(high) or 1
        if low - near <= value <= high + near or label == "planned":
            low, high = min(low, value), max(high, value)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # rounding errors of a constant
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (-1.0, 1.0)
    return low, high, note


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values around a range: the first at or below it, the last at or above."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _thinned(s: Series) -> Series:
    """At most ``POINTS`` points; of a faint curve the extremes of each stretch, so that spikes stay."""
    count = len(s.xs)
    if count <= POINTS:
        return s
    if s.kind != "faint":
        keep = sorted({round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)})
    else:
        keep, stretches = [], POINTS // 2
        for i in range(stretches):
            places = range(i * count // stretches, (i + 1) * count // stretches)
            fine = [p for p in places if math.isfinite(s.ys[p])] or list(places)
            keep += sorted({min(fine, key=lambda p: s.ys[p]), max(fine, key=lambda p: s.ys[p])})
    return Series(s.label, [s.xs[p] for p in keep], [s.ys[p] for p in keep], s.hue, s.kind, s.dashed)


def number(value: Any) -> str:
    """Four significant digits; thousands separators; ``–`` for None."""
    if not is_number(value):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "not finite"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1e-3 else f"{value:.4g}"
