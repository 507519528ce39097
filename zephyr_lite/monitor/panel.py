"""The live panel in a terminal: a stage's metrics, redrawn in place by rich."""

from __future__ import annotations

import math
import re
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from ..io.text import duration
from ..train.stage import Outcome, Sample, Stage
from .console import Console, Metrics, is_evaluation, rate, visible
from .health import RECENT, Progress, Verdict, judge, mean, moved, published_of
from .screens import Screen

WIDTH = 100  # columns at most
LABEL = 9
BLOCKS = "▁▂▃▄▅▆▇█"  # eight heights of a curve
CURVE = 24
# role tags and special tokens of the chat templates, removed from samples
_TAGS = re.compile(
    r"<\|im_start\|>\s*\w*|<\|start_header_id\|>\s*\w*\s*<\|end_header_id\|>|<\|[\w ]{1,24}\|>|</?s>|\[/?INST\]"
)
_MARKS = {"good": ("✓ ", "green"), "bad": ("! ", "bold yellow"), "open": ("· ", "dim")}
STOPPING = Verdict("open", "stopping after this step, with a checkpoint; Ctrl-C again stops at once")


class LiveScreen(Screen):
    """The panel while a stage is trained, with messages and evaluations above it; plain lines before and after."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress: Progress | None = None
        self._live: Live | None = None

    def on_train_begin(self, stage: Stage, unit: str, total: int, step: int) -> None:
        super().on_train_begin(stage, unit, total, step)
        progress = self.progress = Progress(stage, unit, total, step)
        published = published_of(stage)

        def panel() -> RenderableType:
            # the handler of a signal that asked the training loop to stop (``io.interrupts.StopRequest``) has a name
            request = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
            verdict = STOPPING if getattr(request, "name", None) else judge(progress, published)
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
        assert self.progress is not None
        self.progress.add(step, metrics)

    on_evaluate = on_step_end

    def on_sample(self, step: int, samples: Sequence[Sample]) -> None:
        assert self.progress is not None
        self.progress.sample = samples[0]

    def on_log(self, step: int, metrics: Metrics) -> None:
        if is_evaluation(metrics):
            super().on_log(step, metrics)

    def on_train_end(self, stage: Stage, outcome: Outcome) -> None:
        assert self.progress is not None
        self.progress.general_loss = outcome.general_loss
        self.__exit__()

    def __exit__(self, kind: object = None, error: BaseException | None = None, trace: object = None) -> None:
        """Draw the panel a last time and release the terminal."""
        live, self._live = self._live, None
        if live is not None:
            with suppress(OSError):  # the terminal was closed
                live.stop()


def render(progress: Progress, verdict: Verdict, width: int) -> RenderableType:
    """The panel, at most ``width`` columns wide."""
    width = max(12, min(width, WIDTH))
    room = max(8, width - 4 - LABEL)
    steps, evaluations = list(progress.steps), list(progress.evaluations)  # the training thread appends to them
    last, recent = steps[-1] if steps else {}, steps[-RECENT:]
    grid = Table.grid(expand=True)
    grid.add_column(width=LABEL, style="dim", no_wrap=True, overflow="crop")
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)

    step, total, left = progress.step, max(1, progress.total), progress.seconds_left()
    ends = f", {duration(left)} left" if left is not None else ", done" if step >= total else ""
    line = Table.grid(*(Column(no_wrap=True, overflow="ellipsis") for _ in range(3)))
    line.add_row(
        Text(f"{step:,}/{progress.total:,} ", style="bold"),
        ProgressBar(total=total, completed=step, width=min(40, max(1, room - 40))),
        Text(f" {min(1.0, step / total):>4.0%}  {duration(time.monotonic() - progress.begun)}{ends}"),
    )
    grid.add_row("step", line)

    loss = Text(f"{float(last['loss']):.4f}" if last else "–", style="bold")
    text = Text.assemble(loss, "  ", (spark([float(metrics["loss"]) for metrics in steps], CURVE), "cyan"))
    if len(recent) > 1 and (average := mean(recent, "loss")) is not None:
        text.append(f"  mean of {len(recent)} steps {average:.4f}", style="dim")
    grid.add_row("loss", text)

    if evaluations:
        evaluation = evaluations[-1]
        text = Text(f"{float(evaluation['eval_loss']):.4f}", style="bold")
        for name, key in (("accuracy", "eval_rewards/accuracies"), ("margin", "eval_rewards/margins")):
            if key in evaluation:
                text.append(f"  {name} {float(evaluation[key]):.3f}", style="not bold")
        ago = f"  at step {evaluation['step']:,}"
        if len(evaluations) > 1:
            ago += f", before {float(evaluations[-2]['eval_loss']):.4f}"
        grid.add_row("held out", text.append(ago, style="not bold dim"))

    if progress.general_loss is not None:
        grid.add_row("general", "{before:.4f} nats a token before, {after:.4f} after".format(**progress.general_loss))

    accuracy, margin = mean(moved(recent), "rewards/accuracies"), mean(moved(recent), "rewards/margins")
    if accuracy is not None and margin is not None:
        curve = spark([float(metrics["rewards/margins"]) for metrics in steps], CURVE)
        grid.add_row(progress.unit, Text.assemble(f"accuracy {accuracy:.3f}  margin {margin:.4f}  ", (curve, "cyan")))

    parts = []
    seconds, done = mean(recent, "seconds"), mean(recent, f"num_{progress.unit}")
    if seconds and done:
        parts.append(rate(done / seconds, progress.unit))
    if "peak_memory_gib" in last:
        planned = progress.stage.plan.peak / 2**30
        parts.append(
            f"memory {float(last['peak_memory_gib']):.1f} GiB" + (f", planned {planned:.1f}" if planned else "")
        )
    grid.add_row("speed", "  ".join(parts))
    if "learning_rate" in last:
        norm = f"  gradient norm {float(last['grad_norm']):.3g}" if "grad_norm" in last else ""
        grid.add_row("rate", f"{float(last['learning_rate']):.2e}{norm}")

    if progress.sample is not None:
        question, answer = (
            " ".join(visible(_TAGS.sub(" ", said)).split()) for said in (progress.sample.prompt, progress.sample.answer)
        )
        if len(question) > room:
            question = "… " + question[-(room - 2) :].partition(" ")[2]  # a question is at the end of its prompt
        grid.add_row("asked", Text(question, style="dim"))
        for place, part in enumerate(textwrap.wrap(answer or "(nothing)", room, max_lines=2, placeholder=" …")):
            grid.add_row("" if place else "answers", Text(part))
    mark, style = _MARKS[verdict.kind]
    text = Text(mark + verdict.text, style=style, no_wrap=False, overflow="fold")
    title = Text(visible(f"{progress.stage.config.stage} · {progress.stage.dir.run}"), style="bold")
    return Panel(Group(grid, text), title=title, title_align="left", border_style="dim", width=width)


def spark(values: Sequence[float], places: int) -> str:
    """A curve in at most ``places`` characters, each the mean of an equal part; the lowest mean is the lowest block."""
    values = [value for value in values if math.isfinite(value)]
    count = min(places, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = len(BLOCKS) / (high - low) if high - low >= 1e-9 else 0.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((mean - low) * scale))] for mean in means)
