"""Rows to packed examples: what is cut, dropped, counted, and that it is the same every time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import make_tokenizer
from tests.data.test_sources import turns, write
from zephyr_lite.config.load import DatasetSpec, RunConfig
from zephyr_lite.data import workers
from zephyr_lite.data.chat_template import Example, resolve_template
from zephyr_lite.data.dataset import prepare


@pytest.fixture
def template(tmp_path):
    return resolve_template("zephyr", make_tokenizer(tmp_path / "tokenizer"))


def specs_of(path: Path, rows: list[object]) -> list[DatasetSpec]:
    return [DatasetSpec(path=write(path, rows))]


def test_conversations(chat_rows, template):
    config = RunConfig(max_length=160)
    data = prepare([DatasetSpec(path=str(chat_rows))], "sft", config, template)
    assert len(data.examples) == 8 and sorted(i for row in data.rows for i in row) == list(range(8))
    assert len(data.rows) < 8
    rows = [json.loads(line)["messages"] for line in chat_rows.read_text().splitlines()]
    for index, example in enumerate(data.examples):
        assert isinstance(example, Example) and example.index == index and example.where.endswith(f"row {index + 1}")
        ids, mask = template.encode(rows[index])
        assert example.ids.tolist() == ids.tolist()[:160] and example.mask.tolist() == mask.tolist()[:160]
        assert example.ids.dtype == np.int32 and example.mask.dtype == bool and example.mask.any()
        assert data.lengths[index] == len(example.ids)
    assert all(data.lengths[row].sum() <= 160 for row in data.rows)
    assert data.examples[-1].index == 7 and [e.index for e in data.examples[2:4]] == [2, 3]
    with pytest.raises(IndexError):
        data.examples[8]
    report = data.report
    assert report.read == report.kept == 8 and report.tokens == data.lengths.sum()
    assert report.supervised == sum(int(e.mask.sum()) for e in data.examples)
    assert report.fill == report.tokens / (160 * len(data.rows))
    assert json.loads(json.dumps(report.as_dict()))["rows"] == len(data.rows)


def test_long_pairs(template, tmp_path):
    long, answer = "why " * 80, "because " * 80
    pairs = [
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"prompt": long, "chosen": "a", "rejected": "b"},
        {"prompt": "Hi", "chosen": answer, "rejected": "b"},
        {"prompt": "Hi", "chosen": answer + "a", "rejected": answer + "b"},
    ]
    specs = specs_of(tmp_path / "a.jsonl", pairs)
    data = prepare(specs, "dpo", RunConfig(max_length=100, max_prompt_length=60), template)
    assert [e.where[-1] for e in data.examples] == ["1", "2", "3"]
    assert data.report.dropped == {"chosen equals rejected within max_length 100": [f"{tmp_path}/a.jsonl row 4"]}
    assert len(data.examples[1].prompt_ids) == 60 and data.report.prompts_cut == 1 and data.report.cut == 2
    assert data.examples[1].prompt_ids.tolist() == template.prompt_ids(turns(long))[-60:].tolist()
    third = data.examples[2]
    assert len(third.prompt_ids) + len(third.chosen_ids) == 100 and len(third.rejected_ids) < 10
    assert data.report.supervised_lost > 0
    data = prepare(specs, "dpo", RunConfig(max_length=60, max_prompt_length=60), template)
    (reason,) = [reason for reason in data.report.dropped if "prompt" in reason]
    assert "longer than the budget" in reason and data.report.dropped[reason] == [f"{tmp_path}/a.jsonl row 2"]


def test_the_fingerprint_is_that_of_the_ids_masks_and_template(chat_rows, template, tmp_path):
    specs = [DatasetSpec(path=str(chat_rows))]
    config = RunConfig(max_length=512)
    data = prepare(specs, "sft", config, template)
    copy = tmp_path / "copy.jsonl"
    copy.write_text(chat_rows.read_text())
    again = resolve_template("zephyr", make_tokenizer(tmp_path / "again"))
    assert prepare([DatasetSpec(path=str(copy))], "sft", config, again).fingerprint == data.fingerprint
    others = [
        prepare(specs, "sft", RunConfig(max_length=512, loss_on="last"), template),
        prepare(specs, "sft", RunConfig(max_length=512, system="Hi."), template),
        prepare(specs, "sft", RunConfig(max_length=70), template),
        prepare([DatasetSpec(path=str(chat_rows), limit=7)], "sft", config, template),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_a_second_start_reads_the_cache(chat_rows, template, monkeypatch):
    specs = [DatasetSpec(path=str(chat_rows))]
    first = prepare(specs, "sft", RunConfig(), template)

    def never(*args, **options):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(template, "encode", never)
    assert prepare(specs, "sft", RunConfig(), template).fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match="tokenized again"):
        prepare(specs, "sft", RunConfig(loss_on="all"), template)


def test_other_rows_under_the_old_name_size_and_time_are_read(tmp_path, template):
    """As ``cp -p``, ``rsync -t`` and archives leave them: the time alone tells nothing."""

    def answer(text: str) -> str:
        specs = specs_of(tmp_path / "rows.jsonl", [{"messages": turns("Who?", text)}])
        os.utime(specs[0].path, (1e9, 1e9))
        data = prepare(specs, "sft", RunConfig(), template)
        return template.tokenizer.decode(data.examples[0].ids[data.examples[0].mask])

    assert [answer("cat"), answer("dog")] == ["cat</s>", "dog</s>"]


def test_several_processes_give_the_same_examples(chat_rows, template, monkeypatch):
    specs, config = [DatasetSpec(path=str(chat_rows), weight=4)], RunConfig(max_length=512)
    one = prepare(specs, "sft", config, template)
    monkeypatch.setattr(workers, "PARALLEL_ROWS", 1)
    monkeypatch.setattr(workers, "cache_key", lambda table, key: f"several-{'template' in key}")
    two = prepare(specs, "sft", config, template)
    assert two.fingerprint == one.fingerprint and two.rows == one.rows and two.report == one.report
