"""Charts of the report: which curves a stage has, and their geometry. ``report.html.j2`` draws them as inline SVG, which is
readable without a script; with ``report.js`` the values under the pointer are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard

if TYPE_CHECKING:
    from .report import StageRecord

WIDTH, HEIGHT = 400, 215
LEFT, RIGHT, TOP, BOTTOM = 46, 390, 8, 191  # edges of the plot
POINTS = 240  # drawn of a curve at most
DOTS = 24  # drawn of a held-out curve at most; more would hide the line
SMOOTHED = 40  # points from which a curve is drawn faintly, with a smoothed one on top


@dataclass
class Curve:
    """Values at steps, or counts at lengths; a value may be infinite or NaN.

    Attributes:
        hue: index of the page's color.
        kind: line; faint, below its smooth one; dots: held-out values.
        dashed: the second quantity of a run, when two runs are compared.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    hue: int = 0
    kind: Literal["line", "faint", "smooth", "dots"] = "line"
    dashed: bool = False


class _Spec(NamedTuple):
    title: str
    unit: str
    metrics: dict[str, str]  # name → label
    smooth: bool = True
    bounds: tuple[float, ...] = ()  # values that are always in view


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
    _Spec("Learning rate", "", {"learning_rate": "training"}, smooth=False),
    _Spec("Gradient norm", "before clipping", {"grad_norm": "training"}),
    _Spec("Throughput", "tokens a second", {"tokens_per_second": "training"}),
    _Spec("Throughput", "pairs a second", {"pairs_per_second": "training"}),
    _Spec("Memory", "GiB at the peak", {"peak_memory_gib": "measured"}, smooth=False, bounds=(0.0,)),
)


