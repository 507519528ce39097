"""``zephyr-lite data stats``: its figures are those of the run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import CONVERSATIONS
from zephyr_lite.cli import app as cli
from zephyr_lite.cli.options import console
from zephyr_lite.cli.row_stats import lengths_of, print_stats, uncut_rows
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


def test_lengths_are_those_before_cutting_and_every_cut_row_is_named(tiny_base, long_rows, plain):
    whole = opened("sft", tiny_base, f"dataset={long_rows}", "max_length=4096")
    rows = opened("sft", tiny_base, f"dataset={long_rows}", "max_length=128")
    (lengths,) = lengths_of(uncut_rows(rows)).values()
    assert sorted(lengths) == sorted(whole.data.lengths) and lengths.max() > 128
    masks = {e.where: np.asarray(e.mask) for e in whole.data.examples}
    expected = {w: int(m[128:].sum()) for w, m in masks.items() if len(m) > 128 and m[:128].any()}
    assert len(expected) > 3 and sum(expected.values()) == rows.data.report.supervised_lost
    for places in (0, 2):
        (line,) = [line for line in plain(rows, places=places).splitlines() if line.startswith("cut to max_length 128")]
        named = re.findall(rf"{re.escape(str(long_rows))} row \d+", line)
        assert named == list(expected)[: places or None] and line.endswith(", …)") == bool(places)


# -- the command ---------------------------------------------------------------------------------------------------------


def test_the_command(capsys, tmp_path, monkeypatch, tiny_base, long_rows, chat_rows):
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        code = cli.run(["data", "stats", *map(str, words), f"model_name_or_path={tiny_base}"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, out, err = run("sft", f"dataset={long_rows}", f"eval_dataset={chat_rows}", "max_length=128", "--places", "1")
    assert code == 0, err
    assert out.index("training data, sft") < out.index("in all: ") < out.index("held-out data, sft")
    assert not (tmp_path / "runs").exists()
    code, _, err = run("sft", "dataset=nowhere.jsonl")
    assert code == 2 and "nowhere.jsonl" in err
    code, _, err = run("sft", f"dataset={chat_rows}", "max_length=4")
    assert code == 2 and "no row is left to train on" in err and "Raise max_length" in err
    code, _, err = run(f"dataset={chat_rows}")
    assert code == 2 and "which stage's rows?" in err


def test_sources_are_counted_apart(tiny_base, long_rows, chat_rows, tmp_path, plain):
    config = tmp_path / "mix.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_base}\nmax_length: 128\n"
        f"dataset:\n- path: {long_rows}\n- {{path: {chat_rows}, weight: 2}}\n"
    )
    rows = open_rows("sft", str(config), [])
    text, report = plain(rows), rows.data.report
    counts = []
    for path, start in ((long_rows, f"10 +{report.cut}"), (chat_rows, f"{2 * len(CONVERSATIONS)} +0")):
        tokens, supervised = re.search(rf"{re.escape(str(path))} +{start} +([\d,]+) +([\d,]+) ", text).groups()
        counts.append((int(tokens.replace(",", "")), int(supervised.replace(",", ""))))
    assert [sum(column) for column in zip(*counts)] == [report.tokens, report.supervised]


def test_pairs(tiny_base, pair_rows, plain):
    rows = opened("dpo", tiny_base, f"dataset={pair_rows}", "max_length=60", "max_prompt_length=30", "batch_size=3")
    whole, prompt, chosen, rejected = lengths_of(uncut_rows(rows)).values()
    examples = list(opened("dpo", tiny_base, f"dataset={pair_rows}").data.examples)
    assert prompt.tolist() == [len(e.prompt_ids) for e in examples]
    assert chosen.tolist() == [len(e.chosen_ids) for e in examples]
    assert rejected.tolist() == [len(e.rejected_ids) for e in examples]
    bounded = [len(e.prompt_ids) + max(len(e.chosen_ids), len(e.rejected_ids)) for e in examples]
    assert whole.tolist() == bounded and max(bounded) > 60
    text = plain(rows)
    assert f"cut to max_length 60: {sum(b > 60 for b in bounded)} (" in text and "on the prompt's left" in text
    assert f"the longer one in {(chosen > rejected).mean():.1%}" in text
    assert "3 steps of 3 pairs" in text and "packed" not in text
