"""``reproduce``: every part is done once, and the row is what the run's files say."""

from __future__ import annotations

import json

import pytest

from tests.demo.test_smoke import forked
from tests.messages import messages_to
from tests.train.test_train import metrics
from zephyr_lite.demo.reproduce import HEADER, RULE, plan_reproduction, run_reproduction
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory, tiny_base, chat_rows, pair_rows):
    """The night's recipe on a tiny base, and then once more."""
    small = ["max_steps=2", "lora_r=4", "batch_size=2", "max_length=64", "samples=0", "load_in_4bit=false"]
    words = [f"model_name_or_path={tiny_base}", *small, "max_prompt_length=32"]
    for stage, rows in (("sft", chat_rows), ("dpo", pair_rows)):
        words += [f"{stage}.dataset.path={rows}", f"{stage}.eval_dataset.path={rows}"]
    out = tmp_path_factory.mktemp("runs") / "night"
    chosen = plan_reproduction("overnight", words, out=out, who="a|b")
    called: list[list[str]] = []
    said: list[str] = []

    def run(command):
        called.append(list(command))
        return forked(command, log=out.parent / "log")

    try:
        with messages_to(said.append):
            first = run_reproduction(chosen, run=run)
    except UserError as error:
        raise AssertionError((out.parent / "log").read_text()) from error
    once = list(called)
    called.clear()
    with messages_to(said.append):
        return chosen, first, once, said, run_reproduction(chosen, run=run), called


def test_every_part_is_done_once(reproduced):
    chosen, first, once, said, second, again = reproduced
    assert [words[:2] for words in once if words[0] == "eval"] == [["eval", "loss"], ["eval", "preference"]]
    assert [words[0] for words in once] == ["sft", "dpo", "merge", "eval", "eval", "report"]
    # the stages' own commands know that they are complete, and with what keys
    assert [words[0] for words in again] == ["sft", "dpo", "report"]
    assert (chosen.run / "merged" / "model.safetensors").is_file()
    assert "loss is done already" in said and second == first
    assert json.loads((chosen.run / "results.json").read_text()) == first


def test_the_row_is_what_the_files_say(reproduced):
    chosen, first, *_ = reproduced
    cells = [cell.strip() for cell in first["row"].replace("\\|", "/").strip("|").split("|")]
    assert len(cells) == HEADER.count("|") - 1 == RULE.count("|") - 1
    found = dict(zip((name.strip() for name in HEADER.strip("|").split("|")), cells, strict=True))
    stage = StageDir(chosen.run / "dpo")
    losses = json.loads((stage.path / "eval" / "loss.json").read_text())["models"]
    named = [f"{losses[name]['loss']['value']:.3f}" for name in ("base", "sft", "dpo")]
    assert found["eval loss base → sft → dpo"] == " → ".join(named)
    comparison = json.loads((stage.path / "eval" / "preference.json").read_text())["comparisons"][0]
    assert (comparison["model"], comparison["against"]) == ("dpo", "sft")
    assert found["preference accuracy"] == f"{comparison['accuracy']['value']:.3f}"
    seconds = metrics(stage.path, "seconds")
    assert float(found["pairs/s"].replace(",", "")) == pytest.approx(4 / sum(seconds), abs=0.01)
    assert first["sft"]["step_hours"] == pytest.approx(sum(metrics(chosen.run / "sft", "seconds")) / 3600, abs=1e-4)
    assert found["who"] == "a/b" and found["base"] != "" and "/" not in found["base"]
    assert found["recipe"].startswith("overnight, but model_name_or_path, ")
    assert float(found["peak GiB"]) == pytest.approx(max(first[s]["peak_gib"] for s in ("sft", "dpo")), abs=0.06)