def charts_of(records: Sequence[StageRecord], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The charts of a stage, or of two stages of one method; charts without a finite value are omitted.

    Args:
        labels: names of the two stages; [] for one.
    """
    charts = []
    for spec in (_DPO if records[0].method == "dpo" else _SFT) + _BOTH:
        curves: list[Curve] = []
        rules: dict[str, float] = {}
        marks: list[int] = []
        several = len(spec.metrics) > 1
        for place, record in enumerate(records):
            for index, (metric, label) in enumerate(spec.metrics.items()):
                # the color is the quantity of one run, or the run of two
                hue, dashed = (place, index > 0) if labels else (index, False)
                name = record.who + label if several or not labels else labels[place]
                xs, ys = record.columns.get(metric, ([], []))
                if not any(map(math.isfinite, ys)):
                    continue
                if spec.smooth and len(xs) >= SMOOTHED:
                    curves.append(Curve(f"{name}, each step", xs, ys, hue, "faint", dashed))
                    curves.append(Curve(name, xs, smoothed(ys), hue, "smooth", dashed))
                else:
                    curves.append(Curve(name, xs, ys, hue, "line", dashed))
                xs, ys = record.columns.get(f"eval_{metric}", ([], []))
                name = record.who + (f"held-out {label}" if several else "held-out")
                curves.append(Curve(name, xs, ys, hue if labels or several else 1, "dots", dashed))
            marks += [line["step"] for line in record.left_out]
            rules |= _rules(spec.title, record)
        if curves:
            charts.append(line_chart(spec.title, spec.unit, curves, rules, marks, spec.bounds))
    return charts


def _rules(title: str, record: StageRecord) -> dict[str, float]:
    """Horizontal lines of a chart: label → value."""
    if title == "Loss" and record.method == "dpo" and record.config.get("loss_type", "sigmoid") == "sigmoid":
        return {"start (ln 2)": math.log(2)}
    if title == "Preference accuracy":
        return {"chance": 0.5}
    if title == "Reward margin":
        return {"the reference": 0.0}
    if title == "Gradient norm" and is_number(limit := record.config.get("max_grad_norm")):
        # far above the curve it would compress it
        return {"clipped above": limit} if max(record.values("grad_norm"), default=0) > limit / 3 else {}
    if title == "Memory" and record.planned.get("peak"):
        return {"planned": record.planned["peak"] / 2**30}
    return {}


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a window of a twentieth of the curve around each point; values that are not finite are skipped."""
    wing = max(2, len(values) // 40)
    result = []
    for i in range(len(values)):
        window = list(filter(math.isfinite, values[max(0, i - wing) : i + wing + 1]))
        result.append(sum(window) / len(window) if window else math.nan)
    return result


def line_chart(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    rules: dict[str, float] | None = None,
    marks: Sequence[int] = (),
    bounds: Sequence[float] = (),
    x_name: str = "step",
) -> dict[str, Any]:
    """A chart's geometry for the template, and its values for the script.

    Args:
        rules: horizontal lines, label → value.
        marks: places to mark on the horizontal axis.
        bounds: values that are always in view.
        x_name: of the horizontal axis.
    """
    curves = [_thinned(curve) for curve in curves if curve.xs]
    xs = sorted(x for curve in curves for x in (curve.xs[0], curve.xs[-1]))
    low_x, high_x = xs[0], xs[-1]
    if low_x == high_x:
        low_x, high_x = low_x - 1, high_x + 1
    rules = rules or {}
    low, high = _range(curves, rules, bounds)
    ticks = _ticks(low, high, 4)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (RIGHT - LEFT)
        down = TOP + (high - y) / (high - low) * (BOTTOM - TOP)
        return round(across, 1), round(min(max(down, TOP), BOTTOM), 1)

    drawn, values, told = [], [], []
    for curve in curves:
        path, pen, points = "", "M", []
        for x, y in zip(curve.xs, curve.ys):
            if math.isfinite(y):
                points.append(at(x, y))
                path += f"{pen}{points[-1][0]} {points[-1][1]}"
            pen = "L" if math.isfinite(y) else "M"  # interrupted where a value is not finite
        dots = points if len(points) == 1 or (curve.kind == "dots" and len(points) <= DOTS) else []
        style = f"{curve.kind} hue{curve.hue}{' dashed' if curve.dashed else ''}"
        drawn.append({"label": curve.label, "kind": curve.kind, "hue": curve.hue, "style": style})
        drawn[-1] |= {"path": path if len(points) > 1 else "", "dots": dots}
        ys = [float(f"{y:.5g}") if math.isfinite(y) else None for y in curve.ys]
        values.append({"n": curve.label, "h": curve.hue, "k": curve.kind, "x": curve.xs, "y": ys})
        told.append(f"{curve.label} from {number(curve.ys[0])} to {number(curve.ys[-1])}")
    below = []
    for tick in _ticks(low_x, high_x, 5):
        if low_x <= tick <= high_x and tick == int(tick):
            text = number(int(tick))
            below.append((min(at(tick, low)[0], round(WIDTH - 3.1 * len(text), 1)), text))  # 3.1: half a letter
    return {
        "title": title,
        "unit": unit,
        "grid": [(at(low_x, tick)[1], f"{tick:,.6g}") for tick in ticks],
        "below": below,
        "rules": [(at(low_x, value)[1], label) for label, value in rules.items() if low <= value <= high],
        "marks": sorted({round(at(mark, low)[0]) for mark in marks if low_x <= mark <= high_x}),
        "curves": drawn,
        "told": "; ".join(told),
        "data": {"name": x_name, "x": [low_x, high_x], "plot": [LEFT, RIGHT, WIDTH], "series": values},
    }


def _range(curves: Sequence[Curve], rules: dict[str, float], bounds: Sequence[float]) -> tuple[float, float]:
    """(lowest, highest) value in view, without a faint curve's extremes, which would flatten the rest."""
    values = [*bounds]
    for curve in curves:
        finite = sorted(filter(math.isfinite, curve.ys))
        if curve.kind == "faint" and finite:
            values += [finite[int(len(finite) * 0.02)], finite[int(len(finite) * 0.98)]]
        elif curve.kind != "smooth":
            values += finite
    low, high = min(values), max(values)
    for label, value in rules.items():
        near = (high - low) * 1.5 or abs(high) or 1
        if low - near <= value <= high + near or label == "planned":
            low, high = min(low, value), max(high, value)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # rounding errors of a constant
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (-1.0, 1.0)
    return low, high


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values around a range: the first at or below it, the last at or above."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _thinned(curve: Curve) -> Curve:
    """At most ``POINTS`` points of a curve."""
    count = len(curve.xs)
    if count <= POINTS:
        return curve
    keep = [round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)]
    return replace(curve, xs=[curve.xs[place] for place in keep], ys=[curve.ys[place] for place in keep])


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any) -> str:
    """Four significant digits; thousands separators; ``–`` for None."""
    if not is_number(value):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1e-3 else f"{value:.4g}"
