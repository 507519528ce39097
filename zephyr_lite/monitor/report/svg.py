"""Curves and bars as inline SVG: readable without a script; with one, the values stand where the mouse is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

from .figures import Figure, Series
from .text import Html, esc, number

WIDTH, HEIGHT = 400, 215
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
# points of a curve that are drawn at most
MOST = 240
# values of a held-out curve that are drawn as dots at most; more would hide what is below them
DOTS = 24


def chart(figure: Figure) -> Html:
    """A ``<figure>``: title, curves, legend, and the values for the script."""
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

    parts = []
    step = ticks[1] - ticks[0]
    for tick in ticks:
        y = at(low_x, tick)[1]
        parts.append(f'<path class=grid d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f"<text x={LEFT - 5} y={y + 3.5} text-anchor=end>{esc(_tick(tick, step))}</text>")
    for tick in _ticks(low_x, high_x, 5):
        if low_x <= tick <= high_x and float(tick).is_integer():
            parts.append(_below(at(tick, low)[0], number(int(tick))))
    notes: list[str] = []  # on top of the curves
    for value, label in figure.rules:
        if low <= value <= high:
            y = at(low_x, value)[1]
            parts.append(f'<path class=rule d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
            above = y - 3 if y > TOP + 12 else y + 11
            parts.append(f"<text class=note x={WIDTH - RIGHT - 2} y={above} text-anchor=end>{esc(label)}</text>")
    # as many marks as there are places for
    for place in sorted({round(at(mark, low)[0]) for mark in figure.marks if low_x <= mark <= high_x}):
        parts.append(f'<path class=mark d="M{place} {HEIGHT - BOTTOM}v-7"/>')
    for s in sorted(series, key=lambda s: ("faint", "line", "dots").index(s.kind)):
        parts += _drawn(s, at)
    parts += notes
    values = {
        "x": [low_x, high_x],
        "plot": [LEFT, WIDTH - RIGHT, WIDTH],
        "series": [
            {"n": s.label, "h": s.hue, "k": s.kind, "x": s.xs, "y": [_rounded(y) for y in s.ys]} for s in series
        ],
    }
    unit = f" <small>{esc(figure.unit)}</small>" if figure.unit else ""
    return Html(
        f"<figure class=chart><figcaption>{esc(figure.title)}{unit}</figcaption>"
        f'<svg class=plot viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{esc(_said(figure))}">{"".join(parts)}</svg>'
        f"<p class=legend>{''.join(_legend(s) for s in series if s.kind != 'faint' or len(series) == 1)}</p>"
        + (f"<p class=aside>{esc(cut)}</p>" if cut else "")
        # a tag in a name may not end the script
        + f'<script type="application/json">{json.dumps(values, separators=(",", ":")).replace("<", chr(92) + "u003c")}</script>'
        "</figure>"
    )


def bars(title: str, unit: str, edges: Sequence[float], stacks: Sequence[tuple[str, Sequence[int]]]) -> Html:
    """A histogram.

    Args:
        edges: one more than there are bars.
        stacks: (label, counts), from the bottom up.
    """
    sums = [sum(counts[i] for _, counts in stacks) for i in range(len(edges) - 1)]
    ticks = _ticks(0, max([*sums, 1]), 3)
    high, inner = max(ticks[-1], *sums), WIDTH - LEFT - RIGHT
    wide = inner / len(sums)
    parts = []
    for tick in ticks:
        y = round(TOP + (1 - tick / high) * (HEIGHT - TOP - BOTTOM), 1)
        parts.append(f'<path class=grid d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        if float(tick).is_integer():
            parts.append(f"<text x={LEFT - 5} y={y + 3.5} text-anchor=end>{_tick(tick, ticks[1] - ticks[0])}</text>")
    for place, total in enumerate(sums):
        bottom = float(HEIGHT - BOTTOM)
        told = f"{number(round(edges[place]))} to {number(round(edges[place + 1]))}: {number(total)}"
        told += "".join(f", {number(c[place])} {label}" for label, c in stacks[1:] if c[place])
        shapes = ""
        for hue, (_, counts) in enumerate(stacks):
            tall = counts[place] / high * (HEIGHT - TOP - BOTTOM)
            if tall:
                shapes += (
                    f'<rect class="fill{hue}" x={LEFT + place * wide + 0.6:.1f} y={bottom - tall:.1f} '
                    f"width={max(wide - 1.2, 1):.1f} height={tall:.1f} />"
                )
                bottom -= tall
        parts.append(f"<g><title>{esc(told)}</title>{shapes}</g>" if shapes else "")
    span = edges[-1] - edges[0]
    for tick in _ticks(edges[0], edges[-1], 5):
        if edges[0] <= tick <= edges[-1]:
            parts.append(_below(round(LEFT + (tick - edges[0]) / span * inner, 1), number(round(tick))))
    keys = [
        f'<span><i class="box fill{hue}"></i>{esc(label)}</span>' for hue, (label, c) in enumerate(stacks) if any(c)
    ]
    return Html(
        f"<figure class=chart><figcaption>{esc(title)} <small>{esc(unit)}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{esc(title)}">{"".join(parts)}</svg>'
        f"<p class=legend>{''.join(keys) if len(keys) > 1 else ''}</p></figure>"
    )


def _drawn(s: Series, at: Callable[[float, float], tuple[float, float]]) -> list[str]:
    """A curve's path, broken where a value is not finite, and its dots."""
    path, pen, fine = [], "M", []
    for x, y in zip(s.xs, s.ys):
        if not math.isfinite(y):
            pen = "M"
            continue
        point = at(x, y)
        path.append(f"{pen}{point[0]} {point[1]}")
        fine.append(point)
        pen = "L"
    dashed = " dashed" if s.dashed else ""
    parts = [f'<path class="{s.kind} hue{s.hue}{dashed}" d="{"".join(path)}"/>'] if len(fine) > 1 else []
    if (s.kind == "dots" and len(fine) <= DOTS) or len(fine) == 1:
        parts += [f'<circle class="dot hue{s.hue}" cx={x} cy={y} r=3 />' for x, y in fine]
    return parts


