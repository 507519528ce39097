"""The formats of rows, and their conversion to messages.

Every function works on one row. A faulty row is a ``RowError`` with a reason; the caller leaves the row out, counts it
and names its place. All other columns and keys are either read or listed as not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ..errors import UserError
from ..io.text import shown
from .messages import Message as Message
from .messages import RowError as RowError
from .messages import as_messages, as_text, as_tools, listed, message, truth

Method = Literal["sft", "dpo"]

# column of turns → the name of its format
TURNS = {"messages": "messages", "conversations": "ShareGPT", "conversation": "conversation turns"}
_ANSWERS = ("prompt", "completion", "instruction", "input", "output", "question", "chosen", "rejected")
_BESIDE = ("system", "system_prompt", "history", "tools", "functions", "label")
COLUMNS = (*TURNS, *_ANSWERS, *_BESIDE, "data", "text")

# the role of a plain text, which is trained on without a template
TEXT = "text"
PLAIN = "plain text (no chat template, loss over all tokens)"

# likely other names of columns, for hints
_LIKELY = {
    "prompt": ("question", "q", "query", "instruction", "input", "user", "human", "problem", "request", "prompts"),
    "completion": ("answer", "a", "response", "output", "assistant", "solution", "target", "reply", "completions"),
    "chosen": ("preferred", "accepted", "better", "winner", "win", "good", "positive", "chosen_response"),
    "rejected": ("dispreferred", "refused", "worse", "loser", "lose", "bad", "negative", "rejected_response"),
}

_TRANSCRIPT = re.compile(r"(?:^|\n\n)[ \t]*(Human|Assistant):")
_OPEN_TRANSCRIPT = re.compile(r"(\s*\n\n)?[ \t]*Human:.*\n\nAssistant:\s*", re.DOTALL)

_NEEDS = {
    "sft": "sft needs conversations: a column messages, conversations (ShareGPT), instruction and output (Alpaca), "
    "prompt and completion, data (raw UltraChat), or plain text: a column text",
    "dpo": "dpo needs preference rows: columns chosen and rejected, with or without prompt",
}


@dataclass
class Row:
    """A normalised row.

    Attributes:
        value: {"messages": …} for sft, {"prompt": …, "chosen": …, "rejected": …} for dpo, and "tools" if it has any.
        kind: the name of its format.
        changes: changes to the row, in words.
        unread_columns, unread_keys: columns, and keys of turns, that have a value and were not read.
    """

    value: dict[str, Any]
    kind: str
    changes: list[str] = field(default_factory=list)
    unread_columns: list[str] = field(default_factory=list)
    unread_keys: list[str] = field(default_factory=list)


class _Reading:
    """A raw row, and the columns and keys read so far."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.read: set[str] = set()
        self.unread_keys: set[str] = set()
        self.changes: list[str] = []

    def has(self, column: str) -> bool:
        return self.values.get(column) is not None

    def take(self, *columns: str) -> Any:
        """The value of the first of these columns with one, else None."""
        column = next((c for c in columns if _holds(self.values.get(c))), None)
        if column is None:
            return None
        self.read.add(column)
        return self.values[column]

    def messages(self, column: str) -> list[Message]:
        return as_messages(self.take(column), column, self.unread_keys)


def _holds(value: Any) -> bool:
    return value is not None and value != "" and value != [] and value != {}


def normalise(values: Mapping[str, Any], method: Method) -> Row:
    """A raw row as the messages that a stage trains on.

    Args:
        values: column → value, after the renaming by ``columns:``.
        method: the stage; a preference row with ``messages`` serves both.

    Raises:
        RowError: it has no format of this method, or cannot be trained on.
    """
    found = _format({c for c, value in values.items() if _holds(value)}, method) or _format(set(values), method)
    if found is None:
        what = "conversation" if method == "sft" else "preference pair"
        raise RowError(f"no {what} in columns {shown(', '.join(values) or 'none', 200)}")
    kind, read = found
    reading = _Reading(values)
    value = read(reading)
    if method == "sft":
        _refuse_labelled_false(reading, kind)
    if tools := as_tools(reading.take("tools", "functions")):
        value["tools"] = tools
    unread = [column for column, item in values.items() if column not in reading.read and _holds(item)]
    return Row(value, kind, reading.changes, unread, sorted(reading.unread_keys))


