"""What is shown while a stage is trained: the panel in a terminal, lines, JSON; and what the verdict says."""

import io
import json
import logging
import math
import re
import signal
from contextlib import suppress
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from zephyr_lite.config.load import DatasetSpec, RunConfig, load_config
from zephyr_lite.errors import UserError
from zephyr_lite.io.interrupts import StopRequest
from zephyr_lite.io.logging import RESULT, messages_to
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.monitor import screens
from zephyr_lite.monitor.console import Console
from zephyr_lite.monitor.health import DPO, Progress, judge, published_of
from zephyr_lite.monitor.panel import LiveScreen, render
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


def message(text, **extra):
    return logging.makeLogRecord({"msg": text, "levelno": logging.INFO, "levelname": "INFO", **extra})


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
        screen.metrics(step, total, metrics)


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


def test_a_pipe_gets_lines(tmp_path):
    out = io.StringIO()
    with open_screen(Console(out=out)) as screen:
        ran(screen, stage_of(tmp_path), steps=2)
        screen.metrics(2, 10, {"eval_loss": 1.0})
    assert out.getvalue().splitlines() == [
        "step  1/10  loss 1.2500  1,500 tokens/s  18 s left",
        "step  2/10  loss 1.2500  1,500 tokens/s  16 s left",
        "step  2/10  held-out  loss 1.0000  16 s left",
    ]


# -- the panel ---------------------------------------------------------------------------------------------------------


def test_the_panel_shows_the_metrics_and_restores_the_terminal(terminal, tmp_path):
    console = Console(out=terminal, err=terminal)
    with suppress(UserError), LiveScreen(console) as screen:
        screen.log(message("loading the base"))
        ran(screen, stage_of(tmp_path))
        screen.progress.begun -= 6  # three steps in six seconds
        screen.on_sample(0, [SAMPLE])
        screen.on_evaluate(3, {"eval_loss": 1.1})
        screen.metrics(3, 10, {"eval_loss": 1.1})
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


@pytest.mark.parametrize("width", [20, 200])
def test_the_panel_fits_every_width(tmp_path, width):
    progress = Progress(stage_of(tmp_path, "dpo"), "pairs", 3000, 0)
    progress.sample = Sample(0, "語" * 500 + " x " * 90, "文 " * 90 + "word" * 99, "")
    for step in range(1, 300):
        progress.add(step, {**PAIRS, "loss": LN2 - step / 1000, "learning_rate": 1e-6})
    progress.add(299, {"eval_loss": 0.5, "eval_rewards/accuracies": 0.7, "eval_rewards/margins": 1.0})
    out = io.StringIO()
    console = Console(out=out).out
    console.width = width
    console.print(render(progress, judge(progress, DPO), width))
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width and 10 <= len(lines) <= 20


def test_without_utf_8_the_signs_are_ascii():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(out=out).say("✓ ▁█ done")
    out.flush()
    assert out.buffer.getvalue() == b"* _# done\n"


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
        ("sft", FALLS[:5], [], "open", "too early"),
        ("sft", FALLS, [], "good", "healthy: the loss fell from 1.955 to 1.505"),
        ("sft", FALLS[::-1], [], "bad", "the loss rose"),
        ("sft", [*FALLS, {"loss": math.nan}], [], "bad", "the last loss is not a finite number"),
        ("sft", FALLS, [1.5, 1.6, 1.7], "bad", "lowest was 1.5000 at step 10"),
        ("sft", FALLS, [1.5, math.nan], "bad", "held-out loss is not a finite"),
        ("sft", FALLS, [1.5, "nan"], "bad", "held-out loss is not a finite"),  # the word in metrics.jsonl
        ("dpo", [PAIRS] * 3, [], "good", "healthy: the first loss is ln 2 (0.6931)"),
        ("dpo", [{**PAIRS, "loss": 0.75}], [], "bad", "0.7500 instead of ln 2"),
        ("dpo", [PAIRS] * 60, [], "good", "preference accuracy 90%"),
        # before the first update all margins are 0, and no pair counts as won
        ("dpo", [{**PAIRS, "rewards/accuracies": 0.0, "rewards/margins": 0.0}] * 45 + [PAIRS] * 15, [], "good", "90%"),
        ("dpo", [{**PAIRS, "rewards/accuracies": 0.52}] * 60, [], "open", "chance"),
        ("dpo", [{**PAIRS, "rewards/accuracies": 0.3}] * 60, [], "bad", "no preference is learned"),
    ],
)
def test_the_verdict_follows_from_the_metrics(tmp_path, method, steps, evaluations, kind, text):
    verdict = judged(stage_of(tmp_path, method), steps, evaluations)
    assert verdict.kind == kind and text in verdict.text


@pytest.mark.parametrize(
    ("changes", "steps", "kind", "text"),
    [
        ({"loss_type": "ipo", "beta": 0.1}, [{**PAIRS, "loss": 25.0}], "good", "the first loss is 25 (25.0000)"),
        ({"loss_type": "ipo", "beta": 0.1}, [PAIRS], "bad", "0.6931 instead of 25"),
        ({"loss_type": ["sigmoid", "sft"]}, [{**PAIRS, "loss": 3.0}], "open", "too early"),
        # without a reference the accuracy does not begin at a half
        ({"loss_type": "simpo"}, [PAIRS] * 60, "open", "90%, margin 0.300 (90% and 0.300 at the start)"),
        (
            {"loss_type": "simpo"},
            [{**PAIRS, "rewards/accuracies": 0.3, "rewards/margins": -0.2}] * 40
            + [{**PAIRS, "rewards/accuracies": 0.45, "rewards/margins": -0.1}] * 20,
            "good",
            "45%, margin -0.100 (30% and -0.200 at the start)",
        ),
    ],
)
def test_the_verdict_knows_the_loss(tmp_path, changes, steps, kind, text):
    verdict = judged(stage_of(tmp_path, "dpo", **changes), steps)
    assert verdict.kind == kind and text in verdict.text


