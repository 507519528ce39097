"""Which curves a report has, and what is drawn in each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .read import StageRecord, is_number

# from so many points on a curve is drawn faintly, and smoothed on top of that
MANY = 40
Kind = Literal["line", "faint", "dots"]


@dataclass
class Series:
    """One curve.

    Attributes:
        label: in the legend and where the mouse is.
        xs: steps; ys: values, perhaps not finite.
        hue: which of the page's colours.
        kind: line; faint (what a smoothed line is of); dots (on a line: held-out).
        dashed: the second of two quantities, where the colour says which run.
    """

    label: str
    xs: list[int]
    ys: list[float]
    hue: int = 0
    kind: Kind = "line"
    dashed: bool = False


@dataclass
class Figure:
    """One chart.

    Attributes:
        title, unit: above it.
        rules: (value, what it is): horizontal lines.
        marks: steps that were left out.
        bounds: (lowest, highest) value that is always shown; None: what the curves take.
    """

    title: str
    unit: str
    series: list[Series] = field(default_factory=list)
    rules: list[tuple[float, str]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Spec:
    """A chart's title and unit, the metrics it shows (name → label), and whether held-out values go with them."""

    title: str
    unit: str
    keys: dict[str, str]
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
    """The charts of a stage, or of two that are compared; those without a value are left out.

    Args:
        records: of one method.
        labels: what each is called, where there are two.
    """
    specs = (_DPO if records[0].method == "dpo" else _SFT) + _BOTH
    found = [_figure(spec, records, labels) for spec in specs]
    return [figure for figure in found if any(_finite(s.ys) for s in figure.series)]


def _figure(spec: _Spec, records: Sequence[StageRecord], labels: Sequence[str]) -> Figure:
    process = spec.title == "Memory" and any(record.on_cpu for record in records)
    figure = Figure(spec.title, spec.unit + (", the whole process" if process else ""), bounds=spec.bounds)
    two = len(spec.keys) > 1
    for which, record in enumerate(records):
        who = f"{labels[which]}: " if len(records) > 1 else ""
        for place, (key, label) in enumerate(spec.keys.items()):
            # of one run the colour says what it is; of two, whose
            hue = which if who else place
            what = f"{who}{label}" if two or spec.title == "Memory" or not who else labels[which]
            figure.series += _curves(*record.points(key), what, hue, spec.smooth, dashed=bool(who) and place > 0)
            xs, ys = record.points(f"eval_{key}") if spec.held_out else ([], [])
            if xs:
                dots = f"{who}held-out{f' {label}' if two else ''}"
                hue_of_dots = hue if who or two else 1
                figure.series.append(Series(dots, xs, ys, hue_of_dots, "dots", dashed=bool(who) and place > 0))
        figure.marks += [line["step"] for line in record.left_out if isinstance(line.get("step"), int)]
    figure.rules = list(dict.fromkeys(rule for r in records for rule in _rules(spec, r)))
    return figure


def _curves(xs: list[int], ys: list[float], label: str, hue: int, smooth: bool, *, dashed: bool) -> Iterator[Series]:
    if not xs:
        return
    if smooth and len(xs) >= MANY:
        yield Series(label, xs, ys, hue, "faint", dashed)
        yield Series(f"{label}, smoothed", xs, smoothed(ys), hue, "line", dashed)
    else:
        yield Series(label, xs, ys, hue, "line", dashed)


def _rules(spec: _Spec, record: StageRecord) -> Iterator[tuple[float, str]]:
    if spec.title == "Loss" and record.method == "dpo" and record.config.get("loss_type", "sigmoid") == "sigmoid":
        yield math.log(2), "ln 2: knows nothing"
    if spec.title == "Preference accuracy":
        yield 0.5, "chance"
    if spec.title == "Reward margin":
        yield 0.0, "the reference"
    if spec.title == "Gradient norm" and is_number(most := record.config.get("max_grad_norm")):
        norms = [y for y in record.points("grad_norm")[1] if math.isfinite(y)]
        if norms and max(norms) > most / 3:  # far above the curve it would only squeeze it
            yield float(most), "clipped above"
    planned = record.part("plan").get("account")
    peak = planned.get("peak") if isinstance(planned, dict) else None
    if spec.title == "Memory" and is_number(peak) and peak:
        yield peak / 2**30, "planned"


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a window of a twentieth of the curve around each point, of the finite values in it."""
    wing = max(2, len(values) // 40)
    sums, counts = [0.0], [0]
    for value in values:
        fine = math.isfinite(value)
        sums.append(sums[-1] + (value if fine else 0.0))
        counts.append(counts[-1] + fine)
    result = []
    for place in range(len(values)):
        low, high = max(0, place - wing), min(len(values), place + wing + 1)
        count = counts[high] - counts[low]
        result.append((sums[high] - sums[low]) / count if count else math.nan)
    return result


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
