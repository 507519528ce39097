"""``zephyr-lite data stats``: its figures are those of the run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import CONVERSATIONS
from zephyr_lite.cli.options import console
from zephyr_lite.cli.row_stats import print_stats
from zephyr_lite.monitor.rows import TrainedRows, open_rows
from zephyr_lite.train.steps import step_schedule


def opened(method, base: Path, *words: object, held_out: bool = False) -> TrainedRows:
    return open_rows(method, None, [f"model_name_or_path={base}", *map(str, words)], held_out=held_out)


@pytest.fixture
def plain(capsys, monkeypatch):
    """What is printed of rows, without the frames of tables."""
    monkeypatch.setattr(console.out, "width", 300)

    def printed(rows: TrainedRows, **options) -> str:
        print_stats(rows, **options)
        return re.sub(r"[│┃]", " ", capsys.readouterr().out)

    return printed


@pytest.fixture
def long_rows(tmp_path) -> Path:
    """Conversations of 1 to 12 exchanges; the third begins with a question that is longer than any budget here."""
    rows = []
    for count in range(1, 13):
        turns = []
        for place in range(count):
            question, answer = CONVERSATIONS[place % len(CONVERSATIONS)]
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns})
    rows[2]["messages"][0]["content"] *= 30
    rows[4]["messages"] = rows[4]["messages"][:1]
    rows[5]["messages"].append({"role": "user", "content": "And?"})
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_figures_are_the_runs(tiny_base, long_rows, plain):
    rows = opened("sft", tiny_base, f"dataset={long_rows}", "max_length=128", "batch_size=2", "num_train_epochs=3")
    report = rows.data.report
    text = plain(rows)
    assert f"{report.tokens:,} tokens, {report.supervised:,} supervised" in text
    assert f"{report.rows:,} packed rows, {report.fill:.1%} full" in text
    assert f"in all: {step_schedule(rows.config, len(rows.data.rows))[1]} steps (num_train_epochs 3)" in text
    assert f"left out, no assistant turn: 1 ({long_rows} row 5)" in text
    assert f"left out, no supervised token within max_length 128: 1 ({long_rows} row 3)" in text
    assert f"ended with the user; the last turn was cut: 1 ({long_rows} row 6)" in text
