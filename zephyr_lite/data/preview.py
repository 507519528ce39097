"""Examples token by token, for people: each token's text, position, role, and whether it is supervised.

Ids and masks are those of the prepared example; its row is rendered again only for the roles.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .chat_template import ChatTemplate, Example, LossOn, PairExample
from .formats import TEXT
from .messages import Message, RowError

TEMPLATE_ROLE = "template"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Token:
    """One token of a row."""

    id: int
    raw: bytes  # the bytes of a character may be in several tokens
    special: bool  # a control token, or another added token
    position: int  # the model's, from 0 in each conversation; a response continues its prompt
    # of its turn, tags and end tokens included; ``template`` for the template's own text before the first turn; roles joined
    # by "+" if the template does not separate the turns
    role: str
    supervised: bool  # it is a target

    @property
    def text(self) -> str:
        """In visible characters: ␣ ⏎ ⇥ for space, newline and tab, \\x… for bytes of an incomplete character, and \\u… for
        invisible characters."""
        return "".join(_visible(char) for char in self.raw.decode("utf-8", "backslashreplace"))


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a row."""

    part: str  # conversation, prompt, chosen or rejected
    where: str  # the place of the data row
    tokens: list[Token]
    cut_left: int = 0  # tokens cut to fit the budget
    cut_right: int = 0

    @property
    def supervised(self) -> int:
        return sum(token.supervised for token in self.tokens)


def example_segments(
    template: ChatTemplate, example: Example | PairExample, row: dict[str, Any], loss_on: LossOn = "assistant"
) -> list[Segment]:
    """The segments of a prepared example: its conversation; or a pair's prompt, once, and both responses.

    Args:
        template: the one that it was encoded with.
        example: as prepared, perhaps cut.
        row: the normalised row that it was made of.
    """
    where, tools = example.where, row.get("tools")
    if isinstance(example, Example):
        ids, roles = _ids_and_roles(template, row["messages"], loss_on, tools)
        tokens = _tokens(template, example.ids, example.mask, roles, 0)
        return [Segment("conversation", where, tokens, cut_right=len(ids) - len(example.ids))]
    before = len(template.encode_pair(row["prompt"], row["chosen"], row["rejected"], loss_on, tools).prompt_ids)
    after = len(example.prompt_ids)
    first = int(template.bos_token_id is not None)  # a prompt is cut on its left, after BOS
    segments: list[Segment] = []
    for part in (name for name in ("chosen", "rejected") if row[name]):
        ids, roles = _ids_and_roles(template, [*row["prompt"], *row[part]], loss_on, tools, len(row["prompt"]))
        own_ids, mask = getattr(example, f"{part}_ids"), getattr(example, f"{part}_mask")
        if not segments:
            kept = roles[:first] + roles[before - after + first : before]
            tokens = _tokens(template, example.prompt_ids, np.zeros(after, bool), kept, 0)
            segments.append(Segment("prompt", where, tokens, cut_left=before - after))
        tokens = _tokens(template, own_ids, mask, roles[before:], after)
        segments.append(Segment(part, where, tokens, cut_right=len(ids) - before - len(own_ids)))
    return segments


def _tokens(template: ChatTemplate, ids: np.ndarray, mask: np.ndarray, roles: Sequence[str], first: int) -> list[Token]:
    """Tokens with their bytes, of which the first has the position ``first``.

    A tokenizer that decodes tokens one by one loses SentencePiece's spaces and parts of characters. The bytes of a text's
    tokens are the text, after a space that SentencePiece puts before the first word.
    """
    tokenizer = template.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    decoders = set(re.findall(r'"type":\s*"(\w+)"', json.dumps(backend.get("decoder"))))
    by_char = {char: byte for byte, char in bytes_to_unicode().items()} if "ByteLevel" in decoders else {}
    added = tokenizer.added_tokens_decoder
    tokens = []
    for position, (token, target, role) in enumerate(zip(ids.tolist(), mask.tolist(), roles), first):
        piece, special = tokenizer.convert_ids_to_tokens(token), False
        if token in added:
            raw, special = piece.encode(), token in tokenizer.all_special_ids or added[token].special
        elif by_char and all(char in by_char for char in piece):
            raw = bytes(by_char[char] for char in piece)
        elif "ByteFallback" in decoders and (match := _BYTE.fullmatch(piece)):
            raw = bytes([int(match.group(1), 16)])
        else:
            raw = piece.replace("▁", " ").encode()
        tokens.append(Token(token, raw, special, position, role, target))
    return tokens


# -- roles ---------------------------------------------------------------------------------------------------------------


def _ids_and_roles(
    template: ChatTemplate, messages: list[Message], loss_on: LossOn, tools: list[Any] | None, prompt: int = 0
) -> tuple[np.ndarray, list[str]]:
    """ids [T] and each token's role: that of the turn in which the token begins. A turn is joined with the next one if the
    template refuses the turns up to its end, or writes them differently."""
    if messages[0]["role"] == TEXT:
        ids = template.text_ids(messages[0]["content"])
        return ids, [TEXT] * len(ids)
    encoding = template.encoding(messages, loss_on, tools, prompt=prompt)
    own = _own_prefix(template, messages, encoding.text)
    ends, names, waiting = ([own], [TEMPLATE_ROLE], []) if own else ([], [], [])
    for turn, message in enumerate(messages, 1):
        waiting.append(message["role"])
        try:
            upto = encoding.text if turn == len(messages) else template.text_of(messages[:turn], tools=tools)
        except RowError:
            continue
        if encoding.text.startswith(upto):
            ends.append(len(upto))
            names.append("+".join(dict.fromkeys(waiting)))
            waiting = []
    return encoding.ids, [names[min(bisect_right(ends, start), len(names) - 1)] for start in encoding.starts]


def _own_prefix(template: ChatTemplate, messages: list[Message], text: str) -> int:
    """The number of characters that the template writes before the first turn: BOS and a default system turn. They are
    the text that the first user turn has and the same turn further on does not."""
    bos = template.tokenizer.bos_token if template.bos_token_id is not None else ""
    own = len(bos) if text.startswith(bos) else 0
    first, answer = messages[0], {"role": "assistant", "content": "a"}
    if first["role"] != "user":
        return own
    alone, before, again = (template.text_of(turns) for turns in ([first], [first, answer], [first, answer, first]))
    turn = again[len(before) :]
    is_repeated = again.startswith(before) and alone.endswith(turn) and text.startswith(alone)
    return max(own, len(alone) - len(turn)) if is_repeated else own


# -- text ----------------------------------------------------------------------------------------------------------------


def _visible(char: str) -> str:
    if unicodedata.category(char)[0] in "CZ":  # would move the cursor or change the direction
        return _SIGNS.get(char, f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}")
    return char
