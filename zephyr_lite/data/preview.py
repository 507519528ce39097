"""Examples as people look at them: token by token, with each one's text, position, role, and whether it is supervised.

Ids and masks are those of the prepared example; the messages only say which turn a token belongs to, and rendering them
again has to give the same ids.
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
        raw: the bytes that it stands for; a character may be spread over several tokens.
        position: what the model is told, from 0 in each conversation; a response's continue its prompt's.
        role: of the turn it belongs to, tags and end tokens included; ``template`` for what the template writes by
            itself before the first turn; several roles joined by "+" where the template does not tell turns apart.
        supervised: it is a target.
        special: a control token, or another that the tokenizer takes out of the text as a whole.
        completes: the character whose last bytes these are, where its first ones are in tokens before.
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
        """In visible characters: ␣ ⏎ ⇥ for space, newline and tab, \\x… for bytes that are no whole character, "=" and the
        character after its last ones, and \\u… for what cannot be seen."""
        text = "".join(_visible(char) for char in self.raw.decode("utf-8", "backslashreplace"))
        return text + (f"={_visible(self.completes)}" if self.completes else "")


@dataclass(frozen=True)
class Segment:
    """Tokens that a row holds in one run.

    Attributes:
        part: conversation, prompt, chosen or rejected.
        where: the place of the data row that it was made of.
        tokens: in order.
        cut_left, cut_right: how many tokens were cut to fit the budget.
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
    template: ChatTemplate, example: Example, messages: list[Message], tools: list[Any] | None = None
) -> Segment:
    """An SFT example.

    Args:
        template: the one that it was encoded with.
        example: as prepared, cut on its right perhaps.
        messages: the turns that it was made of.

    Raises:
        ValueError: these turns give other ids.
    """
    if messages[0]["role"] == TEXT:
        ids = template.text_ids(messages[0]["content"])
        roles = [TEXT] * len(ids)
    else:
        ids, roles = _ids_and_roles(template, messages, tools)
    _same(ids[: len(example.ids)], example.ids, example.where)
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
    """A preference pair: the prompt once, then both responses.

    Raises:
        ValueError: these turns give other ids.
    """
    whole = template.encode_pair(prompt, chosen, rejected, loss_on, tools)
    before, after = len(whole.prompt_ids), len(example.prompt_ids)
    kept = np.arange(before)
    if after < before:  # cut on its left; BOS stays
        first = 1 if template.bos_token_id is not None else 0
        kept = np.concatenate([kept[:first], kept[before - (after - first) :]])
    _same(whole.prompt_ids[kept], example.prompt_ids, example.where)
    segments: list[Segment] = []
    sides = (
        ("chosen", chosen, example.chosen_ids, example.chosen_mask),
        ("rejected", rejected, example.rejected_ids, example.rejected_mask),
    )
    for part, response, own_ids, mask in sides:
        turns = [*prompt, *response]
        ids, roles = _ids_and_roles(template, turns, tools)
        _same(ids[before : before + len(own_ids)], own_ids, example.where)
        if not segments:
            nothing = np.zeros(after, dtype=bool)
            head = _tokens(template, example.prompt_ids, nothing, [roles[i] for i in kept], 0)
            segments.append(Segment("prompt", example.where, head, cut_left=before - after))
        tokens = _tokens(template, own_ids, mask, roles[before:], after)
        segments.append(Segment(part, example.where, tokens, cut_right=len(ids) - before - len(own_ids)))
    return segments


def _same(ids: np.ndarray, prepared: np.ndarray, where: str) -> None:
    if not np.array_equal(ids, prepared):
        raise ValueError(f"{where}: its turns give other ids than it was prepared with")


def _tokens(template: ChatTemplate, ids: np.ndarray, mask: np.ndarray, roles: Sequence[str], first: int) -> list[Token]:
    read = token_reader(template.tokenizer)
    tokens = []
    begun = b""
    for place, (token, target, role) in enumerate(zip(ids, mask, roles)):
        raw, special = read(int(token))
        completes, begun = _continued(begun, raw)
        tokens.append(Token(int(token), raw, first + place, role, bool(target), special, completes))
    return tokens


def _continued(begun: bytes, raw: bytes) -> tuple[str, bytes]:
    """(the character that these bytes complete, or "", and the bytes of one that they leave unfinished)."""
    text = (begun + raw).decode("utf-8", "ignore")
    completes = text[:1] if begun and text and not raw.decode("utf-8", "ignore").startswith(text[:1]) else ""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    decoder.decode(begun + raw)
    return completes, decoder.getstate()[0]


# -- roles ---------------------------------------------------------------------------------------------------------------


def _ids_and_roles(
    template: ChatTemplate, messages: list[Message], tools: list[Any] | None
) -> tuple[np.ndarray, list[str]]:
    """ids [T] and each token's role, by the turn in which the token begins."""
    rendered = template.render(messages, tools)
    ids, starts, _ = template.tokenize(rendered)
    ends, names = _turn_ends(template, messages, tools, rendered.text)
    return ids, [names[min(bisect_right(ends, start), len(names) - 1)] for start in starts]


def _turn_ends(
    template: ChatTemplate, messages: list[Message], tools: list[Any] | None, text: str
) -> tuple[list[int], list[str]]:
    """Up to which character each turn goes, and its role. A turn whose end the template does not show (it refuses the
    turns up to there, or writes them otherwise) is one with the next."""
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
    """How many characters the template writes by itself before the first turn: BOS, and a system turn that no row asked
    for. A user turn later on has only its own: what the first one has beyond that is the template's."""
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
    """A function from an id to the bytes that it stands for, and whether it is special.

    Decoding tokens one by one with the tokenizer would lose SentencePiece's spaces and parts of characters. Bytes of all
    tokens in a row are the text, but for a space that SentencePiece puts before the first word.
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
    """The text of tokens in runs of equal supervision; together they are the row's text."""
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
    """The characters that byte-level tokenizers write for bytes: Latin-1's visible ones stand for themselves, the others
    follow from U+0100 on."""
    visible = [b for b in range(256) if 33 <= b <= 126 or (b >= 161 and b != 173)]
    hidden = [b for b in range(256) if b not in visible]
    return {**{chr(b): b for b in visible}, **{chr(256 + place): b for place, b in enumerate(hidden)}}


def _visible(char: str) -> str:
    if char in _SIGNS:
        return _SIGNS[char]
    # control characters would move the cursor, and those of format turn the direction or hide
    if unicodedata.category(char)[0] in "CZ":
        return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
    return char