def detect(columns: list[str], method: Method, where: str) -> str:
    """The name of the format of a data set with these columns.

    Raises:
        UserError: no format of this method fits; names what was found, what is needed, and what to type.
    """
    have = set(columns)
    if found := _format(have, method):
        return found[0]
    if method == "dpo" and {"prompt", "completion", "label"} <= have:
        raise UserError(
            f"{where}: found prompt, completion and label (KTO rows); {_NEEDS['dpo']}.",
            "Pair answers to the same prompt: chosen has label true, rejected has label false.",
        )
    other = _format(have, "dpo" if method == "sft" else "sft")
    if other and method == "sft":
        what, hint = "preference rows (chosen and rejected)", "Train on them with zephyr-lite dpo."
    else:
        what = f"{other[0]} rows" if other else f"columns {shown(', '.join(columns), 500)}"
        hint = mapping_hint(columns, method)
    raise UserError(f"{where}: found {what}; {_NEEDS[method]}.", hint)


def mapping_hint(columns: list[str], method: Method) -> str:
    """The command-line words that map a data set's columns, with likely names filled in."""
    wanted = {}
    lower = {column.lower(): column for column in columns}
    for ours in ("prompt", "completion") if method == "sft" else ("prompt", "chosen", "rejected"):
        if ours not in columns:
            wanted[ours] = next((lower[name] for name in (ours, *_LIKELY[ours]) if name in lower), "COLUMN")
    found = f"(found {shown(', '.join(columns), 500)})"
    if _format(set(columns), method) and set(wanted.values()) <= {"COLUMN"}:
        return f"If the columns mean something else, add dataset.columns.OURS=THEIRS {found}."
    words = " ".join(f"dataset.columns.{ours}={shown(theirs)}" for ours, theirs in wanted.items())
    return f"If the columns have other names, add {words} {found}."


def _format(have: set[str], method: Method) -> tuple[str, Callable[[_Reading], dict[str, Any]]] | None:
    if method == "dpo":
        if {"chosen", "rejected"} <= have:
            return "preference pairs" + (" with a prompt column" if "prompt" in have else ""), _read_pair
        return None
    for column, name in TURNS.items():
        if column in have:
            return name, partial(_read_messages, column=column)
    if {"instruction", "output"} <= have:
        return "Alpaca", lambda row: _conversation(row, [*_prompt(row), *_answer(row, "output")])
    if {"prompt", "completion"} <= have:
        return "prompt and completion", _read_completion
    if "data" in have:
        return "raw UltraChat", _read_turns
    if "text" in have:
        return PLAIN, _read_text
    return None


# -- conversations -------------------------------------------------------------------------------------------------------


def _read_messages(row: _Reading, column: str) -> dict[str, Any]:
    messages = row.messages(column)
    if isinstance(row.values.get("prompt"), (str, list)):
        messages = [*_only_in_prompt(row, messages), *messages]
    return _conversation(row, messages, "instruction")


def _read_turns(row: _Reading) -> dict[str, Any]:
    turns = row.take("data") or []
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise RowError("data is not a list of texts, the user's and the assistant's in turn")
    return _conversation(row, [message(("user", "assistant")[i % 2], as_text(t, "data")) for i, t in enumerate(turns)])


def _read_text(row: _Reading) -> dict[str, Any]:
    if isinstance(row.values["text"], list):  # conversations in a column that dataset_text_field named
        return _conversation(row, row.messages("text"))
    text = as_text(row.take("text"), "text")
    if not text.strip():
        raise RowError("text is empty")
    return {"messages": [message(TEXT, text)]}


def _read_completion(row: _Reading) -> dict[str, Any]:
    prompt, answer = _prompt(row), _answer(row, "completion")
    if not _is_whole(answer):
        _refuse_answered(prompt)
    return _conversation(row, [*prompt, *answer])


def _conversation(row: _Reading, messages: list[Message], *system_columns: str) -> dict[str, Any]:
    messages = _with_system(row, messages, *system_columns)
    messages = _checked(row, messages)
    if all(turn.get("train") is False for turn in messages if turn["role"] == "assistant"):
        raise RowError("every answer is marked as not to be trained")
    return {"messages": messages}


