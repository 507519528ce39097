"""Files, folders and formats to normalised rows; every bad input names its place."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from zephyr_lite.config.load import DatasetSpec
from zephyr_lite.data import workers
from zephyr_lite.data.load import load_rows
from zephyr_lite.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


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
        ({"messages": turns("Hi", "Hello")}, "messages"),
        ({"prompt": "Hi", "prompt_id": "x", "messages": turns("Hi", "Hello")}, "messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "ShareGPT"),
        ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}, "ShareGPT"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "Alpaca"),
        ({"instruction": "Hi", "output": "Hello"}, "Alpaca"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt and completion"),
        ({"id": "0", "data": ["Hi", "Hello"]}, "raw UltraChat"),
        ({"prompt": turns("Hi"), "completion": turns("", "Hello")[1:]}, "prompt and completion"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, *turns("", "Hello")[1:]]},
            "messages",
        ),
    ],
)
def test_conversation_formats(tmp_path, row, kind):
    rows = load(write(tmp_path / "a.jsonl", [row, row]))
    assert messages(rows) == [turns("Hi", "Hello")] * 2
    assert rows.dataset["where"][1] == f"{tmp_path}/a.jsonl row 2"
    assert f"read as {kind}, 2 rows" in rows.notes[0] and not rows.dropped


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


def test_alpacas_input_follows_the_instruction(tmp_path):
    rows = load(write(tmp_path / "a.jsonl", [{"instruction": "Sum", "input": "1 2", "output": "3"}]))
    assert messages(rows) == [turns("Sum\n\n1 2", "3")]


def test_system_turns_from_the_rows_a_column_and_the_configuration(tmp_path):
    own = {"messages": turns("Hi", "Hello", system="own"), "system": "column"}
    column = {"messages": turns("Hi", "Hello"), "system": "column"}
    neither = {"messages": turns("Hi", "Hello"), "system": None}
    path = write(tmp_path / "a.jsonl", [own, column, neither])
    assert [m[0]["content"] for m in messages(load(path, system="default"))] == ["own", "column", "default"]
    assert messages(load(path))[2] == turns("Hi", "Hello")


PROMPT = turns("One", "1", "Two")


@pytest.mark.parametrize(
    ("row", "prompt", "kind"),
    [
        # as in ultrafeedback_binarized: the prompt column is the first user turn only
        (
            {"prompt": "One", "chosen": turns("One", "1", "Two", "2"), "rejected": turns("One", "1", "Two", "3")},
            PROMPT,
            "with",
        ),
        ({"chosen": turns("One", "1", "Two", "2"), "rejected": turns("One", "1", "Two", "3")}, PROMPT, "pairs"),
        ({"prompt": PROMPT, "chosen": turns("", "2")[1:], "rejected": turns("", "3")[1:]}, PROMPT, "with"),
        ({"prompt": "Two", "chosen": "2", "rejected": "3"}, turns("Two"), "with"),
        (
            {"chosen": "\n\nHuman: Two\n\nAssistant: 2", "rejected": "\n\nHuman: Two\n\nAssistant: 3"},
            turns("Two"),
            "pairs",
        ),
        (
            {"prompt": "\n\nHuman: One\n\nAssistant: 1\n\nHuman: Two\n\nAssistant:", "chosen": "2", "rejected": "3"},
            PROMPT,
            "with",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Two"}],
                "chosen": {"from": "gpt", "value": "2"},
                "rejected": {"from": "gpt", "value": "3"},
            },
            turns("Two"),
            "pairs",
        ),
    ],
)
def test_preference_formats(tmp_path, row, prompt, kind):
    rows = load(write(tmp_path / "a.jsonl", [row]), "dpo")
    (found,) = list(rows.values())
    assert found["prompt"] == prompt
    assert found["chosen"] == turns("", "2")[1:] and found["rejected"] == turns("", "3")[1:]
    assert kind in rows.notes[0]


def test_one_response_may_be_the_others_beginning(tmp_path):
    row = {"chosen": turns("One", "1"), "rejected": turns("One", "1", "Two", "2")}
    (found,) = list(load(write(tmp_path / "a.jsonl", [row]), "dpo").values())
    assert found["prompt"] == turns("One") and found["rejected"] == turns("One", "1", "Two", "2")[1:]


def test_a_system_turn_goes_to_the_pairs_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b"}])
    (found,) = list(load(path, "dpo", system="Be kind.").values())
    assert found["prompt"] == turns("Hi", system="Be kind.")


def test_faulty_rows_are_dropped_counted_and_named(tmp_path):
    good = {"messages": turns("Hi", "Hello")}
    bad = [
        {"messages": turns("Hi")},
        {"messages": turns("Hi", " ")},
        {"messages": [{"role": "wizard", "content": "Hi"}, *turns("", "Hello")[1:]]},
        {"messages": None},
        {"messages": []},
        {"messages": [*turns("Hi", "Hello"), {"role": "system", "content": "late"}, *turns("", "x")[1:]]},
    ]
    rows = load(write(tmp_path / "a.jsonl", [good, *bad, good]))
    assert len(rows.dataset) == 2 and rows.read == 8
    place = f"{tmp_path}/a.jsonl row "
    assert rows.dropped == {
        "no assistant turn": [place + "2"],
        "a turn without content": [place + "3"],
        "unknown role 'wizard'": [place + "4"],
        "messages is empty": [place + "5", place + "6"],
        "a system turn that is not the first": [place + "7"],
    }
    assert rows.dataset["where"][1] == place + "8"


def test_a_row_of_another_schema_is_dropped_and_named(tmp_path):
    rows = load(write(tmp_path / "a.jsonl", [{"messages": turns("Hi", "Hello")}, {"text": "once"}]))
    assert rows.dropped == {"no conversation in columns text": [f"{tmp_path}/a.jsonl row 2"]}
    path = write(tmp_path / "b.jsonl", [{"messages": turns("Hi", "Hello")}, {"messages": "once"}])
    assert load(path).dropped == {"messages is text, not a list of turns": [f"{tmp_path}/b.jsonl row 2"]}


def test_a_conversation_that_ends_with_the_user_is_cut_and_counted(tmp_path):
    rows = load(write(tmp_path / "a.jsonl", [{"messages": turns("Hi", "Hello", "And?")}]))
    assert messages(rows) == [turns("Hi", "Hello")]
    assert rows.changed == {"ended with the user; the last turn was cut": [f"{tmp_path}/a.jsonl row 1"]}


def test_pairs_that_teach_nothing_are_dropped(tmp_path):
    pairs = [
        {"chosen": turns("Hi", "a"), "rejected": turns("Hi", "b")},
        {"chosen": turns("Hi", "a"), "rejected": turns("Hi", "a")},
        {"chosen": turns("Hi", "a"), "rejected": turns("Ho", "b")},
        {"chosen": turns("Hi", "a"), "rejected": turns("Hi", "")},
        {"chosen": turns("Hi", "a"), "rejected": turns("", "b")[1:]},
    ]
    rows = load(write(tmp_path / "a.jsonl", pairs), "dpo")
    assert len(rows.dataset) == 1
    assert list(rows.dropped) == [
        "chosen equals rejected",
        "chosen and rejected answer different prompts",
        "a turn without content",
        "one of chosen and rejected repeats the prompt, the other does not",
    ]


def test_when_no_row_is_left_the_reasons_are_said(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": turns("Hi")}] * 4)
    with pytest.raises(UserError, match=r"none of 4 rows .*no assistant turn: 4 \(.*row 1, "):
        load(path)


def test_rows_of_the_other_method_are_refused(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match=r"found preference rows .* sft needs conversations"):
        load(pairs)
    chats = write(tmp_path / "chats.jsonl", [{"messages": turns("Hi", "Hello")}])
    with pytest.raises(UserError, match="found messages rows; dpo needs preference rows"):
        load(chats, "dpo")
    texts = write(tmp_path / "texts.jsonl", [{"body": "once upon a time"}])
    with pytest.raises(UserError, match="found columns body"):
        load(texts)


def test_columns_are_renamed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "Hi", "a": "Hello", "prompt": "x"}])
    assert messages(load(path, columns={"prompt": "q", "completion": "a"})) == [turns("Hi", "Hello")]
    with pytest.raises(UserError, match=r"no column 'r'(.|\n)*There are q, a, prompt"):
        load(path, columns={"prompt": "r"})
    with pytest.raises(UserError, match="'colour' is not a column here"):
        load(path, columns={"colour": "q"})


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: there is no such file"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: empty"):
        load(tmp_path / "empty.jsonl")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match=r"list\.json: empty"):
        load(tmp_path / "list.json")
    (tmp_path / "head.csv").write_text("prompt,completion\n")
    with pytest.raises(UserError, match=r"head\.csv: empty"):
        load(tmp_path / "head.csv")
    datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}).select([]).to_parquet(tmp_path / "no.parquet")
    with pytest.raises(UserError, match=r"no\.parquet: empty"):
        load(tmp_path / "no.parquet")


def test_a_folder_in_the_hubs_layout(tmp_path):
    for split, word in (("train_sft", "a"), ("test_sft", "b")):
        write(tmp_path / "lines" / f"{split}.jsonl", [{"messages": turns("Hi", word)}])
    (tmp_path / "lines" / "README.md").write_text("words")
    (tmp_path / "lines" / "report.json").write_text("{}")  # beside the splits that `data chat` makes
    table = datasets.Dataset.from_list([{"messages": turns("Hi", f"{i}")} for i in range(4)])
    (tmp_path / "shards" / "data").mkdir(parents=True)
    for i in range(2):
        table.select([2 * i, 2 * i + 1]).to_parquet(
            tmp_path / "shards" / "data" / f"train_sft-0000{i}-of-00002.parquet"
        )
    rows = load(tmp_path / "lines", split="test_sft")
    assert messages(rows) == [turns("Hi", "b")] and rows.dataset["where"][0].endswith("test_sft.jsonl row 1")
    rows = load(tmp_path / "shards", split="train_sft")
    assert [m[1]["content"] for m in messages(rows)] == ["0", "1", "2", "3"]
    assert len(load(tmp_path / "shards").dataset) == 4  # the only split there is
    assert len(load(tmp_path / "shards", split="train_sft[:3]").dataset) == 3
    with pytest.raises(UserError, match=r"no split 'train'(.|\n)*There are test_sft, train_sft"):
        load(tmp_path / "lines", split="train")
    with pytest.raises(UserError, match=r"which split\? There are test_sft, train_sft"):
        load(tmp_path / "lines")
    with pytest.raises(UserError, match="no splits"):
        load(tmp_path / "lines" / "train_sft.jsonl", split="test")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no data in this folder"):
        load(tmp_path / "bare")


def test_the_hubs_errors_are_explained(monkeypatch):
    def refuse(*args, **options):
        assert "trust_remote_code" not in options
        raise ValueError("""Unknown split "train". Should be one of ['train_sft', 'test_sft'].""")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"org/set: .*Should be one of \['train_sft', 'test_sft'\]"):
        load("org/set", split="train")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *args, **options: ["a", "b"])
    with pytest.raises(UserError, match="org/set: which split"):
        load("org/set")


def test_a_name_that_is_nowhere(monkeypatch):
    with pytest.raises(UserError, match="no such file or folder here, and the hub gave no data set"):
        load("zephyr-lite-tests/there-is-no-such-set", split="train")


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
    specs = [
        DatasetSpec(path=numbered(tmp_path, 20, "a", "a")),
        DatasetSpec(path=numbered(tmp_path, 40, "b", "b"), weight=0.5),
        DatasetSpec(path=numbered(tmp_path, 10, "c", "c")),
    ]
    rows = load_rows(specs, "sft", seed=3)
    said = answers(rows)
    assert len(said) == 50 and said == answers(load_rows(specs, "sft", seed=3))
    for start in range(0, 50, 10):
        kinds = [word[0] for word in said[start : start + 10]]
        assert 3 <= kinds.count("a") <= 5 and 3 <= kinds.count("b") <= 5 and 1 <= kinds.count("c") <= 3
    assert len(rows.notes) == 3 and "weight 0.5" in rows.notes[1]


def test_a_changed_file_is_read_again(tmp_path):
    path = numbered(tmp_path, 3)
    assert answers(load(path)) == ["0", "1", "2"]
    numbered(tmp_path, 4, tag="new")
    assert answers(load(path)) == ["new0", "new1", "new2", "new3"]


def test_several_processes_read_the_same(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"messages": turns("Hi", f"{i}") if i % 7 else turns("Hi")} for i in range(60)])
    one = load(path)
    monkeypatch.setattr(workers, "PARALLEL_ROWS", 1)
    monkeypatch.setattr(workers, "cache_key", lambda *args: "several")
    two = load(path)
    assert one.dataset.to_list() == two.dataset.to_list() and one.dropped == two.dropped


def test_the_files_of_a_split_are_read_in_order_and_a_broken_line_is_named(tmp_path):
    for part in range(3):
        rows = [{"messages": turns("Hi", f"{part} {i}")} for i in range(5)]
        write(tmp_path / "set" / f"train-0000{part}-of-00003.jsonl", rows)
    assert answers(load(tmp_path / "set")) == [f"{p} {i}" for p in range(3) for i in range(5)]
    with (tmp_path / "set" / "train-00001-of-00003.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"train-00001-of-00003\.jsonl line 6: broken JSON"):
        load(tmp_path / "set")
