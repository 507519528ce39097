"""What the demo prints at its end: in a terminal and in a pipe, no line wider than 80 columns."""

import io

import pytest

from zephyr_lite.demo import QUESTIONS
from zephyr_lite.demo.run import Standing, print_standings
from zephyr_lite.monitor.console import Console


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_answers_and_scores_fit_and_say_what_dpo_did(width):
    answers = ["Fresh bread, " * 20, "I'm zephyr-lite.\n\nAnd \x1b[2Jyou?", ""]
    shares = {"base": 0.5, "SFT": 8 / 14, "DPO": 13 / 14}
    out = io.StringIO()
    console = Console(out=out)
    console.out.width = width
    print_standings(console, {name: Standing(2.5, share, answers) for name, share in shares.items()})
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= min(80, width)
    assert [line for line in lines if line in QUESTIONS] == list(QUESTIONS)
    assert "  DPO   I'm zephyr-lite. And \\x1b[2Jyou?" in map(str.rstrip, lines)
    text = " ".join(out.getvalue().split())
    assert "prefers the better answer in 93% of the held-out pairs; before DPO it was 57%" in text
