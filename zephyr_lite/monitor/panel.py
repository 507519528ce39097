"""The panel: a stage's numbers as a few lines that fit any width."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import pairwise

from rich.cells import cell_len, chop_cells
from rich.text import Text

from ..cli.console import visible
from ..io.words import duration
from .health import Verdict
from .progress import Progress

# Eight heights of a curve's places, and what stands for them where the terminal's encoding has no such signs.
BLOCKS, LETTERS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
CURVE = 24
# Turns' tags of the templates, and special tokens: a sample is read without them.
_TAGS = re.compile(
    r"<\|im_start\|>\s*\w*|<\|start_header_id\|>\s*\w*\s*<\|end_header_id\|>|<\|[\w ]{1,24}\|>|</?s>|\[/?INST\]"
)
_MARKS = {"good": ("✓ ", "green"), "bad": ("! ", "bold yellow"), "open": ("· ", "dim")}
GIB = 2**30


def spark(means: Sequence[float], places: int, signs: str = BLOCKS) -> str:
    """The last shape of a curve in so many signs: its lowest mean is the lowest sign, its highest the highest."""
    if len(means) > places:
        edges = [round(i * len(means) / places) for i in range(places + 1)]
        means = [sum(means[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, high = min(means), max(means)
    if high - low < 1e-9:
        return signs[0] * len(means)
    return "".join(signs[min(len(signs) - 1, int((m - low) / (high - low) * len(signs)))] for m in means)


def title_of(progress: Progress) -> str:
    """The stage, and the run's folder."""
    return visible(f"{progress.stage.config.stage} · {progress.stage.dir.run}")


def panel_lines(progress: Progress, verdict: Verdict, width: int, *, ascii_only: bool = False) -> list[Text]:
    """What stands inside the panel's frame, each line at most ``width`` cells.

    Args:
        ascii_only: the terminal's encoding knows no signs beyond ASCII.
    """
    signs = LETTERS if ascii_only else BLOCKS
    lines = [
        _steps(progress, width, ascii_only),
        _loss(progress, signs),
        *_held_out(progress),
        *_preferences(progress, signs),
        _speed(progress),
        *_rate(progress),
        *_sample(progress, width),
        *_verdict(verdict, width, ascii_only),
    ]
    for line in lines:
        line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
    return lines


def _label(word: str) -> Text:
    return Text(f"{word:<9}", style="dim")


def _steps(progress: Progress, width: int, ascii_only: bool) -> Text:
    step, total = progress.step, max(1, progress.total)
    part = min(1.0, step / total)
    left = progress.seconds_left()
    ends = f"{duration(left)} left" if left is not None else "done" if step >= total else ""
    said = f" {part:>4.0%}  {duration(time.monotonic() - progress.begun)}" + (f", {ends}" if ends else "")
    line = _label("step").append(f"{step:,}/{progress.total:,} ", style="bold")
    room = max(0, min(40, width - cell_len(line.plain) - cell_len(said)))
    full = round(part * room)
    done, rest = ("#", "-") if ascii_only else ("━", "─")
    return line.append(done * full, style="cyan").append(rest * (room - full), style="dim").append(said)


def _loss(progress: Progress, signs: str) -> Text:
    line = _label("loss")
    loss = progress.last.get("loss")
    line.append("–" if loss is None else f"{float(loss):.4f}", style="bold")
    line.append("  ").append(spark(progress.losses.means(), CURVE, signs), style="cyan")
    if (mean := progress.mean("loss")) is not None and len(progress.recent) > 1:
        line.append(f"  mean of {len(progress.recent)} steps {mean:.4f}", style="dim")
    return line


def _held_out(progress: Progress) -> list[Text]:
    if not progress.evaluations:
        return []
    last = progress.evaluations[-1]
    line = _label("held out").append(f"{float(last['eval_loss']):.4f}", style="bold")
    for name, key in (("accuracy", "eval_rewards/accuracies"), ("margin", "eval_rewards/margins")):
        if key in last:
            line.append(f"  {name} {float(last[key]):.3f}")
    line.append(f"  at step {last['step']:,}", style="dim")
    if len(progress.evaluations) > 1:
        line.append(f", before {float(progress.evaluations[-2]['eval_loss']):.4f}", style="dim")
    return [line]


def _preferences(progress: Progress, signs: str) -> list[Text]:
    if "rewards/margins" not in progress.last:
        return []
    accuracy, margin = progress.mean("rewards/accuracies"), progress.mean("rewards/margins")
    line = _label("pairs")
    if accuracy is not None and margin is not None:
        line.append(f"accuracy {accuracy:.3f}  margin {margin:.4f}  ")
    return [line.append(spark(progress.margins.means(), CURVE, signs), style="cyan")]


def _speed(progress: Progress) -> Text:
    unit, last = progress.unit, progress.last
    line = _label("speed")
    seconds = progress.mean("seconds")
    done = progress.mean(f"num_{unit}")
    if seconds and done:
        speed = done / seconds
        line.append(f"{speed:,.0f} {unit}/s" if speed >= 100 else f"{speed:.2f} {unit}/s")
    if "peak_memory_gib" in last:
        line.append(f"  memory {float(last['peak_memory_gib']):.1f}")
        planned = progress.stage.plan.peak
        line.append(f" of {planned / GIB:.1f} GiB planned" if planned else " GiB")
    return line


def _rate(progress: Progress) -> list[Text]:
    last = progress.last
    if "learning_rate" not in last:
        return []
    line = _label("rate").append(f"{float(last['learning_rate']):.2e}")
    if "grad_norm" in last:
        line.append(f"  gradient norm {float(last['grad_norm']):.3g}")
    return [line]


def _sample(progress: Progress, width: int) -> list[Text]:
    sample = progress.sample
    if sample is None:
        return []
    room = max(8, width - cell_len(_label("").plain))
    question = ending(_words(sample.prompt), room)
    lines = wrapped(_words(sample.answer) or "(nothing)", room, 2)
    shown = [_label("asked").append(question, style="dim")]
    return [*shown, *(_label("" if place else "answers").append(line) for place, line in enumerate(lines))]


def ending(text: str, width: int) -> str:
    """The last words that fit into ``width`` cells: a question stands at its prompt's end."""
    if cell_len(text) <= width:
        return text
    kept = ""
    for word in reversed(text.split(" ")):
        if cell_len(f"… {word} {kept}".rstrip()) > width:
            break
        kept = f"{word} {kept}".rstrip()
    return f"… {kept}".rstrip()


def wrapped(text: str, width: int, rows: int) -> list[str]:
    """The text's first rows of at most ``width`` cells, broken between words; what is left out shows as an ellipsis."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += " " + word
            continue
        parts = chop_cells(word, width) or [""]
        lines += parts
    if len(lines) > rows:
        last = lines[rows - 1]
        while last and cell_len(last) > width - 2:
            last = last[:-1]
        lines = [*lines[: rows - 1], last.rstrip() + " …"]
    return lines


def _words(text: str) -> str:
    return " ".join(visible(_TAGS.sub(" ", text)).split())


def _verdict(verdict: Verdict, width: int, ascii_only: bool) -> list[Text]:
    mark, style = _MARKS[verdict.kind]
    mark = "* " if ascii_only and verdict.kind == "good" else "- " if ascii_only and verdict.kind == "open" else mark
    lines = wrapped(verdict.text, width - 2, 2)
    return [Text(("  " if place else mark) + line, style=style) for place, line in enumerate(lines)]
