"""Files, folders and formats to normalised rows; every bad input names its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zephyr_lite.config.load import DatasetSpec
from zephyr_lite.data.load import load_rows
from zephyr_lite.data.sources import open_source
from zephyr_lite.errors import UserError


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def write(path: Path, rows: list[object]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def load(path: object, method: str = "sft", **options):
    system = options.pop("system", None)
    return load_rows([DatasetSpec(path=str(path), **options)], method, seed=1, system=system)


def messages(rows) -> list[list[dict[str, str]]]:
    return [row["messages"] for row in rows.values()]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Hi", "prompt_id": "x", "messages": turns("Hi", "Hello")}, "messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "ShareGPT"),
        ({"instruction": "Hi", "output": "Hello"}, "Alpaca"),
        ({"prompt": turns("Hi"), "completion": turns("", "Hello")[1:]}, "prompt and completion"),
        ({"id": "0", "data": ["Hi", "Hello"]}, "raw UltraChat"),
    ],
)
def test_conversation_formats(tmp_path, row, kind):
    rows = load(write(tmp_path / "a.jsonl", [row, row]))
    assert messages(rows) == [turns("Hi", "Hello")] * 2
    assert rows.dataset["where"][1] == f"{tmp_path}/a.jsonl row 2" and f"read as {kind}, 2 rows" in rows.notes[0]


def test_plain_text(tmp_path):
    rows = load(write(tmp_path / "a.jsonl", [{"text": "One."}, {"text": " "}, {"text": "Two."}]), system="Be brief.")
    assert messages(rows) == [[{"role": "text", "content": "One."}], [{"role": "text", "content": "Two."}]]
    assert "read as plain text (no chat template, loss over all tokens)" in rows.notes[0]
    assert rows.dropped == {"text is empty": [f"{tmp_path / 'a.jsonl'} row 2"]}
    named = write(tmp_path / "b.jsonl", [{"story": "One.", "n": 1}])
    assert messages(load(named, columns={"text": "story"}))[0][0]["content"] == "One."
    # old YAML files name a column of conversations as the text's
    talks = write(tmp_path / "c.jsonl", [{"talk": turns("Hi", "Hello")}])
    assert messages(load(talks, columns={"text": "talk"})) == [turns("Hi", "Hello")]
    with pytest.raises(UserError, match=r"found plain text .*; dpo needs preference rows"):
        load(named, "dpo", columns={"text": "story"})


SFT, DPO = {"messages": turns("Hi", "Hello")}, {"chosen": turns("Hi", "a"), "rejected": turns("Hi", "b")}


@pytest.mark.parametrize(
    ("method", "row", "reason"),
    [
        ("sft", {"messages": turns("Hi")}, "no assistant turn"),
        ("sft", {"messages": turns("Hi", " ")}, "a turn without content"),
        ("sft", {"messages": [{"role": "wizard", "content": "Hi"}]}, "unknown role 'wizard'"),
        ("sft", {"messages": [*turns("Hi", "a"), *turns("b", "c", system="s")]}, "a system turn that is not the first"),
        ("dpo", {**DPO, "rejected": DPO["chosen"]}, "chosen equals rejected"),
        ("dpo", {**DPO, "rejected": turns("Ho", "b")}, "chosen and rejected answer different prompts"),
    ],
)
def test_faulty_rows_are_dropped_counted_and_named(tmp_path, method, row, reason):
    good = SFT if method == "sft" else DPO
    rows = load(write(tmp_path / "a.jsonl", [good, row, good]), method)
    assert len(rows.dataset) == 2 and rows.read == 3
    assert rows.dropped == {reason: [f"{tmp_path}/a.jsonl row 2"]}
    assert rows.dataset["where"][1].endswith("row 3")


def test_a_folder_in_the_hubs_layout(tmp_path):
    for split, word in (("train_sft", "a"), ("test_sft", "b")):
        write(tmp_path / f"{split}.jsonl", [{"messages": turns("Hi", word)}])
    (tmp_path / "README.md").write_text("---\nconfigs: yes\n---\n# A set\n")
    for leftover in ("report.json", "state.json"):  # beside the splits that `data chat` makes; of a save_to_disk
        (tmp_path / leftover).write_text("{}")
    rows = load(tmp_path, split="test_sft")
    assert messages(rows) == [turns("Hi", "b")] and rows.dataset["where"][0].endswith("test_sft.jsonl row 1")


def numbered(tmp_path, count: int, name: str = "n", tag: str = "") -> str:
    return write(tmp_path / f"{name}.jsonl", [{"messages": turns("Hi", f"{tag}{i}")} for i in range(count)])


def answers(rows) -> list[str]:
    return [m[-1]["content"] for m in messages(rows)]


def test_limit_draws_rows_by_the_seed(tmp_path):
    path = numbered(tmp_path, 50)
    first = load(path, limit=10)
    assert len(set(answers(first))) == 10 and answers(first) == answers(load(path, limit=10))
    assert answers(first) != answers(load_rows([DatasetSpec(path=path, limit=10)], "sft", seed=2))
    assert [w.rsplit(" ", 1)[1] for w in first.dataset["where"]] == [str(int(a) + 1) for a in answers(first)]
    assert set(answers(first)) <= set(answers(load(path, limit=20)))
    assert len(answers(load(path, limit=500))) == 50


def test_weights_take_shares_and_repeat(tmp_path):
    path = numbered(tmp_path, 40)
    half = answers(load(path, weight=0.5))
    assert len(half) == len(set(half)) == 20
    more = answers(load(path, weight=2.25))
    assert len(more) == 90 and sorted(more.count(str(i)) for i in range(40)) == [2] * 30 + [3] * 10


def test_sources_are_spread_through_each_other(tmp_path):
    paths = [(numbered(tmp_path, count, name, name), weight) for name, count, weight in (("a", 20, 1), ("b", 40, 0.5))]
    specs = [DatasetSpec(path=path, weight=weight) for path, weight in paths]
    rows = load_rows(specs, "sft", seed=3)
    said = answers(rows)
    assert len(said) == 40 and said == answers(load_rows(specs, "sft", seed=3)) and "weight 0.5" in rows.notes[1]
    assert all(4 <= sum(word[0] == "a" for word in said[at : at + 10]) <= 6 for at in range(0, 40, 10))


# -- names that a stranger chose -------------------------------------------------------------------------------------------

LINE = json.dumps({"prompt": "Name a river.", "completion": "The Rhine."}) + "\n"


@pytest.mark.parametrize("name", ["[train]", "*", "%2e"])
def test_a_folder_with_one_file_of_any_name_is_read(tmp_path, name):
    (tmp_path / f"{name}.jsonl").write_text(LINE * 3)
    assert len(open_source(DatasetSpec(path=str(tmp_path)))) == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [("\n[{0}\n{0}]", r"a\.json line 3: broken JSON"), ("[" * 100_000, r"a\.json: broken JSON")],
)
def test_broken_json_arrays(tmp_path, text, says):
    (tmp_path / "a.json").write_text(text.replace("{0}", LINE.strip()))
    with pytest.raises(UserError, match=says):
        open_source(DatasetSpec(path=str(tmp_path / "a.json")))


def test_columns_are_renamed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "Hi", "a": "Hello", "prompt": "x"}])
    assert messages(load(path, columns={"prompt": "q", "completion": "a"})) == [turns("Hi", "Hello")]
    with pytest.raises(UserError, match=r"no column 'r'(.|\n)*There are q, a, prompt"):
        load(path, columns={"prompt": "r"})
    with pytest.raises(UserError, match="'colour' is not a column here"):
        load(path, columns={"colour": "q"})


def test_system_turns_from_the_rows_a_column_and_the_configuration(tmp_path):
    column = {"messages": turns("Hi", "Hello"), "system": "column"}
    path = write(tmp_path / "a.jsonl", [column, {**column, "system": None}])
    assert [m[0]["content"] for m in messages(load(path, system="default"))] == ["column", "default"]


def test_one_response_may_be_the_others_beginning(tmp_path):
    row = {"chosen": turns("One", "1"), "rejected": turns("One", "1", "Two", "2")}
    (found,) = list(load(write(tmp_path / "a.jsonl", [row]), "dpo").values())
    assert found["prompt"] == turns("One") and found["rejected"] == turns("One", "1", "Two", "2")[1:]


@pytest.mark.parametrize(("split", "rows"), [("my-chats", 4), ("my-chats[:2]", 2), ("train[:50%]", 4), ("[x]", 1)])
def test_one_of_several_files_is_named_by_split_and_cut(tmp_path, split, rows):
    for name, count in (("my-chats", 4), ("train", 8), ("[x]", 1)):
        (tmp_path / f"{name}.jsonl").write_text(LINE * count)
    assert len(open_source(DatasetSpec(path=str(tmp_path), split=split))) == rows
