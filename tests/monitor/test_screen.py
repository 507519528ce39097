"""The output of a training stage: the panel in a terminal, JSON lines, and the verdict."""

import io
import json
import logging
import math
import re
from contextlib import suppress
from types import SimpleNamespace

import pytest

from zephyr_lite.config.load import RunConfig
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.monitor import screens
from zephyr_lite.monitor.console import Console
from zephyr_lite.monitor.health import Progress, judge
from zephyr_lite.monitor.panel import LiveScreen
from zephyr_lite.monitor.screens import JsonScreen, open_screen
from zephyr_lite.train.distributed import PeerEnded
from zephyr_lite.train.stage import Outcome, Sample

LN2 = math.log(2)
STEP = {
    "loss": 1.25,
    "num_tokens": 3000.0,
    "grad_norm": 0.5,
    "learning_rate": 2e-4,
    "seconds": 2.0,
    "tokens_per_second": 1500.0,
    "peak_memory_gib": 9.8,
}
PAIRS = {
    "loss": LN2,
    "num_pairs": 16.0,
    "rewards/accuracies": 0.9,
    "rewards/margins": 0.3,
    "seconds": 2.0,
}
SAMPLE = Sample(0, "<|user|>\nWhat is \x1b[31m good?</s>\n<|assistant|>\n", "Soup. \x1b[2J " + "Bread " * 60, "Tea.")


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True

    @property
    def text(self):
        """Everything that was written, without control codes."""
        return re.sub(r"\x1b\[[\d;]*[A-Za-z]|\r", "", self.getvalue())


def message(text):
    return logging.makeLogRecord({"msg": text, "levelno": logging.INFO, "levelname": "INFO"})


def stage_of(folder, method="sft", **changes):
    config = RunConfig(output_dir=str(folder), stage=method, **changes)
    return SimpleNamespace(
        method=method,
        config=config,
        dir=StageDir(folder / method),
        plan=SimpleNamespace(peak=11 * 2**30),
        base=SimpleNamespace(device="cuda:0"),
        frozen=[object()] if method == "dpo" else [],
    )


