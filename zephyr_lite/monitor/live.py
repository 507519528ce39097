"""The panel in a terminal: drawn in place by a thread of its own, at a rate that costs training next to nothing."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from io import TextIOBase
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console as RichConsole
from rich.console import ConsoleRenderable, RenderHook
from rich.control import Control
from rich.file_proxy import FileProxy
from rich.panel import Panel
from rich.segment import ControlType, Segment
from rich.text import Text

from ..cli.console import Console, Metrics
from ..io.interrupts import SIGNALS, StopRequest
from ..train.objective import Outcome
from ..train.observer import Sample
from ..train.stage import Stage
from .health import Verdict, judge
from .panel import panel_lines, title_of
from .progress import Progress
from .reference_ranges import Published, published_of
from .show import Screen

# Cells; wider lines are harder to read, and a narrower window seldom has to wrap them.
WIDTH = 100
# Seconds between two looks at what is new, and between two drawings where nothing is: the clock goes on.
LOOK, CLOCK = 0.25, 2.0
# Of a processor's time at most; a drawing that takes 5 ms comes once a second.
SHARE = 0.005


class Region(RenderHook):
    """Lines that stay at the bottom: whatever else is printed on this console appears above them.

    The cursor rests at the beginning of the line below. Nothing is hidden or switched, so that a killed process leaves the
    terminal as it was. Each drawing is one write, between the marks of a synchronized update (terminals that do not know
    them pass over them).

    Args:
        draw: (width, height) → the lines, rendered, fewer than ``height``.
        moved: whether somebody else wrote to the terminal, so that the lines of before are to be left alone.
    """

    def __init__(
        self, console: RichConsole, draw: Callable[[int, int], list[list[Segment]]], moved: Callable[[], bool]
    ) -> None:
        self._console, self._draw, self._moved = console, draw, moved
        self._drawn: tuple[int, int] | None = None  # lines on the screen, and the window's width at that time
        self.lock = threading.RLock()

    def start(self) -> None:
        self._console.push_render_hook(self)

    def refresh(self) -> None:
        """Draw it again in its place."""
        with self.lock:
            self._console.print(Control())

    def stop(self) -> None:
        """Leave the last drawing where it is."""
        self._console.pop_render_hook()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        with self.lock:
            size = self._console.size
            lines = self._draw(size.width, size.height)
            count, width = self._drawn or (0, 0)
            # a narrower window has wrapped the lines of before, nobody knows into how many
            up = 0 if size.width < width or self._moved() else min(count, size.height - 1)
            self._drawn = len(lines), size.width
        segments = [_control("\x1b[?2026h\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J")]
        below: list[Segment] = []
        for line in lines:
            below += [*line, Segment.line()]
        below.append(_control("\x1b[?2026l"))
        return [_Drawn(segments), *renderables, _Drawn(below)]


class _Drawn:
    """Segments as they are."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def __rich_console__(self, console: RichConsole, options: Any) -> Sequence[Segment]:
        return self._segments


def _control(codes: str) -> Segment:
    return Segment(codes, None, [(ControlType.CURSOR_UP, 0)])