def _refuse_labelled_false(row: _Reading, kind: str) -> None:
    """Refuse an answer with KTO's label false. A number is such a label in rows of prompt and completion only;
    elsewhere it may be a class."""
    label = row.values.get("label")
    is_text = isinstance(label, str) and label.strip().lower() in ("true", "false")
    if not (isinstance(label, bool) or is_text or kind == "prompt and completion"):
        return
    good = truth(label)
    if good is not None:
        row.read.add("label")
    if good is False:
        raise RowError("label is false: a rejected answer")


# -- pairs ---------------------------------------------------------------------------------------------------------------


def _read_pair(row: _Reading) -> dict[str, Any]:
    explicit = any(
        _holds(row.values.get(c)) for c in ("prompt", "question", "instruction", "conversations", "messages")
    )
    repeated = _repeats_transcript(row)
    chosen, rejected = (_answer(row, c, transcript=repeated or not explicit) for c in ("chosen", "rejected"))
    # ultrafeedback_binarized and others repeat the conversation in both columns; the prompt column is then only its
    # first user turn
    if _is_whole(chosen) != _is_whole(rejected):
        raise RowError("one of chosen and rejected repeats the prompt, the other does not")
    if _is_whole(chosen):
        before = _only_in_prompt(row, chosen)
        chosen, rejected = [*before, *chosen], [*before, *rejected]
    else:
        prompt = _prompt(row)
        if not prompt:
            raise RowError("no prompt: chosen and rejected hold answers only, and there is no prompt column")
        _refuse_answered(prompt)
        chosen, rejected = [*prompt, *chosen], [*prompt, *rejected]
    chosen, rejected = (_checked(row, _with_system(row, turns)) for turns in (chosen, rejected))
    plain = [[{**turn, "train": None} for turn in turns] for turns in (chosen, rejected)]
    if plain[0] == plain[1]:
        raise RowError("chosen equals rejected")
    shorter = min(len(chosen), len(rejected))
    common = next((i for i, (a, b) in enumerate(zip(*plain)) if a != b), shorter)
    if common < shorter and chosen[common]["role"] != rejected[common]["role"]:
        raise RowError("chosen and rejected differ in the order of their turns")
    if common < shorter and chosen[common]["role"] != "assistant":
        raise RowError("chosen and rejected answer different prompts")
    # one may be the beginning of the other: the responses begin with an answer
    while common > 0 and not (common < shorter and chosen[common]["role"] == rejected[common]["role"] == "assistant"):
        common -= 1
    if common == 0:
        raise RowError("no prompt: chosen and rejected have no user turn in common")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if all(turn.get("train") is False for turn in turns[common:] if turn["role"] == "assistant"):
            raise RowError(f"every answer of {name} is marked as not to be trained")
    return {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def _refuse_answered(prompt: list[Message]) -> None:
    """Refuse a prompt that ends with an answer: templates render neither two in a row nor the beginning of one."""
    if prompt and prompt[-1]["role"] == "assistant":
        raise RowError("the prompt ends with an assistant turn, which an answer cannot follow")


def _is_whole(turns: list[Message]) -> bool:
    """Whether a chosen or rejected column repeats the prompt: it does not begin with an answer."""
    return bool(turns) and turns[0]["role"] != "assistant"


def _repeats_transcript(row: _Reading) -> bool:
    """Whether chosen and rejected are transcripts that begin with the one in the prompt column."""
    prompt = str(row.values.get("prompt") or "")
    sides = [row.values.get(column) for column in ("chosen", "rejected")]
    return _is_open_transcript(prompt) and all(
        isinstance(s, str) and s.strip().startswith(prompt.strip()) for s in sides
    )


def _only_in_prompt(row: _Reading, turns: list[Message]) -> list[Message]:
    """The turns of the prompt column (a system turn, history) that come before those repeated in another column."""
    if not _holds(row.values.get("prompt")):
        return []
    prompt = _prompt(row)
    plain = [[(turn["role"], turn["content"].strip()) for turn in part] for part in (prompt, turns)]
    for shared in range(min(len(prompt), len(turns)), 0, -1):
        if plain[0][len(prompt) - shared :] == plain[1][:shared]:
            return prompt[: len(prompt) - shared]
    if plain[0][0] in plain[1]:  # after a system turn of the other column
        return []
    if all(role == "system" for role, _ in plain[0]) and plain[1][0][0] != "system":
        return prompt
    row.read.discard("prompt")
    return []


# -- columns to messages -------------------------------------------------------------------------------------------------


def _prompt(row: _Reading) -> list[Message]:
    """The turns before the answer, from the first column that has them; [] if none has."""
    named = [column for column in ("prompt", "question", "instruction") if row.has(column)]
    source = next((column for column in named if _holds(row.values[column])), named[0] if named else None)
    if source is None:
        column = next((c for c in ("conversations", "messages") if _holds(row.values.get(c))), None)
        return row.messages(column) if column else []
    value = row.take(source)
    if isinstance(value, (list, Mapping)):
        turns = as_messages(value, source, row.unread_keys)
    elif _is_open_transcript(value):
        row.changes.append("the prompt is a transcript (Human: … Assistant:) and was split into turns")
        turns = _transcript(value)
    else:
        parts = [as_text(value, source), as_text(row.take("input"), "input") if source == "instruction" else ""]
        turns = [message("user", "\n\n".join(part for part in parts if part.strip()))]
    return [*_history(row), *turns]


def _history(row: _Reading) -> list[Message]:
    """Alpaca's column of earlier [question, answer] pairs."""
    turns = []
    for pair in listed(row.take("history"), "history pairs"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("history is not a list of [question, answer] pairs")
        turns += [message("user", as_text(pair[0], "history")), message("assistant", as_text(pair[1], "history"))]
    return turns


def _answer(row: _Reading, column: str, *, transcript: bool = False) -> list[Message]:
    value = row.take(column)
    if isinstance(value, (list, Mapping)):
        return as_messages(value, column, row.unread_keys)
    text = as_text(value, column)
    match = _TRANSCRIPT.search(text) if transcript else None
    if match and not text[: match.start()].strip():
        return _transcript(text)
    return [message("assistant", text)]


def _is_open_transcript(value: Any) -> bool:
    """Whether a prompt is a transcript, Human: … Assistant:, without the last answer."""
    return isinstance(value, str) and _OPEN_TRANSCRIPT.fullmatch(value) is not None


def _transcript(text: str) -> list[Message]:
    """``\\n\\nHuman: … \\n\\nAssistant: …`` as turns, without an empty last one."""
    as_text(text, "a transcript")
    parts = _TRANSCRIPT.split(text)[1:]
    turns = [
        message("user" if who == "Human" else "assistant", said.strip()) for who, said in zip(parts[::2], parts[1::2])
    ]
    return turns[:-1] if not turns[-1]["content"] else turns


# -- checks --------------------------------------------------------------------------------------------------------------


def _with_system(row: _Reading, messages: list[Message], *more_columns: str) -> list[Message]:
    """The turns, after one of the row's system column if they have no system turn."""
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    if any(m["role"] == "system" for m in messages):
        return messages
    for column in ("system", "system_prompt", *more_columns):
        text = as_text(row.take(column), column)
        if text.strip():
            if column in more_columns:
                row.changes.append(f"the column {column} was taken as the system turn")
            return [message("system", text), *messages]
    return messages


def _checked(row: _Reading, messages: list[Message]) -> list[Message]:
    """The turns up to the last answer.

    Raises:
        RowError: there is none, a turn is empty, or a system turn is not the first.
    """
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError("no assistant turn")
    while (last := messages[-1]["role"]) != "assistant":
        messages = messages[:-1]
        what = "the user" if last == "user" else f"a {last} turn"
        row.changes.append(f"ended with {what}; the last turn was cut")
    for turn in messages:
        if not turn["content"].strip() and turn["role"] != "tool" and "tool_calls" not in turn:
            raise RowError("a turn without content")
    if any(m["role"] == "system" for m in messages[1:]):
        raise RowError("a system turn that is not the first")
    return messages
