"""The formats of rows (OpenAI, ShareGPT, Alpaca, Hermes, Capybara, UltraChat, preference pairs, labels), read as messages.

One row at a time: a faulty row is a ``RowError`` with a reason; the caller leaves it out, counts it and names its place.
Columns and keys that have a value and are not read are listed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from ..errors import UserError
from ..io.text import shown
from .messages import Message, RowError, as_messages, as_text, as_tools, has_value, listed, message, truth

Method = Literal["sft", "dpo", "kto"]

# column of turns → the name of its format
TURNS = {"messages": "messages", "conversations": "ShareGPT", "conversation": "conversation turns"}
_PROMPTS = ("prompt", "question", "instruction")
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
    "label": ("kto_tag", "liked", "thumbs_up", "feedback", "vote", "rating"),
}
_NEEDS = {
    "sft": "sft needs conversations: a column messages, conversations (ShareGPT), instruction and output (Alpaca), "
    "prompt and completion, data (raw UltraChat), or plain text: a column text",
    "dpo": "dpo needs preference rows: columns chosen and rejected, with or without prompt",
    "kto": "loss_type kto needs answers with a label (true or false): columns prompt, completion and label, or messages and "
    "label; or preference rows: chosen and rejected",
}

_TRANSCRIPT = re.compile(r"(?:^|\n\n)[ \t]*(Human|Assistant):")
_OPEN_TRANSCRIPT = re.compile(r"(\s*\n\n)?[ \t]*Human:.*\n\nAssistant:\s*", re.DOTALL)


class Row:
    """A raw row, which columns and keys of it were read, and its normalised value.

    Attributes:
        values: column → value, as given.
        value: {"messages": …} for sft, {"prompt": …, "chosen": …, "rejected": …} for dpo and kto (an answer with a label is
            chosen or rejected, and the other one is []), and "tools" if it has any.
        kind: the name of its format.
        changes: in words.
        unread_keys: keys of turns that have a value and were not read.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.value: dict[str, Any] = {}
        self.kind = ""
        self.changes: list[str] = []
        self.unread_keys: list[str] = []
        self.filled = {column: value for column, value in values.items() if has_value(value)}
        self.read: set[str] = set()

    @property
    def unread_columns(self) -> list[str]:
        """Columns that have a value and were not read."""
        return [column for column in self.filled if column not in self.read]

    def holds(self, *columns: str) -> str | None:
        """The first of these columns with a value."""
        return next((column for column in columns if column in self.filled), None)

    def take(self, *columns: str) -> Any:
        """The value of the first of these columns with one, else None."""
        column = self.holds(*columns)
        if column is None:
            return None
        self.read.add(column)
        return self.filled[column]