class LiveScreen(Screen):
    """The panel while steps are made; lines, and what evaluations found, above it; outside of the steps lines alone."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress: Progress | None = None
        self._published: Published | None = None
        self._region = Region(console.out, self._draw, self._interrupted)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self._requests: list[StopRequest] = []  # that had the signals at some time
        self._noticed: list[StopRequest] = []  # of them, those that were asked
        self._redirected = ExitStack()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the terminal is gone: there is nothing to leave clean
            self._close()

    def begins(self, stage: Stage, unit: str, total: int, step: int) -> None:
        self._close()
        self.progress = Progress(stage, unit, total, step)
        self._published = published_of(stage)
        self._stop.clear()
        self._interrupted()
        self._region.start()
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if isinstance(stream, TextIOBase) and stream.isatty():  # what libraries print comes above the panel
                file: Any = FileProxy(self.console.out, cast(IO[str], stream))
                self._redirected.enter_context(redirect(file))
        self._thread = threading.Thread(target=self._keep_drawing, name="zephyr-lite panel", daemon=True)
        self._thread.start()

    def stepped(self, step: int, metrics: Metrics) -> None:
        if self.progress is not None:
            self.progress.stepped(step, metrics)

    def evaluated(self, step: int, metrics: Metrics) -> None:
        if self.progress is not None:
            self.progress.evaluated(step, metrics)

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        if self.progress is not None:
            self.progress.sampled(samples)

    def ends(self, stage: Stage, outcome: Outcome) -> None:
        with suppress(OSError):
            self._close()

    def say(self, text: str = "") -> None:
        self._raise()
        with self._region.lock:
            self.console.say(text)

    def metrics(self, step: int, total: int, metrics: Metrics) -> None:
        self._raise()
        if self._thread is None or any(name.startswith("eval_") for name in metrics):
            with self._region.lock:
                self.console.metrics(step, total, metrics)

    def verdict(self) -> Verdict:
        """What the panel's last line says."""
        assert self.progress is not None
        if self._noticed:
            return Verdict("open", "stopping: the step is finished and a checkpoint written")
        return judge(self.progress, self._published)

    def _raise(self) -> None:
        """What ended the thread that draws is the caller's to know: an error of the terminal ends the run in good order; any
        other is ours, is said, and lines take the panel's place.

        Raises:
            OSError: nothing can be printed any more.
        """
        fault = self._fault
        if isinstance(fault, OSError):
            raise fault
        if fault is not None:
            self._fault = None
            self._close(draw=False)
            self.console.say(
                f"the panel failed ({type(fault).__name__}: {fault}); lines from here on. Please report it."
            )

    def _keep_drawing(self) -> None:
        pause, drawn, last = 0.0, -1, 0.0
        progress = self.progress
        assert progress is not None
        try:
            while True:
                now = time.monotonic()
                if progress.changes != drawn or now - last >= CLOCK:
                    drawn, last = progress.changes, now
                    used = time.thread_time()
                    self._region.refresh()
                    pause = (time.thread_time() - used) / SHARE
                if self._stop.wait(max(LOOK, pause)):
                    return
        except BaseException as error:  # a thread's errors reach nobody by themselves
            self._fault = error

    def _draw(self, width: int, height: int) -> list[list[Segment]]:
        progress = self.progress
        assert progress is not None
        out = self.console.out
        inner = min(width, WIDTH) - 4
        with progress.lock:
            lines = panel_lines(progress, self.verdict(), max(inner, 8), ascii_only=not out.encoding.startswith("utf"))
        title = Text(title_of(progress), style="bold")
        title.truncate(max(inner - 4, 4), overflow="ellipsis")
        panel = Panel(Text("\n").join(lines), title=title, title_align="left", border_style="dim")
        options = out.options.update(width=max(inner, 8) + 4, no_wrap=True, overflow="crop", height=None)
        return out.render_lines(panel, options, pad=False)[: max(1, height - 1)]

    def _interrupted(self) -> bool:
        """Whether a signal came since the last drawing: its handler has written to the terminal past every console."""
        for number in SIGNALS:
            request = getattr(signal.getsignal(number), "__self__", None)
            if isinstance(request, StopRequest) and request not in self._requests:
                self._requests.append(request)  # the last drawing comes when it has given the signals back
        fresh = [r for r in self._requests if r.name is not None and r not in self._noticed]
        self._noticed += fresh
        return bool(fresh)

    def _close(self, draw: bool = True) -> None:
        """Let the panel stand as it is, and give the terminal back."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(timeout=5)
        self._thread = None
        try:
            if draw and self._fault is None:
                self._region.refresh()
        finally:
            self._redirected.close()
            self._region.stop()