@pytest.fixture
def terminal(monkeypatch):
    for name in (*screens.NOTEBOOKS, "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return Terminal()


def ran(screen, stage, steps=3, total=10, metrics=STEP):
    screen.on_train_begin(stage, "tokens", total, 0)
    for step in range(1, steps + 1):
        screen.on_step_end(step, metrics)
        screen.on_log(step, metrics)


# -- which screen ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tty", "variables", "options", "kind"),
    [
        (False, {}, {}, screens.Screen),
        (False, {}, {"quiet": True}, screens.QuietScreen),
        (False, {}, {"as_json": True}, JsonScreen),
        (False, {"FORCE_COLOR": "1"}, {}, screens.Screen),
        (True, {}, {}, LiveScreen),
        (True, {"TERM": "dumb"}, {}, screens.Screen),
        (True, {"JPY_PARENT_PID": "7"}, {}, screens.Screen),  # `!zephyr-lite sft` in a cell: it only appends
    ],
)
def test_each_place_has_its_screen(tty, variables, options, kind, terminal, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    screen = open_screen(Console(out=terminal if tty else io.StringIO()), **options)
    assert type(screen) is kind
    assert (screen.most is not None) == ("JPY_PARENT_PID" in variables)


# -- the panel ---------------------------------------------------------------------------------------------------------


def test_the_panel_shows_the_metrics_and_restores_the_terminal(terminal, tmp_path):
    console = Console(out=terminal, err=terminal)
    with suppress(UserError), LiveScreen(console) as screen:
        screen.log(message("loading the base"))
        ran(screen, stage_of(tmp_path))
        screen.progress.begun -= 6  # three steps in six seconds
        screen.on_sample(0, [SAMPLE])
        screen.on_evaluate(3, {"eval_loss": 1.1})
        screen.on_log(3, {"eval_loss": 1.1})
        screen.progress.general_loss = {"before": 2.911, "after": 2.953}
        raise UserError("no room", "make some")
    console.user_error(UserError("no room", "make some"))
    assert not console.out._render_hooks and screen._live is None
    assert terminal.text.startswith("loading the base\n") and terminal.text.endswith("╯\nerror: no room\nmake some\n")
    assert "\nstep  3/10  held-out  loss 1.1000\n" in terminal.text  # above the panel
    panel = terminal.text.split("╭")[-1]
    rows = [line.split()[1] for line in panel.splitlines() if line.startswith("│")]
    assert rows[:8] == ["step", "loss", "held", "general", "speed", "rate", "asked", "answers"]
    for part in (
        "3/10",
        " 30%",
        "1.2500",
        "1.1000",
        "2.9110 nats a token before, 2.9530 after",
        "1,500 tokens/s",
        "memory 9.8 GiB, planned 11.0",
        " s left",
    ):
        assert part in panel
    assert "What is \\x1b[31m good?" in panel and "<|user|>" not in panel  # an answer cannot move the cursor


# -- the verdict -------------------------------------------------------------------------------------------------------


def judged(stage, steps, evaluations=(), total=400, published=None, held_out=0.75):
    progress = Progress(stage, "pairs" if stage.method == "dpo" else "tokens", total, 0)
    for step, metrics in enumerate(steps, 1):
        progress.add(step, metrics)
    for place, loss in enumerate(evaluations, 1):
        progress.add(place * 10, {"eval_loss": loss, "eval_rewards/accuracies": held_out})
    return judge(progress, published)


FALLS = [{"loss": 2.0 - step / 100} for step in range(60)]


@pytest.mark.parametrize(
    ("method", "steps", "evaluations", "kind", "text"),
    [
        ("sft", FALLS, [], "good", "healthy: the loss fell from 1.955 to 1.505"),
        ("sft", FALLS[::-1], [], "bad", "the loss rose"),
        ("sft", FALLS, [1.5, 1.6, 1.7], "bad", "lowest was 1.5000 at step 10"),
        ("dpo", [PAIRS] * 3, [], "good", "healthy: the first loss is ln 2 (0.6931)"),
        ("dpo", [{**PAIRS, "loss": 0.75}], [], "bad", "0.7500 instead of ln 2"),
        ("dpo", [{**PAIRS, "rewards/accuracies": 0.52}] * 60, [], "open", "chance"),
    ],
)
def test_the_verdict_follows_from_the_metrics(tmp_path, method, steps, evaluations, kind, text):
    verdict = judged(stage_of(tmp_path, method), steps, evaluations)
    assert verdict.kind == kind and text in verdict.text


# -- quiet, JSON -------------------------------------------------------------------------------------------------------


def test_json_is_one_object_a_line_and_nothing_else(tmp_path, capsys):
    stage = stage_of(tmp_path)
    console = Console()
    with suppress(UserError), open_screen(console, as_json=True) as screen:
        screen.log(message("two\nlines"))
        console.say("a row, say")
        print("a library's line")
        ran(screen, stage, steps=1)
        screen.on_log(1, {"eval_loss": math.nan})
        screen.on_sample(1, [SAMPLE])
        screen.on_train_end(stage, Outcome(10, {}, (1.0, 5), 60.0))
        raise UserError("no room", "make some")
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert [e["event"] for e in events] == ["say", "begin", "step", "eval", "sample", "end", "error"]
    say, begin, step, evaluation, sample, end, error = events
    assert (say["level"], say["text"]) == ("info", "two\nlines")
    assert begin["total"] == 10 and begin["planned_memory_gib"] == 11.0
    assert step["loss"] == 1.25 and step["step"] == 1 and step["seconds_left"] == 18.0
    assert evaluation["eval_loss"] == "nan" and sample["answer"] == SAMPLE.answer
    assert end["best"] == {"eval_loss": 1.0, "step": 5}
    assert (error["kind"], error["message"], error["hint"]) == ("user", "no room", "make some")
    assert captured.err == "a row, say\na library's line\n"
    for code, kind in ((2, "user"), (130, "interrupted"), (1, "failed")):  # another process of the run
        with pytest.raises(PeerEnded), JsonScreen(Console()):
            raise PeerEnded("process 1 ended: a row", code)
        error = json.loads(capsys.readouterr().out)
        assert (error["kind"], error["message"]) == (kind, "process 1 ended: a row")
