"""Data files whose names and columns are a stranger's choice."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zephyr_lite.config import DatasetSpec
from zephyr_lite.data import screening
from zephyr_lite.data.formats import detect
from zephyr_lite.data.opening import open_source
from zephyr_lite.errors import UserError

ROW = {"prompt": "Name a river.", "completion": "The Rhine."}
LINE = json.dumps(ROW) + "\n"


@pytest.mark.parametrize("name", ["my-chats", "[train]", "\x1b[31mx", "*", "{a}", "a b", "train#1?", "%2e", "tr\nain"])
def test_a_folder_with_one_file_of_any_name_is_read(tmp_path, name):
    (tmp_path / f"{name}.jsonl").write_text(LINE * 3)
    assert open_source(DatasetSpec(path=str(tmp_path)))[0].num_rows == 3


@pytest.mark.parametrize(("split", "rows"), [("my-chats", 4), ("my-chats[:2]", 2), ("train[:50%]", 4), ("[x]", 1)])
def test_one_of_several_files_is_named_by_split_and_cut(tmp_path, split, rows):
    for name, count in (("my-chats", 4), ("train", 8), ("[x]", 1)):
        (tmp_path / f"{name}.jsonl").write_text(LINE * count)
    assert open_source(DatasetSpec(path=str(tmp_path), split=split))[0].num_rows == rows


def test_names_in_messages_are_one_line():
    with pytest.raises(UserError) as caught:
        detect(["a\x1b[31m\nerror: b"], "sft", "x.jsonl")
    assert caught.value.message.isprintable() and "\\x1b" in caught.value.message


@pytest.mark.parametrize("rows", ["one", "many", "parquet", "csv"])
def test_columns_without_end_are_refused_before_they_are_read(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(screening, "COLUMNS", 20)
    path = tmp_path / {"parquet": "x.parquet", "csv": "x.csv"}.get(rows, "x.jsonl")
    wide = {**ROW, **{f"c{i}": "1" for i in range(30)}}
    if rows == "parquet":
        pq.write_table(pa.Table.from_pylist([wide]), path)
    elif rows == "csv":
        path.write_text(",".join(wide) + "\n" + ",".join(wide.values()) + "\n")
    elif rows == "one":
        path.write_text(json.dumps(wide) + "\n")
    else:
        path.write_text("".join(json.dumps({**ROW, f"c{i}": 1}) + "\n" for i in range(30)))
    with pytest.raises(
        UserError, match=r"x\.\w+( line \d+)?: (more than 20|32) columns( up to here|; 20 are the most)"
    ):
        open_source(DatasetSpec(path=str(path)))
