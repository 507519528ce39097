"""Examples token by token, for people: each token's text, position, role, and whether it is supervised.

Ids and masks are those of the prepared example; its messages are rendered again only for the roles.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .chat_template import ChatTemplate, Example, LossOn, PairExample
from .formats import TEXT, Message, RowError

TEMPLATE_ROLE = "template"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Token:
    """One token of a row.

    Attributes:
        id: in the vocabulary.
        raw: its bytes; the bytes of a character may be in several tokens.
        position: the model's position, from 0 in each conversation; a response continues its prompt.
        role: of its turn, tags and end tokens included; ``template`` for the template's own text before the first turn;
            roles joined by "+" if the template does not separate the turns.
        supervised: it is a target.
        special: a control token, or another added token.
        completes: the character that these bytes complete, if it begins in an earlier token.
    """

    id: int
    raw: bytes
    position: int
    role: str
    supervised: bool
    special: bool
    completes: str = ""

    @property
    def text(self) -> str:
        """In visible characters: ␣ ⏎ ⇥ for space, newline and tab, \\x… for bytes of an incomplete character, "=" and the
        character after its last bytes, and \\u… for invisible characters."""
        text = "".join(_visible(char) for char in self.raw.decode("utf-8", "backslashreplace"))
        return text + (f"={_visible(self.completes)}" if self.completes else "")


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a row.

    Attributes:
        part: conversation, prompt, chosen or rejected.
        where: the place of the data row.
        tokens: in order.
        cut_left, cut_right: tokens cut to fit the budget.
    """

    part: str
    where: str
    tokens: list[Token]
    cut_left: int = 0
    cut_right: int = 0

    @property
    def supervised(self) -> int:
        return sum(token.supervised for token in self.tokens)


def conversation_segment(
    template: ChatTemplate,
    example: Example,
    messages: list[Message],
    loss_on: LossOn = "assistant",
    tools: list[Any] | None = None,
) -> Segment:
    """An SFT example.

    Args:
        template: the one that it was encoded with.
        example: as prepared, perhaps cut on its right.
        messages: its turns.
    """
    if messages[0]["role"] == TEXT:
        ids = template.text_ids(messages[0]["content"])
        roles = [TEXT] * len(ids)
    else:
        ids, roles = _ids_and_roles(template, messages, loss_on, tools)
    assert np.array_equal(ids[: len(example.ids)], example.ids), example.where
    tokens = _tokens(template, example.ids, example.mask, roles, 0)
    return Segment("conversation", example.where, tokens, cut_right=len(ids) - len(example.ids))


def pair_segments(
    template: ChatTemplate,
    example: PairExample,
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    loss_on: LossOn = "assistant",
    tools: list[Any] | None = None,
) -> list[Segment]:
    """A preference pair: the prompt once, then both responses."""
    before = len(template.encode_pair(prompt, chosen, rejected, loss_on, tools).prompt_ids)
    after = len(example.prompt_ids)
    kept = np.arange(before)
    if after < before:  # cut on its left, except BOS
        first = 1 if template.bos_token_id is not None else 0
        kept = np.concatenate([kept[:first], kept[before - (after - first) :]])
    segments: list[Segment] = []
    sides = (
        ("chosen", chosen, example.chosen_ids, example.chosen_mask),
        ("rejected", rejected, example.rejected_ids, example.rejected_mask),
    )
    for part, response, own_ids, mask in sides:
        ids, roles = _ids_and_roles(template, [*prompt, *response], loss_on, tools, len(prompt))
        assert np.array_equal(ids[kept], example.prompt_ids), example.where
        assert np.array_equal(ids[before : before + len(own_ids)], own_ids), example.where
        if not segments:
            unsupervised = np.zeros(after, dtype=bool)
            tokens = _tokens(template, example.prompt_ids, unsupervised, [roles[i] for i in kept], 0)
            segments.append(Segment("prompt", example.where, tokens, cut_left=before - after))
        tokens = _tokens(template, own_ids, mask, roles[before:], after)
        segments.append(Segment(part, example.where, tokens, cut_right=len(ids) - before - len(own_ids)))
    return segments


def _tokens(template: ChatTemplate, ids: np.ndarray, mask: np.ndarray, roles: Sequence[str], first: int) -> list[Token]:
    read = token_reader(template.tokenizer)
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    tokens = []
    for position, (token, target, role) in enumerate(zip(ids, mask, roles), first):
        raw, special = read(int(token))
        begun, text = decoder.getstate()[0], decoder.decode(raw)
        completes = text[:1] if begun and text and not raw.decode("utf-8", "ignore").startswith(text[:1]) else ""
        tokens.append(Token(int(token), raw, position, role, bool(target), special, completes))
    return tokens


