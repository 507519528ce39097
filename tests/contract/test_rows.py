"""What a row becomes: input → normalised row, reason for leaving it out, or note."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pytest

from tests.conftest import make_tokenizer
from zephyr_lite.config.load import DatasetSpec
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.data.formats import normalise
from zephyr_lite.data.load import load_rows
from zephyr_lite.data.messages import RowError
from zephyr_lite.data.sources import open_source
from zephyr_lite.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def call(name: str, arguments: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


QA = [user("q"), answer("a")]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
RESULT = {"role": "tool", "content": "4"}


def conversation(*turns: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(turns), **columns}


# -- which turns are trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"weight": "0"},
        {"weight": "0.0"},
        {"train": False},
        {"train": "false"},
        {"train": "No"},
        {"training": False},
        {"trainable": 0},
        {"loss": False},
        {"Loss": "False"},
        {"masked": True},
        {"masked": "1"},
        {"is_masked": True},
        {"loss_weight": 0},
        {"loss_scale": 0},
        {"trained": False},
        {"supervise": "no"},
        {"train-on-turn": False},
        {"weight": 1, "train": False},
    ],
)
def test_a_turn_marked_as_not_to_be_trained(mark):
    row = normalise(conversation(user("q"), {**answer("wrong"), **mark}, *QA), "sft")
    assert row.value == conversation(user("q"), answer("wrong", train=False), *QA)
    assert row.unread_keys == []


@pytest.mark.parametrize(
    "mark", [{"weight": 1}, {"weight": "1.0"}, {"train": True}, {"loss": "yes"}, {"masked": False}, {"weight": None}]
)
def test_a_turn_marked_as_to_be_trained(mark):
    row = normalise(conversation(user("q"), {**answer("a"), **mark}), "sft")
    assert row.value == conversation(*QA) and row.unread_keys == []


@pytest.mark.parametrize(
    "mark", [{"weight": 0.5}, {"weight": 2}, {"weight": "0.3"}, {"train": "maybe"}, {"masked": [1, 0]}]
)
def test_a_mark_that_is_neither(mark):
    with pytest.raises(RowError, match=f"the {next(iter(mark))} of a turn is .*trained .* or not"):
        normalise(conversation(user("q"), {**answer("a"), **mark}), "sft")


def test_a_mark_on_turns_of_input_and_output():
    turns = [{"input": "q", "output": "wrong", "weight": 0}, {"input": "q", "output": "a", "weight": 1}]
    row = normalise({"conversation": turns}, "sft")
    assert row.value == conversation(user("q"), answer("wrong", train=False), *QA) and row.unread_keys == []


def test_marks_on_all_answers_and_on_other_turns():
    with pytest.raises(RowError, match="every answer is marked"):
        normalise(conversation(user("q"), {**answer("a"), "weight": 0}), "sft")
    row = normalise(conversation({**user("q"), "train": True}, answer("a")), "sft")
    assert row.value == conversation(*QA) and row.unread_keys == ["train"]
    row = normalise(conversation({**user("q"), "train": False}, answer("a")), "sft")
    assert row.value == conversation(*QA) and row.unread_keys == []
    pair = {"chosen": [user("q"), {**answer("a"), "weight": 0}], "rejected": [user("q"), answer("b")]}
    with pytest.raises(RowError, match="every answer of chosen is marked"):
        normalise(pair, "dpo")


@pytest.mark.parametrize("label", [False, "false", 0, "0"])
def test_an_answer_labelled_false_is_not_learned(label):
    with pytest.raises(RowError, match="label is false"):
        normalise({"prompt": "q", "completion": "a", "label": label}, "sft")
    assert normalise({"prompt": "q", "completion": "a", "label": True}, "sft").unread_columns == []


def test_a_label_that_is_a_class_is_not_read():
    for label in (0, 3, "sports"):
        row = normalise(conversation(*QA, label=label), "sft")
        assert row.value == conversation(*QA) and row.unread_columns == ["label"]


# -- tools ---------------------------------------------------------------------------------------------------------------

CALLED = [user("Ulm?"), answer("", tool_calls=[call("weather", {"city": "Ulm"})]), RESULT, answer("4 degrees")]


@pytest.mark.parametrize(
    "turns",
    [
        [answer("", tool_calls=[{"function": {"name": "weather", "arguments": {"city": "Ulm"}}}])],
        [
            answer(
                None, tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}]
            )
        ],
        [answer(None, tool_calls=[{"name": "weather", "arguments": {"city": "Ulm"}}])],
        [answer(None, tool_calls=[{"name": "weather", "args": {"city": "Ulm"}}])],
        [answer(None, tool_calls=[{"name": "weather", "input": {"city": "Ulm"}}])],
        [answer(None, function_call={"name": "weather", "arguments": '{"city": "Ulm"}'})],
        [{"role": "function_call", "content": '{"name": "weather", "arguments": {"city": "Ulm"}}'}],
        [{"role": "tool_call", "content": {"name": "weather", "parameters": {"city": "Ulm"}}}],
        [{"from": "function_call", "value": '[{"name": "weather", "arguments": "{\\"city\\": \\"Ulm\\"}"}]'}],
    ],
)
@pytest.mark.parametrize("role", ["tool", "ipython", "observation", "function", "tool_response"])
def test_calls_and_results_in_every_form(turns, role):
    row = normalise(conversation(user("Ulm?"), *turns, {"role": role, "content": "4"}, answer("4 degrees")), "sft")
    assert row.value == conversation(*CALLED) and row.unread_keys == []


def test_ids_names_null_arguments_and_a_call_as_the_last_answer():
    arguments = {"city": None, "days": [1, {"x": None}]}
    turns = [
        user("Ulm?"),
        answer("Let me look.", tool_calls=[call("weather", arguments, id="c1")]),
        {"role": "tool", "content": {"t": 4}, "tool_call_id": "c1", "name": "weather"},
        answer("", tool_calls=[call("stop", {})]),
    ]
    row = normalise(conversation(*turns), "sft").value
    assert row == conversation(*turns[:2], {**turns[2], "content": '{"t": 4}'}, turns[3])


def test_results_that_are_lists_and_calls_that_are_none():
    turns = [*CALLED[:2], {"role": "tool", "content": [1, {"t": 4}]}, answer("a", tool_calls="[]")]
    row = normalise(conversation(*turns), "sft").value
    assert row == conversation(*CALLED[:2], {"role": "tool", "content": '[1, {"t": 4}]'}, answer("a"))


@pytest.mark.parametrize(
    ("value", "tools"),
    [
        ([TOOL], [TOOL]),
        (json.dumps([TOOL]), [TOOL]),
        ([TOOL["function"]], [TOOL]),
        (json.dumps([TOOL["function"]]), [TOOL]),
        ([json.dumps(TOOL)], [TOOL]),
        (TOOL, [TOOL]),
        ("", None),
        ("[]", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_the_tools_column(value, tools, column):
    for method, columns in (("sft", {"messages": QA}), ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b"})):
        assert normalise({**columns, column: value}, method).value.get("tools") == tools


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (conversation(*QA, tools="weather"), "tools are a text that is not JSON"),
        (conversation(*QA, tools=[{"x": 1}]), "tools is not a list of functions with names"),
        (conversation(user("q"), answer("", tool_calls=[{"x": 1}])), "a tool call has no name"),
        (
            conversation(user("q"), answer("", function_call={"name": "f", "arguments": "x"})),
            "the arguments of a tool call",
        ),
        (
            conversation(user("q"), {"role": "function_call", "content": "f(x)"}),
            "tool calls are a text that is not JSON",
        ),
        (conversation({**user("q"), "tool_calls": [call("f", {})]}, answer("a")), "a user turn with tool calls"),
    ],
)
def test_tools_that_cannot_be_read(row, reason):
    with pytest.raises(RowError, match=reason):
        normalise(row, "sft")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_kept_beside_the_answer(key):
    row = normalise(conversation(user("q"), {**answer("a"), key: "because"}), "sft")
    assert row.value == conversation(user("q"), answer("a", reasoning_content="because")) and row.unread_keys == []


# -- columns beside the turns --------------------------------------------------------------------------------------------

EARLIER = [user("q0"), answer("a0")]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "q", "output": "a", "history": [["q0", "a0"]]}, [*EARLIER, *QA]),
        ({"instruction": "q", "output": "a", "history": '[["q0", "a0"]]', "system": "s"}, [system("s"), *EARLIER, *QA]),
        ({"instruction": "", "input": "q", "output": "a"}, QA),
        ({"messages": QA, "system": "s"}, [system("s"), *QA]),
        ({"messages": QA, "system_prompt": "s"}, [system("s"), *QA]),
        ({"messages": QA, "instruction": "s"}, [system("s"), *QA]),
        ({"messages": [system("own"), *QA], "system_prompt": "s"}, [system("own"), *QA]),
        ({"messages": QA, "prompt": [system("s"), user("q")]}, [system("s"), *QA]),
        ({"messages": QA, "prompt": "q"}, QA),
        ({"messages": [], "prompt": "q", "completion": "a"}, QA),
        ({"messages": "", "prompt": "q", "completion": "a"}, QA),
        ({"conversation": [{"input": "q0", "output": "a0"}, {"input": "q", "output": "a"}]}, [*EARLIER, *QA]),
        ({"messages": [system("s"), answer("a")]}, [system("s"), answer("a")]),
    ],
)
def test_history_system_and_other_shapes(row, messages):
    found = normalise(row, "sft")
    assert found.value == {"messages": messages}
    assert found.changes == (
        ["the column instruction was taken as the system turn"] if "instruction" in row and "messages" in row else []
    )
    assert found.unread_columns == (["system_prompt"] if messages[0]["content"] == "own" else [])


PAIR = {"prompt": [user("q")], "chosen": [answer("a")], "rejected": [answer("b")]}
SIDES = {"chosen": "a", "rejected": "b"}
WHOLE = {"chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "q", "system": "s", **SIDES}, [system("s"), user("q")]),
        ({"question": "q", "system": "", **SIDES}, [user("q")]),
        ({"instruction": "say", "input": "q", **SIDES}, [user("say\n\nq")]),
        ({"instruction": "q", "input": "", "history": [["q0", "a0"]], **SIDES}, [*EARLIER, user("q")]),
        ({"prompt": [system("s"), *EARLIER, user("q")], **SIDES}, [system("s"), *EARLIER, user("q")]),
        ({"prompt": [system("s"), user("q")], **WHOLE}, [system("s"), user("q")]),
        ({"prompt": [system("s"), *EARLIER, user("q")], **WHOLE}, [system("s"), *EARLIER, user("q")]),
        ({"prompt": [system("s")], **WHOLE}, [system("s"), user("q")]),
        ({"prompt": "q", **WHOLE}, [user("q")]),
        ({"prompt": [system("s")], **SIDES}, [system("s")]),
    ],
)
def test_the_prompt_of_a_pair(row, prompt):
    found = normalise(row, "dpo")
    assert found.value == {**PAIR, "prompt": prompt} and found.unread_columns == []


def test_a_mark_on_an_answer_that_both_sides_have_does_not_end_the_prompt():
    marked = {**answer("a"), "weight": 0}
    for first, second in ((marked, answer("a")), (answer("a"), marked)):
        row = {
            "chosen": [user("q"), first, user("r"), answer("b")],
            "rejected": [user("q"), second, user("r"), answer("c")],
        }
        value = normalise(row, "dpo").value
        assert len(value["prompt"]) == 3 and value["chosen"] == [answer("b")] and value["rejected"] == [answer("c")]
    with pytest.raises(RowError, match="chosen equals rejected"):
        normalise({"chosen": [*QA, *QA], "rejected": [user("q"), marked, *QA]}, "dpo")


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("dpo", {"messages": QA, "chosen": "a", "rejected": "b"}),
        ("dpo", {"conversations": QA, "chosen": [answer("a")], "rejected": [answer("b")]}),
        ("dpo", {"prompt": [user("q"), answer("Sure, ")], "chosen": "a", "rejected": "b"}),
        ("sft", {"prompt": [user("q"), answer("Sure, ")], "completion": "a"}),
    ],
)
def test_a_prompt_that_is_answered_already(method, row):
    with pytest.raises(RowError, match="the prompt ends with an assistant turn"):
        normalise(row, method)


def test_an_empty_prompt_column_does_not_hide_another():
    row = normalise({"prompt": "", "question": "q", "chosen": "a", "rejected": "b"}, "dpo")
    assert row.value["prompt"] == [user("q")] and row.unread_columns == []


def test_a_prompt_column_that_says_something_else_is_not_read():
    assert normalise({"prompt": "x", **WHOLE}, "dpo").unread_columns == ["prompt"]


def test_an_answer_to_a_system_turn_alone_is_trained(tmp_path):
    template = resolve_template("zephyr", make_tokenizer(tmp_path))
    messages = normalise({"messages": [system("s"), answer("I am Bo.")]}, "sft").value["messages"]
    ids, mask = template.encode(messages)
    assert template.tokenizer.decode(ids[mask]) == "I am Bo.</s>"
    assert not template.encode([answer("I am Bo."), answer("Hello.")])[1].any()
    greeting = normalise({"messages": [answer("Hello."), *QA]}, "sft").value["messages"]
    ids, mask = template.encode(greeting)
    assert template.tokenizer.decode(ids[mask]) == "a</s>"


# -- text is text --------------------------------------------------------------------------------------------------------

JSONS = [
    '{"city": "Paris"}',
    '{"role": "assistant", "content": "hi"}',
    '[{"role": "user", "content": "x"}]',
    "[1, 2]",
    "null",
]
TEXTS = [
    *JSONS,
    "2021-05-03",
    "2021-05-03T10:00:00Z",
    "02108",
    "1.10",
    "True",
    "NA",
    "Human: Hello?\n\nAssistant: Yes?",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_string_is_that_string_in_every_file(text, suffix, tmp_path):
    rows = [{"prompt": text, "completion": text}] * 2
    table = datasets.Dataset.from_list(rows)
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        table.to_parquet(file)
    elif suffix in (".csv", ".tsv"):
        table.to_csv(file, sep="\t" if suffix == ".tsv" else ",")
    else:
        table.to_json(file, lines=suffix == ".jsonl")
    if suffix in (".csv", ".tsv") and text.startswith("[{"):  # there a list of turns has no other form
        assert open_source(DatasetSpec(path=str(file)))[1]["prompt"] == json.loads(text)
        return
    rows = load_rows([DatasetSpec(path=str(file))], "sft", seed=0)
    assert list(rows.values()) == [conversation(user(text), answer(text))] * 2


@pytest.mark.parametrize("text", TEXTS)
def test_a_string_is_that_string_in_a_pair(text):
    value = normalise({"prompt": text, "chosen": text, "rejected": "no"}, "dpo").value
    assert value == {"prompt": [user(text)], "chosen": [answer(text)], "rejected": [answer("no")]}
    value = normalise(
        {"prompt": "q", "chosen": [user("q"), answer(text)], "rejected": [user("q"), answer("no")]}, "dpo"
    ).value
    assert value == {"prompt": [user("q")], "chosen": [answer(text)], "rejected": [answer("no")]}


def test_transcripts_are_split_where_no_column_is_the_prompt():
    whole = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    assert normalise(whole, "dpo").value == PAIR
    # a prompt that waits for its answer cannot be anything else
    asked = normalise({"prompt": "\n\nHuman: q\n\nAssistant:", **SIDES}, "dpo")
    assert asked.value == PAIR and len(asked.changes) == 1
    assert normalise({"prompt": "\n\nHuman: q\n\nAssistant:", **whole}, "dpo").value == PAIR
    played = normalise({"prompt": "Write a play.", **whole}, "dpo").value
    assert played["chosen"] == [answer(whole["chosen"])]


@pytest.mark.parametrize("value", [1.1, True, {"a": 1}, float("nan")])
def test_what_is_not_text_is_no_answer(value):
    with pytest.raises(RowError, match=r"completion (is|has no role)"):
        normalise({"prompt": "q", "completion": value}, "sft")


# -- what is said --------------------------------------------------------------------------------------------------------


def test_a_mapping_says_which_format_is_meant(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**conversation(*QA), "instruction": "i", "output": "o", "x": "X", "y": "Y"}))
    for columns in ({"prompt": "x", "completion": "y"}, {"instruction": "x", "output": "y"}):
        rows = load_rows([DatasetSpec(path=str(path), columns=columns)], "sft", seed=0)
        assert list(rows.values()) == [conversation(user("X"), answer("Y"))]


def test_a_slice_behind_the_end_is_empty(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(conversation(*QA)))
    with pytest.raises(UserError, match="empty; there is no row in it"):
        load_rows([DatasetSpec(path=str(path), split="train[5:]")], "sft", seed=0)


def test_one_line_lists_all_that_was_not_read(tmp_path):
    rows = [conversation(user("q"), {**answer("a"), "refusal": None}, id=i) for i in range(30)]
    rows += [conversation(user("q"), {**answer("a"), "audio": "x", "source": None}, source="late", tags=[])]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (_, note) = load_rows([DatasetSpec(path=str(file))], "sft", seed=0).notes
    assert note == f"{file}: not read: columns id, source; message keys audio"
    datasets.Dataset.from_list([{"prompt": "q", "completion": "a", "score": 0.5}]).to_parquet(tmp_path / "a.parquet")
    (_, note) = load_rows([DatasetSpec(path=str(tmp_path / "a.parquet"))], "sft", seed=0).notes
    assert note.endswith("not read: columns score")
    file.write_text(json.dumps(conversation(*QA)) + "\n")
    assert len(load_rows([DatasetSpec(path=str(file))], "sft", seed=0).notes) == 1


@pytest.mark.parametrize(
    ("method", "row", "words"),
    [
        (
            "sft",
            {"question": "q", "answer": "a"},
            "add dataset.columns.prompt=question dataset.columns.completion=answer",
        ),
        ("sft", {"Question": "q", "x": "a"}, "add dataset.columns.prompt=Question dataset.columns.completion=COLUMN"),
        ("sft", {"prompt": "q", "response": "a"}, "add dataset.columns.completion=response (found prompt, response)"),
        (
            "dpo",
            {"query": "q", "chosen": "a", "rejected": "b"},
            "add dataset.columns.prompt=query (found query, chosen",
        ),
        (
            "dpo",
            {"prompt": "q", "winner": "a", "loser": "b"},
            "dataset.columns.chosen=winner dataset.columns.rejected=loser",
        ),
        ("dpo", {"prompt": "q", "completion": "a", "label": True}, "Pair answers to the same prompt"),
        ("sft", {"prompt": "q", "chosen": "a", "rejected": "b"}, "zephyr-lite dpo"),
    ],
)
def test_the_hint_is_what_to_type(method, row, words, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        load_rows([DatasetSpec(path=str(file))], method, seed=0)
    assert words in caught.value.hint and str(file) in caught.value.message