def _legend(s: Series) -> str:
    dot = f'<circle class="dot hue{s.hue}" cx=11 cy=5 r=3 />' if s.kind == "dots" and len(s.xs) <= DOTS else ""
    dashed = " dashed" if s.dashed else ""
    line = f'<path class="{s.kind} hue{s.hue}{dashed}" d="M1 5H21"/>'
    label = s.label.removesuffix(", smoothed")
    return f'<span><svg width=22 height=10 viewBox="0 0 22 10">{line}{dot}</svg>{esc(label)}</span>'


def _range(figure: Figure, series: Sequence[Series]) -> tuple[float, float, str]:
    """(lowest, highest, what is said of a spike that goes out of the picture)."""
    values: list[float] = []
    ceilings: dict[str, float] = {}
    said = ""
    for s in series:  # a faint curve comes before the smoothed one on top of it
        fine = sorted(y for y in s.ys if math.isfinite(y))
        if s.kind == "faint" and len(s.ys) > 20 and fine:  # noise and spikes would press what matters flat
            low, high = fine[int(len(fine) * 0.02)], fine[min(len(fine) - 1, int(len(fine) * 0.98))]
            room = 0.3 * (high - low)
            values += [max(fine[0], low - room), min(fine[-1], high + room)]
            if fine[-1] - high > 8 * (high - low) > 0:
                said = f"cut off: the highest value is {number(fine[-1])}"
                ceilings[f"{s.label}, smoothed"] = high + room  # a spike lifts the mean around it as well
        else:
            values += [y for y in fine if y <= ceilings.get(s.label, math.inf)]
    low, high = min(values), max(values)
    if figure.bounds is not None:
        low, high = min(low, figure.bounds[0]), max(high, figure.bounds[1])
    for value, label in figure.rules:
        near = (high - low) * 1.5 or abs(high) or 1
        if low - near <= value <= high + near or label == "planned":
            low, high = min(low, value), max(high, value)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # sums of one value differ in their last digits
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (-1.0, 1.0)
    return low, high, said


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values around a range: the first at or below it, the last at or above."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _below(x: float, text: str) -> str:
    """A label of the horizontal axis; a long one at its end would be cut off."""
    half = 3.1 * len(text)  # of figures of 11 pixels
    return f"<text x={min(x, round(WIDTH - half, 1))} y={HEIGHT - 7} text-anchor=middle>{text}</text>"


def _tick(value: float, step: float) -> str:
    """A tick's label, with the decimals that its step needs."""
    if value == 0:
        return "0"
    if step >= 1e9:
        return f"{value:.2g}"
    if step >= 1e4:  # there is room for some seven characters
        return f"{value / 1e6:,.0f}M" if step >= 1e6 else f"{value / 1e3:,.0f}k"
    if step < 1e-3 and abs(value) < 100 * step:  # 2e-4, 1.5e-4
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    if step >= 1:
        return f"{value:,.0f}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _thinned(s: Series) -> Series:
    """At most ``MOST`` points. Of a faint curve the lowest and the highest of each stretch: its spikes are the point."""
    if len(s.xs) <= MOST:
        return s
    if s.kind != "faint":
        keep = sorted({round(i * (len(s.xs) - 1) / (MOST - 1)) for i in range(MOST)})
    else:
        stretch = len(s.xs) / (MOST // 2)
        keep = []
        for i in range(MOST // 2):
            places = range(int(i * stretch), int((i + 1) * stretch))
            fine = [p for p in places if math.isfinite(s.ys[p])] or list(places)
            keep += sorted({min(fine, key=lambda p: s.ys[p]), max(fine, key=lambda p: s.ys[p])})
    return Series(s.label, [s.xs[p] for p in keep], [s.ys[p] for p in keep], s.hue, s.kind, s.dashed)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _said(figure: Figure) -> str:
    """The chart in words, for those who do not see it."""
    told = []
    for s in figure.series:
        fine = [y for y in s.ys if math.isfinite(y)]
        if fine and s.kind != "faint":
            told.append(f"{s.label} from {number(fine[0])} to {number(fine[-1])}")
    return f"{figure.title}: {'; '.join(told)}"
