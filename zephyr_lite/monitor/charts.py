"""Charts of the report: which curves a stage has, and their geometry. ``report.html.j2`` draws them as inline SVG, which is
readable without a script; with ``report.js`` the values under the pointer are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np

from ..config.schema import RunConfig

if TYPE_CHECKING:
    from .records import StageRecord

WIDTH = 400
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


# title, unit, metric → label
_Charts = list[tuple[str, str, dict[str, str]]]
_SFT: _Charts = [
    ("Loss", "nats a token", {"loss": "training"}),
    ("Token accuracy", "share of supervised tokens", {"mean_token_accuracy": "training"}),
    ("Entropy", "nats a token", {"entropy": "training"}),
]
_DPO: _Charts = [
    ("Loss", "{loss} loss", {"loss": "training"}),
    ("Preference accuracy", "share of {rows}", {"rewards/accuracies": "training"}),
    ("Reward margin", "chosen − rejected, β · nats", {"rewards/margins": "training"}),
    ("Rewards", "β · nats", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    ("Log-probabilities", "nats a response", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
]
_BOTH: _Charts = [
    ("Learning rate", "", {"learning_rate": "training"}),
    ("Gradient norm", "before clipping", {"grad_norm": "training"}),
    ("Throughput", "tokens a second", {"tokens_per_second": "training"}),
    ("Throughput", "pairs a second", {"pairs_per_second": "training"}),
    ("Throughput", "answers a second", {"answers_per_second": "training"}),
    ("Memory", "GiB at the peak", {"peak_memory_gib": "measured"}),
]
_NOT_SMOOTHED = ("Learning rate", "Memory")
_IN_VIEW: dict[str, tuple[float, ...]] = {"Preference accuracy": (0.0, 1.0), "Memory": (0.0,)}


def charts_of(records: Sequence[StageRecord], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The charts of a stage, or of two stages of one method; charts without a finite value are omitted.

    Args:
        labels: names of the two stages; [] for one.
    """
    charts, configs = [], [RunConfig.model_construct(**record.config) for record in records]
    losses = dict.fromkeys("DPO" if name == "sigmoid" else name for config in configs for name in config.losses)
    words = {"loss": " + ".join(losses), "rows": "rows" if "kto" in losses else "pairs"}
    for title, unit, metrics in (_DPO if records[0].method == "dpo" else _SFT) + _BOTH:
        curves: list[Curve] = []
        rules: dict[str, float] = {}
        marks: list[int] = []
        several = len(metrics) > 1
        for place, (record, config) in enumerate(zip(records, configs)):
            known = None
            if record.method == "dpo":
                from ..train.losses import initial_loss  # torch, which other charts do not need

                known = initial_loss(config)
            for index, (metric, label) in enumerate(metrics.items()):
                # the color is the quantity of one run, or the run of two
                hue, dashed = (place, index > 0) if labels else (index, False)
                name = record.who + label if several or not labels else labels[place]
                xs, ys = record.columns.get(metric, ([], []))
                if not any(map(math.isfinite, ys)):
                    continue
                if len(xs) >= SMOOTHED and title not in _NOT_SMOOTHED:
                    curves.append(Curve(f"{name}, each step", xs, ys, hue, "faint", dashed))
                    curves.append(Curve(name, xs, smoothed(ys), hue, "smooth", dashed))
                else:
                    curves.append(Curve(name, xs, ys, hue, "line", dashed))
                xs, ys = record.columns.get(f"eval_{metric}", ([], []))
                name = record.who + (f"held-out {label}" if several else "held-out")
                curves.append(Curve(name, xs, ys, hue if labels or several else 1, "dots", dashed))
            marks.extend(line["step"] for line in record.left_out)
            if title == "Loss" and known is not None:
                rules[f"start ({known[1]})"] = known[0]
            elif title == "Preference accuracy":
                rules["chance"] = 0.5
            elif title == "Reward margin" and config.needs_reference:
                rules["the reference"] = 0.0
            elif title == "Gradient norm" and (limit := record.config.get("max_grad_norm")):
                if max(record.values("grad_norm"), default=0) > limit / 3:  # far above the curve it would compress it
                    rules["clipped above"] = limit
            elif title == "Memory" and record.planned.get("peak"):
                rules["planned"] = record.planned["peak"] / 2**30
        if curves:
            charts.append(line_chart(title, unit.format(**words), curves, rules, marks, _IN_VIEW.get(title, ())))
    return charts


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
    rules = rules or {}
    thinned, xs, ys = [], [], [*bounds]
    for curve in curves:
        if not curve.xs:
            continue
        keep = np.linspace(0, len(curve.xs) - 1, min(len(curve.xs), POINTS)).round().astype(int)
        at, values = np.asarray(curve.xs)[keep], np.asarray(curve.ys, dtype=float)[keep]
        thinned.append((curve, at, values))
        xs += [at[0].item(), at[-1].item()]
        finite = values[np.isfinite(values)]
        if curve.kind == "faint" and len(finite):  # its extremes would flatten the rest
            ys += np.quantile(finite, [0.02, 0.98]).tolist()
        elif curve.kind != "smooth":
            ys += finite.tolist()
    low_x, high_x = min(xs), max(xs)
    if low_x == high_x:
        low_x, high_x = low_x - 1, high_x + 1
    low, high = min(ys), max(ys)
    for label, value in rules.items():
        near = (high - low) * 1.5 or abs(high) or 1
        if low - near <= value <= high + near or label == "planned":
            low, high = min(low, value), max(high, value)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # rounding errors of a constant
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (-1.0, 1.0)
    ticks = _ticks(low, high, 4)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def across(x: Any) -> Any:
        return np.round(LEFT + (np.asarray(x) - low_x) / (high_x - low_x) * (RIGHT - LEFT), 1).tolist()

    def down(y: Any) -> Any:
        return np.clip(TOP + (high - np.asarray(y)) / (high - low) * (BOTTOM - TOP), TOP, BOTTOM).round(1).tolist()

    drawn, series, told = [], [], []
    for curve, at, values in thinned:
        path, pen, points, rounded = "", "M", [], []
        for x, y, value in zip(across(at), down(values), values.tolist()):
            finite = math.isfinite(value)
            if finite:
                path += f"{pen}{x} {y}"
                points.append((x, y))
            pen = "L" if finite else "M"  # interrupted where a value is not finite
            rounded.append(float(f"{value:.5g}") if finite else None)
        style = f"{curve.kind} hue{curve.hue}{' dashed' if curve.dashed else ''}"
        dots = points if len(points) == 1 or (curve.kind == "dots" and len(points) <= DOTS) else []
        path = path if len(points) > 1 else ""
        drawn.append(
            {"label": curve.label, "kind": curve.kind, "hue": curve.hue, "style": style, "path": path, "dots": dots}
        )
        series.append({"n": curve.label, "h": curve.hue, "k": curve.kind, "x": at.tolist(), "y": rounded})
        told.append(f"{curve.label} from {number(values[0].item())} to {number(values[-1].item())}")
    below = []
    for tick in _ticks(low_x, high_x, 5):
        if low_x <= tick <= high_x and tick == int(tick):
            text = number(int(tick))
            below.append((min(across(tick), round(WIDTH - 3.1 * len(text), 1)), text))  # 3.1: half a letter
    grid = [(down(tick), f"{tick:,.6g}") for tick in ticks]
    lines, crosses = [], set()
    for label, value in rules.items():
        if low <= value <= high:
            lines.append((down(value), label))
    for mark in marks:
        if low_x <= mark <= high_x:
            crosses.add(round(across(mark)))
    return {
        "title": title,
        "unit": unit,
        "grid": grid,
        "below": below,
        "rules": lines,
        "marks": sorted(crosses),
        "curves": drawn,
        "told": "; ".join(told),
        "data": {"name": x_name, "x": [low_x, high_x], "plot": [LEFT, RIGHT, WIDTH], "series": series},
    }


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values around a range: the first at or below it, the last at or above."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = 10 * power
    for factor in (5, 2, 1):
        if factor * power >= rough * 0.999:
            step = factor * power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return (np.arange(first, max(last, first + 1) + 1) * step).tolist()


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
