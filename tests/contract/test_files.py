"""Which files a path names, and that nothing in them depends on where it first appears: layout → rows, or message."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from zephyr_lite.config.load import DatasetSpec
from zephyr_lite.data.load import load_rows
from zephyr_lite.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def row(text: str, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}], **columns}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in rows).encode()


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


def make(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def answers(path: Path, **options: Any) -> list[str]:
    rows = load_rows([DatasetSpec(path=str(path), **options)], "sft", seed=0)
    return [value["messages"][-1]["content"] for value in rows.values()]


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # every worker collects the same tests


A, B, AB = lines(row("a")), lines(row("b")), lines(row("a"), row("b"))
PRETTY = "\n".join(json.dumps(row(text), indent=2) for text in "ab")
CELLS = [json.dumps(row(text)["messages"]).replace('"', '""') for text in "ab"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl", AB),
        ("x.ndjson", AB),
        ("x.json", AB),
        ("x.JSONL", AB),
        ("x.jsonl", b"\xef\xbb\xbf" + AB),
        ("x.jsonl", AB.replace(b"\n", b"\r\n\r\n")),
        ("x.jsonl", AB.rstrip()),
        ("x.jsonl.gz", packed(AB)),
        ("x.jsonl.gz", packed(A) + packed(B)),
        ("x.json.gz", packed(json.dumps([row("a"), row("b")]).encode())),
        ("x.jsonl.zst", zstd(AB)),
        ("x.jsonl.bz2", bz2.compress(AB)),
        ("x.jsonl", packed(AB)),
        ("x.jsonl.gz", AB),
        ("x.json", json.dumps([row("a"), row("b")])),
        ("x.json", json.dumps([row("a"), row("b")], indent=1)),
        ("x.json", "\n" + json.dumps([row("a"), row("b")])),
        ("x.json", json.dumps({"version": 1, "data": [row("a"), row("b")]})),
        ("x.json", json.dumps({"data": [row("a"), row("b")]}, indent=1)),
        ("x.json", PRETTY),
        ("x.csv", "prompt,completion\nq,a\n\nq,b\n"),
        ("x.csv", "prompt;completion\nq;a\nq;b\n"),
        ("x.csv", "\ufeffprompt,completion\r\nq,a\r\nq,b\r\n"),
        ("x.csv", "\ufeffprompt\tcompletion\r\nq\ta\r\nq\tb\r\n"),
        ("x.csv", "prompt,completion,,\nq,a,,\nq,b,,\n"),
        ("x.tsv", "prompt\tcompletion\nq\ta\nq\tb\n"),
        ("x.tsv.gz", packed(b"prompt\tcompletion\nq\ta\nq\tb\n")),
        ("x.csv", 'messages\n"' + '"\n"'.join(CELLS) + '"\n'),
    ],
)
def test_a_file(name, data, tmp_path):
    make(tmp_path, {name: data})
    assert answers(tmp_path / name) == ["a", "b"]


def test_one_row_over_several_lines_and_one_of_raw_ultrachat(tmp_path):
    make(tmp_path, {"a.json": json.dumps(row("a"), indent=2), "b.json": json.dumps({"data": ["q", "a"]})})
    assert answers(tmp_path / "a.json") == answers(tmp_path / "b.json") == ["a"]


README = "---\nlicense: mit\nconfigs:\n{}\n---\n# A set\n"
DEFAULT = "- config_name: default\n  data_files:\n  - split: train\n    path: {}\n"


@pytest.mark.parametrize(
    ("files", "options"),
    [
        ({"train.jsonl": AB}, {}),
        ({"train-00000-of-00002.jsonl": A, "train-00001-of-00002.jsonl": B}, {}),
        ({"data/train-00000-of-00002.jsonl": A, "data/train-00001-of-00002.jsonl": B, "README.md": "# A set"}, {}),
        ({"train_0.jsonl": A, "train_1.jsonl": B}, {}),
        ({"train_9.jsonl": A, "train_10.jsonl": B}, {"split": "train"}),
        ({"train_0.jsonl": lines(row("x")), "train_1.jsonl": AB}, {"split": "train_1"}),
        ({"part-0.jsonl": A, "part-1.jsonl": B}, {}),
        ({"0000.jsonl": A, "0001.jsonl": B}, {"split": "train"}),
        ({"train/part-0.jsonl": A, "train/part-1.jsonl": B, "test/part-0.jsonl": A}, {"split": "train"}),
        ({"data/train/a.jsonl": A, "data/train/b.jsonl": B}, {}),
        ({"train/2.jsonl.gz": packed(A), "train/10.jsonl.gz": packed(B)}, {}),
        ({"en/train.jsonl": AB, "de/train.jsonl": A}, {"name": "en"}),
        ({"sub/x.jsonl": AB, "README.md": README.format(DEFAULT.format("sub/x.jsonl"))}, {}),
        ({"sub/x1.jsonl": A, "sub/x2.jsonl": B, "README.md": README.format(DEFAULT.format("sub/*.jsonl"))}, {}),
        ({"x.jsonl": A, "y.jsonl": B, "README.md": README.format(DEFAULT.format("[x.jsonl, y.jsonl]"))}, {}),
        ({"sub/x.jsonl": AB, "README.md": README.format("- config_name: en\n  data_files: sub/x.jsonl")}, {}),
        (
            {
                "x.jsonl": A,
                "y.jsonl": AB,
                "README.md": README.format(
                    "- config_name: de\n  data_files: x.jsonl\n- config_name: en\n  data_files: y.jsonl"
                ),
            },
            {"name": "en"},
        ),
        ({"en/train.jsonl": AB, "README.md": README.format("- {config_name: default, data_dir: en}")}, {}),
        # a clone whose files were fetched in part
        ({"train.jsonl": AB, "README.md": README.format(DEFAULT.format("other/*.parquet"))}, {}),
    ],
)
def test_a_folder(files, options, tmp_path):
    make(tmp_path, files)
    assert answers(tmp_path, **options) == ["a", "b"]


def test_missing_shards_are_named(tmp_path):
    make(tmp_path, {f"train-0000{i}-of-00003.jsonl": lines(row(str(i))) for i in (0, 2)})
    rows = load_rows([DatasetSpec(path=str(tmp_path))], "sft", seed=0)
    assert "[train] (2 of 3 shards): read as" in rows.notes[0]


def test_folders_of_save_to_disk(tmp_path):
    table = datasets.Dataset.from_list([row("a"), row("b")])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    assert answers(tmp_path / "one") == answers(tmp_path / "two", split="train") == ["a", "b"]
    assert answers(tmp_path / "two", split="test") == answers(tmp_path / "one", split="train[:50%]") == ["a"]
    with pytest.raises(UserError, match=r"which split\? There are test, train"):
        answers(tmp_path / "two")


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"sub/x.jsonl": A}, {}, "no data in this folder(.|\n)*dataset.path=.*sub"),
        ({"train.jsonl": A, "train.csv": b"prompt,completion\n"}, {}, "several formats"),
        ({"train.jsonl": A, "train.jsonl.gz": packed(A)}, {}, "several formats"),
        (
            {
                "x.jsonl": A,
                "README.md": README.format(
                    "- {config_name: de, data_files: x.jsonl}\n- {config_name: en, data_files: x.jsonl}"
                ),
            },
            {},
            "which configuration. There are de, en(.|\n)*dataset.name=de",
        ),
        (
            {"x.jsonl": A, "README.md": README.format(DEFAULT.format("/abs/*.jsonl"))},
            {},
            r"README\.md: data_files: Non-rel",
        ),
        ({"x.jsonl": packed(A)[:-12]}, {"file": "x.jsonl"}, r"x\.jsonl: cannot be read"),
        ({"x.csv": b"a,a\n1,2\n"}, {"file": "x.csv"}, "two columns are called 'a'"),
        ({"x.csv": b'prompt,completion\nq,a\nq,"b\n'}, {"file": "x.csv"}, r"x\.csv line 3: not readable as CSV"),
    ],
)
def test_what_cannot_be_read_is_named(files, options, message, tmp_path):
    make(tmp_path, files)
    with pytest.raises(UserError, match=message):
        answers(tmp_path / options.pop("file", ""), **options)


# -- what appears late ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [{"source": "x"}, {"tools": []}, {"meta": {"a": [1]}}, {"system": None}])
def test_a_column_may_first_appear_in_any_row(late, tmp_path):
    few, many = lines(row("a")), lines(*[row("a")] * 2000, row("b", **late), row("c", meta=3))
    make(tmp_path, {"x.jsonl": many, "set/train-00000-of-00002.jsonl": few, "set/train-00001-of-00002.jsonl": many})
    assert answers(tmp_path / "x.jsonl")[-2:] == ["b", "c"]
    assert len(answers(tmp_path / "set")) == 2003


def test_a_needed_column_may_first_appear_in_any_row(tmp_path):
    make(tmp_path, {"x.jsonl": lines(*[{"text": "x"}] * 1500, {"q": "q", "a": "a"})})
    assert answers(tmp_path / "x.jsonl", columns={"prompt": "q", "completion": "a"}) == ["a"]


def test_keys_of_turns_and_arguments_may_differ_in_every_row(tmp_path):
    def called(arguments: Any) -> dict[str, Any]:
        made = row("a")
        made["messages"].insert(
            1, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        )
        return made

    wanted = [{"x": 1}, {"x": "2021-05-03"}, {"y": [None, {"z": 1.0}]}, {}]
    make(tmp_path, {"x.jsonl": lines(*[called(arguments) for arguments in wanted])})
    found = load_rows([DatasetSpec(path=str(tmp_path / "x.jsonl"))], "sft", seed=0)
    assert [v["messages"][1]["tool_calls"][0]["function"]["arguments"] for v in found.values()] == wanted


def test_a_column_or_a_key_may_first_appear_in_the_second_parquet_file(tmp_path):
    late = row("b", source="x")
    late["messages"][1]["weight"] = 1.0
    for number, each in enumerate((row("a"), late)):
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_list([each]).to_parquet(tmp_path / "data" / f"train-0000{number}-of-00002.parquet")
    assert answers(tmp_path) == ["a", "b"]


def test_arrow_fills_objects_with_nulls_that_no_row_has(tmp_path):
    rows = [row("a", tools=None), row("b")]
    rows[0]["messages"][1]["weight"] = 1
    rows[1]["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "string"}}}}]
    rows.append(row("c", tools=[{"type": "function", "function": {"name": "g", "parameters": {"y": {"enum": ["1"]}}}}]))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    values = list(load_rows([DatasetSpec(path=str(tmp_path / "x.parquet"))], "sft", seed=0).values())
    assert [value.get("tools") for value in values] == [None, rows[1]["tools"], rows[2]["tools"]]
