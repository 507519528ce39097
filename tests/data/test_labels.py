"""Answers with labels, for KTO: the formats, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.conftest import make_tokenizer
from zephyr_lite.config.load import DatasetSpec, RunConfig
from zephyr_lite.data.batch import Segment, collate_conversations, collate_pairs
from zephyr_lite.data.chat_template import Example, resolve_template
from zephyr_lite.data.dataset import prepare
from zephyr_lite.data.load import load_rows
from zephyr_lite.errors import UserError

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
GOOD = {"prompt": "Hi", "completion": "Hello", "label": True}


def load(folder, *rows, method="kto", **options):
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows([DatasetSpec(path=str(path), **options)], method, seed=0)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Hi", "completion": "Hello"}, "prompt and completion with labels"),
        ({"messages": [HI, HELLO]}, "messages with labels"),
        ({"instruction": "Hi", "output": "Hello"}, "Alpaca with labels"),
    ],
)
def test_formats(tmp_path, row, kind):
    rows = load(tmp_path, {**row, "label": True}, {**row, "label": "false"})
    assert list(rows.values()) == [
        {"prompt": [HI], "chosen": [HELLO], "rejected": []},
        {"prompt": [HI], "chosen": [], "rejected": [HELLO]},
    ]
    assert f"read as {kind}, 2 rows" in rows.notes[0] and "not read" not in str(rows.notes)


def test_the_last_answer_has_the_label_and_pairs_have_both(tmp_path):
    talk = [HI, HELLO, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "No."}
    first, second = load(tmp_path, {"messages": talk, "label": False}, pair).values()
    assert (first["prompt"], first["chosen"], first["rejected"]) == (talk[:3], [], talk[3:])
    assert (second["prompt"], second["chosen"], second["rejected"]) == ([HI], [HELLO], talk[3:])
    mapped = load(
        tmp_path, {"q": "Hi", "a": "Hello", "liked": 0}, columns={"prompt": "q", "completion": "a", "label": "liked"}
    )
    assert list(mapped.values()) == [{"prompt": [HI], "chosen": [], "rejected": [HELLO]}]


def test_sft_leaves_rejected_answers_out_and_refuses_other_words(tmp_path):
    talk = {"messages": [HI, HELLO]}
    rows = load(tmp_path, GOOD, {**GOOD, "label": 0}, {**GOOD, "label": None}, {**talk, "label": 3}, method="sft")
    assert rows.dropped == {"label is false: a rejected answer": [f"{tmp_path}/labels.jsonl row 2"]}
    assert len(rows.dataset) == 3
    bad = {**GOOD, "label": "bad"}
    with pytest.raises(UserError, match=r"none of 1 rows .*label is bad: expected true or false, or 1 or 0"):
        load(tmp_path, bad, method="sft")
    assert len(load(tmp_path, bad, method="sft", columns=["prompt", "completion"]).dataset) == 1


def test_other_rows_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match="found prompt and completion with labels; dpo needs preference rows") as told:
        load(tmp_path, GOOD, method="dpo")
    assert told.value.hint.startswith("Train with zephyr-lite dpo loss_type=kto.")
    assert "for other losses or eval preference" in told.value.hint
    with pytest.raises(
        UserError, match=r"found prompt and completion rows; loss_type kto needs answers with a label"
    ) as told:
        load(tmp_path, {"prompt": "Hi", "completion": "Hello", "kto_tag": True})
    assert "add dataset.columns.label=kto_tag" in told.value.hint


def test_an_answer_with_a_label_is_one_sequence(tmp_path):
    """As a conversation of the same tokens, of which the prompt is not supervised; a second start tells labels apart."""
    template = resolve_template("zephyr", make_tokenizer(tmp_path / "tokenizer"))
    specs, prints = [DatasetSpec(path=str(tmp_path / "labels.jsonl"))], set()
    for label in (True, False):
        load(tmp_path, {**GOOD, "label": label})
        data = prepare(specs, "kto", RunConfig(loss_type="kto"), template)
        (example,) = data.examples[:]
        prints.add(data.fingerprint)
        ids, mask = template.encode([HI, HELLO])
        prompt = template.prompt_ids([HI])
        assert np.array_equal(example.prompt_ids, prompt) and data.lengths.tolist() == [len(ids)]
        assert [len(example.chosen_ids), len(example.rejected_ids)][:: 1 if label else -1] == [
            len(ids) - len(prompt),
            0,
        ]
        batch, alone = collate_pairs([example]), collate_conversations([Example(ids, mask, "", 0)])
        assert batch.segments == (Segment(0, len(ids)),)
        for name in ("tokens", "positions", "target_rows", "target_ids"):
            assert getattr(batch, name).tolist() == getattr(alone, name).tolist(), name
        size = int(mask.sum())
        assert batch.group_sizes.tolist() == ([size, 0] if label else [0, size])
    assert len(prints) == 2