@pytest.mark.parametrize(("held_out", "kind"), [(0.75, "good"), (0.25, "open")])
def test_the_verdict_on_pairs_agrees_with_the_held_out_ones(tmp_path, held_out, kind):
    verdict = judged(stage_of(tmp_path, "dpo"), [PAIRS] * 60, [0.69], held_out=held_out)
    assert verdict.kind == kind and verdict.text.endswith(
        f"accuracy 90%, margin 0.300; held-out accuracy {held_out:.0%}"
    )


def test_only_the_published_recipe_is_compared(tmp_path):
    run = stage_of(tmp_path, "dpo")
    run.config = load_config("dpo", "zephyr-7b/dpo").config
    assert published_of(run) is DPO
    few = DatasetSpec(path="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", limit=10_000)
    for change in ({"beta": 0.1}, {"model_name_or_path": "other/base"}, {"dataset": [few]}, {"num_train_epochs": 3.0}):
        other = SimpleNamespace(**{**vars(run), "config": run.config.model_copy(update=change)})
        assert published_of(other) is None
    sft = stage_of(tmp_path)
    sft.config = load_config("sft", "zephyr-7b/sft", ["loss_on=all"]).config
    assert published_of(sft) is None  # a thousand of the held-out rows show no difference of a hundredth
    sft.config.eval_dataset[0].limit = None
    assert published_of(sft).loss == (0.944, 0.952)
    steps = [{**PAIRS, "loss": LN2 if step == 0 else 0.685} for step in range(110)]
    at_100 = "the loss around step 100 was 0.685; published runs had 0.681 to 0.688"
    assert judged(run, steps, published=DPO).text == at_100
    ended = judged(run, steps, [0.48], total=110, published=DPO)
    assert ended.kind == "good" and "0.475 to 0.490" in ended.text
    assert judged(run, steps, [0.52], total=110, published=DPO).kind == "bad"


def test_a_resumed_run_shows_what_was_logged_before(tmp_path):
    stage = stage_of(tmp_path)
    stage.dir.path.mkdir()
    records = [{"step": s, **STEP, "loss": 2.0 - s / 10} for s in range(1, 8)] + [{"step": 4, "eval_loss": 1.5}]
    stage.dir.metrics.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 8, "lo')
    progress = Progress(stage, "tokens", 10, 6)
    assert [m["loss"] for m in progress.steps] == pytest.approx([1.9, 1.8, 1.7, 1.6, 1.5, 1.4])
    assert len(progress.evaluations) == 1 and progress.seconds_left() is None
    progress.add(7, STEP)
    progress.begun -= 2
    assert progress.seconds_left() == pytest.approx(6.0, abs=0.1)


# -- quiet, JSON -------------------------------------------------------------------------------------------------------


def test_quiet_prints_warnings_and_the_result(tmp_path):
    out = io.StringIO()
    stage = stage_of(tmp_path)
    with screens.QuietScreen(Console(out=out)) as screen:
        with messages_to(screen.log):
            logger = logging.getLogger("zephyr_lite.data")
            logger.info("loading the base")
            logger.warning("left out, no assistant turn: 3 rows")
        ran(screen, stage)
        screen.log(message("step 3: the numbers look odd"))
        general = {"before": 2.911, "after": 2.953}
        screen.on_train_end(stage, Outcome(10, {}, (1.0, 5), 60.0, 2, [{"eval_loss": 1.25}], general_loss=general))
        screen.log(message("Next: zephyr-lite dpo"))
    assert out.getvalue().splitlines() == [
        "left out, no assistant turn: 3 rows",
        "step 3: the numbers look odd",
        f"{stage.dir.adapter}: 10 steps, 60 s; held-out loss 1.2500; best held-out loss 1.0000 at step 5; "
        "general text 2.9110 before, 2.9530 after; 2 steps left out",
        "Next: zephyr-lite dpo",
    ]
    out = io.StringIO()
    with screens.QuietScreen(Console(out=out)) as screen:
        screen.log(message("loading the base"))
        screen.log(message("sft is complete", **RESULT))
    assert out.getvalue() == "sft is complete\n"


def test_json_is_one_object_a_line_and_nothing_else(tmp_path, capsys):
    stage = stage_of(tmp_path)
    console = Console()
    with suppress(UserError), open_screen(console, as_json=True) as screen:
        screen.log(message("two\nlines"))
        console.say("a row, say")
        print("a library's line")
        ran(screen, stage, steps=1)
        screen.metrics(1, 10, {"eval_loss": math.nan})
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


def test_a_notebook_is_not_flooded(tmp_path):
    out = io.StringIO()
    screen = screens.Screen(Console(out=out), most=screens.NOTEBOOK_LINES)
    for step in range(1, 1001):
        screen.metrics(step, 1000, STEP)
    screen.metrics(1000, 1000, {"eval_loss": 1.0})
    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + screens.NOTEBOOK_LINES + 1
    assert lines[0].startswith("step    1/1000") and lines[-1].startswith("step 1000/1000  held-out")


def test_an_interrupt_is_shown(terminal, tmp_path):
    with LiveScreen(Console(out=terminal)) as screen, StopRequest(None):
        ran(screen, stage_of(tmp_path))
        signal.raise_signal(signal.SIGINT)
        screen._live.refresh()
        assert "stopping after this step" in terminal.text