def normalise(values: Mapping[str, Any], method: Method) -> Row:
    """A raw row as the messages that a stage trains on.

    Args:
        values: column → value, after the renaming by ``columns:``.
        method: the stage; a preference row with ``messages`` serves both.

    Raises:
        RowError: it has no format of this method, or cannot be trained on.
    """
    row = Row(values)
    found = _format(set(row.filled), method) or _format(set(values), method)
    if found is None:
        what = {"sft": "conversation", "dpo": "preference pair", "kto": "answer with a label, and no pair,"}[method]
        raise RowError(f"no {what} in columns {shown(', '.join(values) or 'none', 200)}")
    row.kind, read = found
    row.value = read(row)
    if method == "sft" and "label" in row.filled:
        # KTO's; in other rows a number or another word may be a class
        is_labelled = row.kind == "prompt and completion" or str(values["label"]).strip().lower() in ("true", "false")
        if is_labelled and not _is_good(row):
            raise RowError("label is false: a rejected answer")
    if tools := as_tools(row.take("tools", "functions")):
        row.value["tools"] = tools
    try:
        json.dumps(row.value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        raise RowError("text that is not valid Unicode") from None
    row.changes = list(dict.fromkeys(row.changes))
    row.unread_keys = sorted(set(row.unread_keys))
    return row


def detect(columns: list[str], method: Method, where: str) -> str:
    """The name of the format of a data set with these columns."""
    have = set(columns)
    if found := _format(have, method):
        return found[0]
    other = _format(have, "dpo" if method == "sft" else "sft")
    what = f"{other[0]} rows" if other else f"columns {shown(', '.join(columns), 500)}"
    hint = mapping_hint(columns, method)
    if other and method == "sft":
        what, hint = "preference rows (chosen and rejected)", "Train on them with zephyr-lite dpo."
    elif method == "dpo" and (labelled := _format(have, "kto")):
        what = labelled[0]
        hint = "Train with zephyr-lite dpo loss_type=kto. Pair answers to the same prompt for other losses or eval preference."
    raise UserError(f"{where}: found {what}; {_NEEDS[method]}.", hint)


def mapping_hint(columns: list[str], method: Method) -> str:
    """The command-line words that map a data set's columns, with likely names filled in."""
    wanted = {}
    lower = {column.lower(): column for column in columns}
    names = ("prompt", "chosen", "rejected") if method == "dpo" else ("prompt", "completion", "label")
    for ours in names[: 2 if method == "sft" else 3]:
        if ours not in columns:
            wanted[ours] = next((lower[name] for name in (ours, *_LIKELY[ours]) if name in lower), "COLUMN")
    found = f"(found {shown(', '.join(columns), 500)})"
    if _format(set(columns), method) and set(wanted.values()) <= {"COLUMN"}:
        return f"If the columns mean something else, add dataset.columns.OURS=THEIRS {found}."
    words = " ".join(f"dataset.columns.{ours}={shown(theirs)}" for ours, theirs in wanted.items())
    return f"If the columns have other names, add {words} {found}."


def _format(have: set[str], method: Method) -> tuple[str, Callable[[Row], dict[str, Any]]] | None:
    """The name and the reader of the first format whose columns are there."""
    return next(((name, read) for columns, name, read in _FORMATS[method] if columns <= have), None)


# -- conversations -------------------------------------------------------------------------------------------------------


def _read_messages(row: Row, column: str) -> dict[str, Any]:
    messages = as_messages(row.take(column), column, row.unread_keys)
    if isinstance(row.values.get("prompt"), (str, list)):
        messages = [*_only_in_prompt(row, messages), *messages]
    return _conversation(row, messages, "instruction")


def _read_answer(row: Row, column: str) -> dict[str, Any]:
    prompt, answer = _prompt(row), _answer(row, column)
    if answer[0]["role"] == "assistant":
        _refuse_answered(prompt)
    return _conversation(row, [*prompt, *answer])


def _read_ultrachat(row: Row) -> dict[str, Any]:
    turns = row.take("data") or []
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise RowError("data is not a list of texts, the user's and the assistant's in turn")
    return _conversation(row, [message(("user", "assistant")[i % 2], as_text(t, "data")) for i, t in enumerate(turns)])


def _read_text(row: Row) -> dict[str, Any]:
    if isinstance(row.values["text"], list):  # conversations in a column that dataset_text_field named
        return _conversation(row, as_messages(row.take("text"), "text", row.unread_keys))
    text = as_text(row.take("text"), "text")
    if not text.strip():
        raise RowError("text is empty")
    return {"messages": [message(TEXT, text)]}


def _conversation(row: Row, messages: list[Message], *system_columns: str) -> dict[str, Any]:
    messages = _with_system(row, messages, *system_columns)
    _refuse_untrained(messages, "every answer")
    return {"messages": messages}


def _refuse_untrained(messages: list[Message], what: str) -> None:
    if not any(turn["role"] == "assistant" and turn.get("train", True) for turn in messages):
        raise RowError(f"{what} is marked as not to be trained")


# -- pairs ---------------------------------------------------------------------------------------------------------------


def _read_pair(row: Row) -> dict[str, Any]:
    has_prompt = row.holds(*_PROMPTS, "conversations", "messages") is not None
    opened = str(row.values.get("prompt") or "")
    if _OPEN_TRANSCRIPT.fullmatch(opened):  # chosen and rejected may be transcripts that begin with the prompt's
        has_prompt = not all(str(row.values[c]).strip().startswith(opened.strip()) for c in ("chosen", "rejected"))
    chosen, rejected = (_answer(row, c, is_transcript=not has_prompt) for c in ("chosen", "rejected"))
    # ultrafeedback_binarized and others repeat the conversation in both columns; the prompt column is then only its
    # first user turn
    repeats = [turns[0]["role"] != "assistant" for turns in (chosen, rejected)]
    if any(repeats) != all(repeats):
        raise RowError("one of chosen and rejected repeats the prompt, the other does not")
    prompt = _only_in_prompt(row, chosen) if all(repeats) else _prompt(row)
    if not any(repeats):
        if not prompt:
            raise RowError("no prompt: chosen and rejected hold answers only, and there is no prompt column")
        _refuse_answered(prompt)
    chosen, rejected = (_with_system(row, [*prompt, *turns]) for turns in (chosen, rejected))
    plain = [[{**turn, "train": None} for turn in turns] for turns in (chosen, rejected)]
    if plain[0] == plain[1]:
        raise RowError("chosen equals rejected")
    shorter = min(len(chosen), len(rejected))
    common = next((i for i, (a, b) in enumerate(zip(*plain)) if a != b), shorter)
    if common < shorter:
        roles = {chosen[common]["role"], rejected[common]["role"]}
        if len(roles) > 1:
            raise RowError("chosen and rejected differ in the order of their turns")
        if roles != {"assistant"}:
            raise RowError("chosen and rejected answer different prompts")
    else:  # one is the beginning of the other: the responses begin with the last answer that both have
        common = max((i for i in range(common) if chosen[i]["role"] == "assistant"), default=0)
    if common == 0:
        raise RowError("no prompt: chosen and rejected have no user turn in common")
    _refuse_untrained(chosen[common:], "every answer of chosen")
    _refuse_untrained(rejected[common:], "every answer of rejected")
    return {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def _read_labelled(row: Row, read: Callable[[Row], dict[str, Any]]) -> dict[str, Any]:
    """A conversation whose last answer has a label, as a pair of which one side is empty."""
    messages, good = read(row)["messages"], _is_good(row)
    start = max(i for i, turn in enumerate(messages) if turn["role"] in ("assistant", TEXT))
    if start == 0:
        raise RowError("no prompt before the answer")
    answer = messages[start:]
    _refuse_untrained(answer, "the last answer")
    return {"prompt": messages[:start], "chosen": answer if good else [], "rejected": [] if good else answer}


def _is_good(row: Row) -> bool:
    """The label of the last answer."""
    good = truth(row.take("label"))
    if good is None:
        raise RowError(f"label is {shown(row.values['label'], 40)}: expected true or false, or 1 or 0")
    return good


def _refuse_answered(prompt: list[Message]) -> None:
    """Refuse a prompt that ends with an answer: templates render neither two in a row nor the beginning of one."""
    if prompt and prompt[-1]["role"] == "assistant":
        raise RowError("the prompt ends with an assistant turn, which an answer cannot follow")


def _only_in_prompt(row: Row, turns: list[Message]) -> list[Message]:
    """The turns of the prompt column (a system turn, history) that come before those repeated in another column."""
    if not row.holds("prompt"):
        return []
    prompt = _prompt(row)
    before, after = ([(turn["role"], turn["content"].strip()) for turn in part] for part in (prompt, turns))
    for shared in range(min(len(prompt), len(turns)), 0, -1):
        if before[len(prompt) - shared :] == after[:shared]:
            return prompt[: len(prompt) - shared]
    if before[0] in after:  # after a system turn of the other column
        return []
    if all(role == "system" for role, _ in before) and after[0][0] != "system":
        return prompt
    row.read.discard("prompt")
    return []


_FORMATS: dict[Method, list[tuple[set[str], str, Callable[[Row], dict[str, Any]]]]] = {
    "sft": [
        ({"messages"}, TURNS["messages"], partial(_read_messages, column="messages")),
        ({"conversations"}, TURNS["conversations"], partial(_read_messages, column="conversations")),
        ({"conversation"}, TURNS["conversation"], partial(_read_messages, column="conversation")),
        ({"instruction", "output"}, "Alpaca", partial(_read_answer, column="output")),
        ({"prompt", "completion"}, "prompt and completion", partial(_read_answer, column="completion")),
        ({"data"}, "raw UltraChat", _read_ultrachat),
        ({"text"}, PLAIN, _read_text),
    ],
    "dpo": [
        ({"prompt", "chosen", "rejected"}, "preference pairs with a prompt column", _read_pair),
        ({"chosen", "rejected"}, "preference pairs", _read_pair),
    ],
}
_FORMATS["kto"] = _FORMATS["dpo"] + [
    ({*columns, "label"}, f"{name} with labels", partial(_read_labelled, read=read))
    for columns, name, read in _FORMATS["sft"]
]


# -- columns to messages -------------------------------------------------------------------------------------------------


def _prompt(row: Row) -> list[Message]:
    """The turns before the answer, from the first column that has them, after Alpaca's ``history`` of earlier [question,
    answer] pairs; [] if none has."""
    source = row.holds(*_PROMPTS) or next((column for column in _PROMPTS if row.values.get(column) is not None), None)
    if source is None:
        column = row.holds("conversations", "messages")
        return as_messages(row.take(column), column, row.unread_keys) if column else []
    value = row.take(source)
    if isinstance(value, (list, Mapping)):
        turns = as_messages(value, source, row.unread_keys)
    elif isinstance(value, str) and _OPEN_TRANSCRIPT.fullmatch(value):
        row.changes.append("the prompt is a transcript (Human: … Assistant:) and was split into turns")
        turns = _transcript(value)
    else:
        parts = [as_text(value, source), as_text(row.take("input"), "input") if source == "instruction" else ""]
        turns = [message("user", "\n\n".join(part for part in parts if part.strip()))]
    history = []
    for pair in listed(row.take("history"), "history pairs"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("history is not a list of [question, answer] pairs")
        history += [message("user", as_text(pair[0], "history")), message("assistant", as_text(pair[1], "history"))]
    return [*history, *turns]


def _answer(row: Row, column: str, *, is_transcript: bool = False) -> list[Message]:
    value = row.take(column)
    if isinstance(value, (list, Mapping)):
        return as_messages(value, column, row.unread_keys)
    text = as_text(value, column)
    match = _TRANSCRIPT.search(text) if is_transcript else None
    return _transcript(text) if match and not text[: match.start()].strip() else [message("assistant", text)]


def _transcript(text: str) -> list[Message]:
    """``\\n\\nHuman: … \\n\\nAssistant: …`` as turns, without an empty last one."""
    parts = _TRANSCRIPT.split(text)[1:]
    turns = [
        message("user" if who == "Human" else "assistant", said.strip()) for who, said in zip(parts[::2], parts[1::2])
    ]
    return turns[:-1] if len(turns) > 1 and not turns[-1]["content"] else turns


def _with_system(row: Row, messages: list[Message], *more_columns: str) -> list[Message]:
    """The turns up to the last answer, after one of the row's system column if they have no system turn.

    Raises:
        RowError: there is no answer, a turn is empty, or a system turn is not the first.
    """
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    roles = [turn["role"] for turn in messages]
    for column in ("system", "system_prompt", *more_columns):
        if "system" not in roles and (text := as_text(row.take(column), column)).strip():
            messages, roles = [message("system", text), *messages], ["system", *roles]
            if column in more_columns:
                row.changes.append(f"the column {column} was taken as the system turn")
    if "assistant" not in roles:
        raise RowError("no assistant turn")
    while roles[-1] != "assistant":
        last = roles.pop()
        messages = messages[:-1]
        row.changes.append(f"ended with {'the user' if last == 'user' else f'a {last} turn'}; the last turn was cut")
    for turn in messages:
        if not turn["content"].strip() and turn["role"] != "tool" and "tool_calls" not in turn:
            raise RowError("a turn without content")
    if "system" in roles[1:]:
        raise RowError("a system turn that is not the first")
    return messages
