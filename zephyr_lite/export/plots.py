"""Loss curves of a model's stages, as PNG files for its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..io.atomic import bytes_aside
from .facts import StageFacts, history

BLUE, ORANGE, GREY = "#3b6ea8", "#d0722b", "#9aa5b1"


def draw_stage(path: Path, stage: StageFacts) -> bool:
    """Draw what a stage logged: the loss, held-out points on it, and of DPO how often and by how much the chosen answer
    is preferred. Returns whether there was anything to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = history(stage)
    panels = [("loss", "loss", "nats a token" if stage.method == "sft" else "DPO loss")]
    if stage.method == "dpo":
        panels += [
            ("rewards/accuracies", "accuracy of the implicit reward", "share of pairs"),
            ("rewards/margins", "reward margin", "β · nats"),
        ]
    panels = [panel for panel in panels if _points(lines, panel[0])[0] or _points(lines, f"eval_{panel[0]}")[0]]
    if not panels:
        return False
    figure = Figure(figsize=(4.6 * len(panels) + 0.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (key, title, unit) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        steps, values = _points(lines, key)
        if steps:
            many = len(steps) > 20
            axes.plot(steps, values, color=GREY if many else BLUE, linewidth=0.8 if many else 1.6, label="training")
            if many:
                axes.plot(steps, _smoothed(values), color=BLUE, linewidth=1.8, label="training, smoothed")
        steps, values = _points(lines, f"eval_{key}")
        if steps:
            axes.plot(steps, values, color=ORANGE, marker="o", markersize=4, linewidth=1.4, label="held-out")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key == "rewards/accuracies":
            axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel(unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    with bytes_aside(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True


def _points(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = {line["step"]: float(line[key]) for line in lines if isinstance(line.get(key), int | float)}
    return list(found), list(found.values())


def _smoothed(values: list[float]) -> list[float]:
    """Mean over a window of a tenth of the run that ends at each step."""
    width = max(5, len(values) // 10)
    return [sum(part) / len(part) for part in (values[max(0, end - width) : end] for end in range(1, len(values) + 1))]
