"""What the demo prints at its end: in a terminal and in a pipe, no line wider than 80 columns."""

import io

import pytest

from zephyr_lite.demo import QUESTIONS
from zephyr_lite.demo.run import DemoResult, Standing, print_result
from zephyr_lite.monitor.console import Console


@pytest.mark.parametrize("width", [60, 120])
def test_the_answers_and_scores_fit_and_say_what_dpo_did(width):
    answers = ["Fresh bread, " * 20, "I'm zephyr-lite.\n\nAnd \x1b[2Jyou?", ""]
    standings = {name: Standing(loss, answers) for name, loss in (("base", 4.5), ("SFT", 2.475), ("DPO", 2.483))}
    out = io.StringIO()
    console = Console(out=out)
    console.out.width = width
    print_result(console, DemoResult(standings, 13 / 14))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= min(80, width)
    assert [line for line in lines if line in QUESTIONS] == list(QUESTIONS)
    assert "  DPO   I'm zephyr-lite. And \\x1b[2Jyou?" in map(str.rstrip, lines)
    text = " ".join(out.getvalue().split())
    assert "4.500 (base), 2.475 (SFT), 2.483 (DPO)" in text and "in 93% of the held-out pairs" in text
