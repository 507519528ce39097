"""The live panel in a terminal: a stage's metrics, redrawn in place by rich."""

from __future__ import annotations

import re
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from ..io.text import duration
from ..train.stage import Outcome, Sample, Stage
from .console import Console, Metrics, is_evaluation, visible
from .health import Verdict, judge
from .progress import Progress
from .reference_ranges import published_of
from .screen import Screen

WIDTH = 100  # columns at most
LABEL = 9
BLOCKS = "▁▂▃▄▅▆▇█"  # eight heights of a curve
CURVE = 24
# role tags and special tokens of the chat templates, removed from samples
_TAGS = re.compile(
    r"<\|im_start\|>\s*\w*|<\|start_header_id\|>\s*\w*\s*<\|end_header_id\|>|<\|[\w ]{1,24}\|>|</?s>|\[/?INST\]"
)
_MARKS = {"good": ("✓ ", "green"), "bad": ("! ", "bold yellow"), "open": ("· ", "dim")}
GIB = 2**30
STOPPING = Verdict("open", "stopping after this step, with a checkpoint; Ctrl-C again stops at once")


class LiveScreen(Screen):
    """The panel while a stage is trained, with messages and evaluations above it; plain lines before and after."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress: Progress | None = None
        self._live: Live | None = None

    def on_train_begin(self, stage: Stage, unit: str, total: int, step: int) -> None:
        self.close()
        progress = self.progress = Progress(stage, unit, total, step)
        published = published_of(stage)

        def panel() -> RenderableType:
            with progress.lock:
                verdict = STOPPING if _stopping() else judge(progress, published)
                return render(progress, verdict, self.console.out.width)

        self._live = Live(
            get_renderable=panel,
            console=self.console.out,
            refresh_per_second=1,
            vertical_overflow="crop",
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()

    def on_step_end(self, step: int, metrics: Metrics) -> None:
        if self.progress is not None:
            self.progress.stepped(step, metrics)

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        if self.progress is not None:
            self.progress.evaluated(step, metrics)

    def on_sample(self, step: int, samples: Sequence[Sample]) -> None:
        if self.progress is not None:
            self.progress.sampled(samples)

    def on_train_end(self, stage: Stage, outcome: Outcome) -> None:
        self.close()

    def metrics(self, step: int, total: int, metrics: Metrics) -> None:
        if self._live is None or is_evaluation(metrics):
            self.console.metrics(step, total, metrics)

    def close(self, error: BaseException | None = None) -> None:
        """Draw the panel a last time and release the terminal."""
        live, self._live = self._live, None
        if live is not None:
            try:
                live.stop()
            except OSError:  # the terminal was closed
                return


def _stopping() -> bool:
    """Whether a signal asked the training loop to stop (``io.interrupts.StopRequest``)."""
    request = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    return getattr(request, "name", None) is not None


def render(progress: Progress, verdict: Verdict, width: int) -> RenderableType:
    """The panel, at most ``width`` columns wide."""
    width = max(12, min(width, WIDTH))
    room = max(8, width - 4 - LABEL)
    grid = Table.grid(expand=True)
    grid.add_column(width=LABEL, style="dim", no_wrap=True, overflow="crop")
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    grid.add_row("step", _steps(progress, room))
    grid.add_row("loss", _loss(progress))
    if progress.evaluations:
        grid.add_row("held out", _held_out(progress))
    if "rewards/margins" in progress.last:
        grid.add_row("pairs", _preferences(progress))
    grid.add_row("speed", _speed(progress))
    if "learning_rate" in progress.last:
        grid.add_row("rate", _rate(progress))
    if progress.sample is not None:
        question, answer = _plain(progress.sample.prompt), _plain(progress.sample.answer) or "(nothing)"
        cut = "… " + question[-(room - 2) :].partition(" ")[2]  # a question is at the end of its prompt
        grid.add_row("asked", Text(cut if len(question) > room else question, style="dim"))
        for place, line in enumerate(textwrap.wrap(answer, room, max_lines=2, placeholder=" …")):
            grid.add_row("" if place else "answers", Text(line))
    mark, style = _MARKS[verdict.kind]
    said = Text(mark + verdict.text, style=style, no_wrap=False, overflow="fold")
    title = Text(visible(f"{progress.stage.config.stage} · {progress.stage.dir.run}"), style="bold")
    return Panel(Group(grid, said), title=title, title_align="left", border_style="dim", width=width)


def _steps(progress: Progress, room: int) -> RenderableType:
    step, total = progress.step, max(1, progress.total)
    left = progress.seconds_left()
    ends = f", {duration(left)} left" if left is not None else ", done" if step >= total else ""
    line = Table.grid(*(Column(no_wrap=True, overflow="ellipsis") for _ in range(3)))
    line.add_row(
        Text(f"{step:,}/{progress.total:,} ", style="bold"),
        ProgressBar(total=total, completed=step, width=min(40, max(1, room - 40))),
        Text(f" {min(1.0, step / total):>4.0%}  {duration(time.monotonic() - progress.begun)}{ends}"),
    )
    return line


def _loss(progress: Progress) -> Text:
    loss = progress.last.get("loss")
    line = Text("–" if loss is None else f"{float(loss):.4f}", style="bold")
    line = Text.assemble(line, "  ", (spark(progress.losses, CURVE), "cyan"))
    if (mean := progress.mean("loss")) is not None and len(progress.recent) > 1:
        line.append(f"  mean of {len(progress.recent)} steps {mean:.4f}", style="dim")
    return line


def _held_out(progress: Progress) -> Text:
    last = progress.evaluations[-1]
    line = Text.assemble((f"{float(last['eval_loss']):.4f}", "bold"))
    for name, key in (("accuracy", "eval_rewards/accuracies"), ("margin", "eval_rewards/margins")):
        if key in last:
            line.append(f"  {name} {float(last[key]):.3f}")
    line.append(f"  at step {last['step']:,}", style="dim")
    if len(progress.evaluations) > 1:
        line.append(f", before {float(progress.evaluations[-2]['eval_loss']):.4f}", style="dim")
    return line


def _preferences(progress: Progress) -> Text:
    accuracy, margin = progress.mean("rewards/accuracies"), progress.mean("rewards/margins")
    line = Text()
    if accuracy is not None and margin is not None:
        line.append(f"accuracy {accuracy:.3f}  margin {margin:.4f}  ")
    return line.append(spark(progress.margins, CURVE), style="cyan")


def _speed(progress: Progress) -> Text:
    line, unit = Text(), progress.unit
    seconds, done = progress.mean("seconds"), progress.mean(f"num_{unit}")
    if seconds and done:
        speed = done / seconds
        line.append(f"{speed:,.0f} {unit}/s" if speed >= 100 else f"{speed:.2f} {unit}/s")
    if "peak_memory_gib" in progress.last:
        planned = progress.stage.plan.peak
        line.append(f"  memory {float(progress.last['peak_memory_gib']):.1f}")
        line.append(f" of {planned / GIB:.1f} GiB planned" if planned else " GiB")
    return line


def _rate(progress: Progress) -> Text:
    line = Text(f"{float(progress.last['learning_rate']):.2e}")
    if "grad_norm" in progress.last:
        line.append(f"  gradient norm {float(progress.last['grad_norm']):.3g}")
    return line


def _plain(text: str) -> str:
    return " ".join(visible(_TAGS.sub(" ", text)).split())


def spark(values: Sequence[float], places: int) -> str:
    """A curve in at most ``places`` characters, each the mean of an equal part; the lowest mean is the lowest block."""
    values = [value for value in values if value - value == 0]  # finite
    edges = (
        [round(i * len(values) / places) for i in range(places + 1)] if len(values) > places else range(len(values) + 1)
    )
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, high = min(means), max(means)
    if high - low < 1e-9:
        return BLOCKS[0] * len(means)
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((m - low) / (high - low) * len(BLOCKS)))] for m in means)
