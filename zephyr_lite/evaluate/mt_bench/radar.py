"""MT-Bench's scores as a picture: a radar plot for each turn, a line for each model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...io.atomic import bytes_aside
from .prompts import HIGHEST

LEAST = 3  # categories; fewer make no figure
# Okabe and Ito's, which people who see colours otherwise tell apart too; and a line style each, for a print in grey
LOOKS = (
    ("#0072B2", "-", "o"),
    ("#E69F00", "--", "s"),
    ("#555555", ":", "^"),
    ("#009E73", "-.", "D"),
    ("#CC79A7", "-", "v"),
    ("#D55E00", "--", "P"),
)


def draw_radar(path: Path, models: dict[str, dict[str, Any]], title: str) -> None:
    """Write a PNG.

    Args:
        models: name → ``scores.model_scores``, with at least ``LEAST`` categories.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    categories = list(next(iter(models.values()))["categories"])
    angles = [2 * math.pi * place / len(categories) for place in range(len(categories))]
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    lines: dict[str, Any] = {}
    for turn in (1, 2):
        axes: Any = figure.add_subplot(1, 2, turn, projection="polar")  # polar axes have methods of their own
        axes.set_theta_offset(math.pi / 2)
        axes.set_theta_direction(-1)
        axes.set_ylim(0, HIGHEST)
        axes.set_yticks(range(2, HIGHEST + 1, 2))
        axes.tick_params(axis="y", labelsize=8, labelcolor="#666666")
        axes.set_xticks(angles, categories, fontsize=11)
        axes.tick_params(axis="x", pad=6)
        for label, angle in zip(axes.get_xticklabels(), angles):  # beside the circle, not across it
            across = round(math.sin(angle), 6)
            label.set_horizontalalignment("center" if not across else "left" if across > 0 else "right")
        axes.set_title(f"turn {turn}", fontsize=12, pad=18)
        for (name, body), (colour, style, marker) in zip(models.items(), LOOKS * (1 + len(models) // len(LOOKS))):
            scores = [body["categories"][category][f"turn_{turn}"] for category in categories]
            points = [math.nan if score is None else score for score in scores]  # a gap, not a zero
            how: dict[str, Any] = {"color": colour, "linestyle": style, "marker": marker, "markersize": 4}
            lines[name] = axes.plot([*angles, angles[0]], [*points, points[0]], linewidth=1.8, **how)[0]
            if not any(map(math.isnan, points)):
                axes.fill(angles, points, color=colour, alpha=0.08)
    labels = [f"{n} ({'-' if b['score'] is None else format(b['score'], '.2f')})" for n, b in models.items()]
    figure.legend(list(lines.values()), labels, loc="outside lower center", ncols=min(3, len(models)), frameon=False)
    with bytes_aside(path) as file:
        figure.savefig(file, format="png", dpi=120)