# -- roles ---------------------------------------------------------------------------------------------------------------


def _ids_and_roles(
    template: ChatTemplate, messages: list[Message], loss_on: LossOn, tools: list[Any] | None, prompt: int = 0
) -> tuple[np.ndarray, list[str]]:
    """ids [T] and each token's role: that of the turn in which the token begins."""
    encoding = template.encoding(messages, loss_on, tools, prompt=prompt)
    ends, names = _turn_ends(template, messages, tools, encoding.text)
    return encoding.ids, [names[min(bisect_right(ends, start), len(names) - 1)] for start in encoding.starts]


def _turn_ends(
    template: ChatTemplate, messages: list[Message], tools: list[Any] | None, text: str
) -> tuple[list[int], list[str]]:
    """The character at which each turn ends, and its role. A turn is joined with the next one if the template refuses the
    turns up to its end, or writes them differently."""
    ends, names, waiting = [], [], []
    if own := _own_prefix(template, messages, text):
        ends, names = [own], [TEMPLATE_ROLE]
    for turn, message in enumerate(messages, 1):
        waiting.append(message["role"])
        try:
            upto = text if turn == len(messages) else template.text_of(messages[:turn], tools=tools)
        except RowError:
            continue
        if text.startswith(upto):
            ends.append(len(upto))
            names.append("+".join(dict.fromkeys(waiting)))
            waiting = []
    return ends, names


def _own_prefix(template: ChatTemplate, messages: list[Message], text: str) -> int:
    """The number of characters that the template writes before the first turn: BOS and a default system turn. They are
    the text that the first user turn has and the same turn further on does not."""
    bos = template.tokenizer.bos_token if template.bos_token_id is not None else ""
    own = len(bos) if bos and text.startswith(bos) else 0
    first = messages[0]
    if first["role"] != "user":
        return own
    try:
        alone = template.text_of([first])
        before = template.text_of([first, {"role": "assistant", "content": "a"}])
        again = template.text_of([first, {"role": "assistant", "content": "a"}, first])
    except RowError:
        return own
    turn = again.removeprefix(before)
    if len(turn) == len(again) or not alone.endswith(turn) or not text.startswith(alone):
        return own
    return max(own, len(alone) - len(turn))


# -- text ----------------------------------------------------------------------------------------------------------------


def token_reader(tokenizer: Any) -> Callable[[int], tuple[bytes, bool]]:
    """A function from an id to its bytes, and whether it is special.

    A tokenizer that decodes tokens one by one loses SentencePiece's spaces and parts of characters. The bytes of a text's
    tokens are the text, after a space that SentencePiece puts before the first word.
    """
    backend = tokenizer.backend_tokenizer.to_str()
    decoders = set(re.findall(r'"type":\s*"(\w+)"', json.dumps(json.loads(backend).get("decoder"))))
    by_char = _byte_level_alphabet() if "ByteLevel" in decoders else {}
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids)

    def read(token: int) -> tuple[bytes, bool]:
        if token in added:
            return added[token].content.encode(), token in special or added[token].special
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"[{token}]".encode(), token in special
        if by_char and all(char in by_char for char in piece):
            return bytes(by_char[char] for char in piece), token in special
        if "ByteFallback" in decoders and (match := _BYTE.fullmatch(piece)):
            return bytes([int(match.group(1), 16)]), token in special
        return piece.replace("▁", " ").encode(), token in special

    return read


def text_runs(
    tokenizer: Any, ids: Sequence[int] | np.ndarray, mask: Sequence[bool] | np.ndarray
) -> list[tuple[str, bool]]:
    """The text of tokens as runs of equal supervision."""
    read = token_reader(tokenizer)
    runs: list[tuple[bytes, bool]] = []
    for token, supervised in zip(map(int, ids), map(bool, mask)):
        raw = read(token)[0]
        if runs and runs[-1][1] == supervised:
            runs[-1] = (runs[-1][0] + raw, supervised)
        else:
            runs.append((raw, supervised))
    return [(raw.decode("utf-8", "replace"), supervised) for raw, supervised in runs]


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes: Latin-1's visible ones for themselves, then U+0100 and up
    for the others."""
    visible = [b for b in range(256) if 33 <= b <= 126 or (b >= 161 and b != 173)]
    hidden = [b for b in range(256) if b not in visible]
    return {**{chr(b): b for b in visible}, **{chr(256 + place): b for place, b in enumerate(hidden)}}


def _visible(char: str) -> str:
    if char in _SIGNS:
        return _SIGNS[char]
    # control and format characters would move the cursor or change the direction
    if unicodedata.category(char)[0] in "CZ":
        return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
    return char
