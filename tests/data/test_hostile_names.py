"""Data files whose names and columns are a stranger's choice."""

from __future__ import annotations

import json

import pytest

from zephyr_lite.config.load import DatasetSpec
from zephyr_lite.data.formats import detect
from zephyr_lite.data.load import open_source
from zephyr_lite.errors import UserError

ROW = {"prompt": "Name a river.", "completion": "The Rhine."}
LINE = json.dumps(ROW) + "\n"


@pytest.mark.parametrize("name", ["my-chats", "[train]", "\x1b[31mx", "*", "{a}", "a b", "train#1?", "%2e", "tr\nain"])
def test_a_folder_with_one_file_of_any_name_is_read(tmp_path, name):
    (tmp_path / f"{name}.jsonl").write_text(LINE * 3)
    assert len(open_source(DatasetSpec(path=str(tmp_path)))) == 3


@pytest.mark.parametrize(("split", "rows"), [("my-chats", 4), ("my-chats[:2]", 2), ("train[:50%]", 4), ("[x]", 1)])
def test_one_of_several_files_is_named_by_split_and_cut(tmp_path, split, rows):
    for name, count in (("my-chats", 4), ("train", 8), ("[x]", 1)):
        (tmp_path / f"{name}.jsonl").write_text(LINE * count)
    assert len(open_source(DatasetSpec(path=str(tmp_path), split=split))) == rows


def test_names_in_messages_are_one_line():
    with pytest.raises(UserError) as caught:
        detect(["a\x1b[31m\nerror: b"], "sft", "x.jsonl")
    assert caught.value.message.isprintable() and "\\x1b" in caught.value.message
