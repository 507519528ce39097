"""Conversation → token ids and the mask of supervised tokens.

A conversation is rendered as a whole by the chat template (``rendering``) and tokenized once; the mask follows from the tokens'
character offsets. Tokenizing turn by turn gives other ids (SentencePiece's differ on every conversation).
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import UserError
from .formats import TEXT
from .messages import Message, RowError
from .rendering import PROBE, Rendered, Renderer, common_length
from .templates import BOS, NEEDED_TOKENS, TEMPLATES, find_template

LossOn = Literal["assistant", "last", "all"]


@dataclass
class Example:
    """One conversation."""

    ids: np.ndarray  # [T] int32
    mask: np.ndarray  # [T] bool: the token is supervised, i.e. a target; never the first
    where: str  # "train.jsonl row 17"
    index: int  # its position in the data set, which identifies it in any batch


@dataclass
class PairExample:
    """One preference pair: prompt + chosen and prompt + rejected, with one copy of the prompt: the equal tokens of both texts
    that end before the first answer begins. Of an answer with a label (KTO) the other side has no tokens."""

    prompt_ids: np.ndarray  # [P] int32, P ≥ 1, never supervised
    chosen_ids: np.ndarray  # [C] int32
    chosen_mask: np.ndarray  # [C] bool
    rejected_ids: np.ndarray  # [R] int32
    rejected_mask: np.ndarray  # [R] bool
    where: str = ""
    index: int = -1


class Encoding(NamedTuple):
    """An encoded conversation of T tokens."""

    text: str
    ids: np.ndarray  # [T] int32
    mask: np.ndarray  # [T] bool: supervised
    starts: np.ndarray  # [T] int64, the character at which each token starts
    ends: np.ndarray  # [T] int64
    first: int  # the character at which the first answer after the prompt begins; 0 if there is none


class ChatTemplate(Renderer):
    """A tokenizer and the chat template that it is saved with; ``resolve_template`` makes one that was checked.

    Public methods raise ``RowError`` for a row that cannot be rendered or encoded faithfully.

    Attributes:
        tokenizer: a fast tokenizer; its ``chat_template`` is ``text``.
        text: the Jinja template.
        name: "zephyr", "the tokenizer's own", a file's name.
        now: the time for templates that write it; the same for all rows of a run.
        bos_token_id: the first token of every sequence; None if the model has none.
        block_end: </think>, if answers without reasoning follow an empty block that the generation prompt leaves out.
        notes: decisions on the way.
    """

    def __init__(self, tokenizer: Any, text: str, name: str, now: datetime.datetime | None = None) -> None:
        super().__init__(tokenizer, text, now or datetime.datetime.now().replace(microsecond=0))
        tokenizer.chat_template = text
        self.name = name
        self.bos_token_id: int | None = None
        self.block_end: int | None = None
        self.notes: list[str] = []

    def use(self, text: str) -> None:
        """Take another text that renders conversations as the present one does."""
        self.text = self.tokenizer.chat_template = text

    @property
    def reads_clock(self) -> bool:
        """Whether the text depends on ``now``."""
        return "strftime_now" in self.text

    @cached_property
    def end_token_ids(self) -> list[int]:
        """The tokens that end an answer; generation stops at them and at the tokenizer's eos."""
        ids, mask = self.encode(PROBE)
        return sorted(set(ids[mask & ~np.append(mask[1:], False)].tolist()))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the template and the tokenizer; equal fingerprints give equal ids."""
        parts = [self.text, self.tokenizer.backend_tokenizer.to_str(), str(self.bos_token_id)]
        parts += [f"{key}={value}" for key, value in sorted(self.tokenizer.special_tokens_map.items())]
        if self.reads_clock:
            parts.append(self.now.isoformat())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    # -- ids ---------------------------------------------------------------------------------------------------------

    def encode(
        self,
        messages: Sequence[Message],
        loss_on: LossOn = "assistant",
        tools: list[Any] | None = None,
        notes: list[str] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The conversation's ids and the mask of supervised ones.

        Args:
            messages: turns; the assistant's are supervised, unless they have ``train: False``. Or one plain text, which
                is supervised whole.
            loss_on: every answer, the last one, or every token but the first.
            tools: JSON schemas of the functions that may be called.
            notes: the notes of the rendering are added to it.

        Returns:
            ids [T] int32, mask [T] bool.

        Raises:
            RowError: as ``render``; a turn's text contains a control token; or BOS does not come first, once.
        """
        if messages[0]["role"] == TEXT:
            ids = self.text_ids(messages[0]["content"])
            return ids, np.arange(len(ids)) > 0
        encoding = self.encoding(messages, loss_on, tools, notes)
        return encoding.ids, encoding.mask

    def text_ids(self, text: str) -> np.ndarray:
        """The ids of a plain text as TRL makes them, [T] int32: with BOS first and eos last, unless the text has them. It
        may contain other control tokens."""
        eos, bos = self.tokenizer.eos_token, self.tokenizer.bos_token if self.bos_token_id is not None else None
        text = text if text.endswith(eos) else text + eos
        has_bos = bos is not None and text.startswith(bos)
        ids = self.tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"]
        if bos is not None and ids[0] != self.bos_token_id:  # the tokenizer leaves BOS to the template
            ids = [self.bos_token_id, *ids]
        return self._checked_bos(np.asarray(ids, dtype=np.int32))

    def encode_pair(
        self,
        prompt: Sequence[Message],
        chosen: Sequence[Message],
        rejected: Sequence[Message],
        loss_on: LossOn = "assistant",
        tools: list[Any] | None = None,
        notes: list[str] | None = None,
    ) -> PairExample:
        """The ids of a preference pair, as ``encode``; answers in the prompt are never supervised. ``chosen`` or ``rejected`` may
        be []."""
        both = (chosen or rejected, rejected or chosen)
        a, b = (self.encoding([*prompt, *turns], loss_on, tools, notes, len(prompt)) for turns in both)
        shorter = min(len(a.ids), len(b.ids))
        shared = (a.ids[:shorter] == b.ids[:shorter]) & (a.ends[:shorter] <= min(a.first, b.first))
        length = shorter if shared.all() else int(np.argmin(shared))
        if length == 0:
            raise RowError("no token of the prompt is the same before both answers")
        c, r = (slice(length, None if turns else length) for turns in (chosen, rejected))
        return PairExample(a.ids[:length], a.ids[c], a.mask[c], b.ids[r], b.mask[r])

    def encoding(
        self,
        messages: Sequence[Message],
        loss_on: LossOn = "assistant",
        tools: list[Any] | None = None,
        notes: list[str] | None = None,
        prompt: int = 0,
    ) -> Encoding:
        """The encoding of turns, of which the first ``prompt`` are not supervised. Answers without supervision are tokenized
        as part of the context, as at inference."""
        self._refuse_control_tokens(messages)
        rendered = self.render(messages, tools)
        if notes is not None:
            notes += rendered.notes
        first, last = 0, max(rendered.spans, default=0)
        for turn, span in list(rendered.spans.items()):
            if turn >= prompt:
                first = first or span.start
            if turn < prompt or not messages[turn].get("train", True) or (loss_on == "last" and turn != last):
                del rendered.spans[turn]
        if prompt and not first:
            raise RowError("no supervised token")
        ids, starts, ends = self._tokenize(rendered)
        mask = np.full(len(ids), loss_on == "all")
        for span in rendered.spans.values():
            mask |= (starts >= span.start) & (starts < span.end)
        for turn, message in enumerate(messages):
            if loss_on == "all" and not message.get("train", True):
                texts = [self.text_of(messages[:count], tools=tools) for count in (turn, turn + 1)]
                begin, end = (common_length(rendered.text, text) for text in texts)
                mask[(starts >= begin) & (starts < end)] = False
        mask &= starts >= first if prompt else np.arange(len(ids)) > 0  # nothing predicts the first token
        return Encoding(rendered.text, ids, mask, starts, ends, first)

    def prompt_ids(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> np.ndarray:
        """The ids of the turns and the generation prompt, [P] int32; ``variables`` besides the template's own."""
        self._refuse_control_tokens(messages)
        asked = copy.copy(self)
        asked.variables = {**self.variables, **(variables or {})}
        return self._tokenize(Rendered(asked.text_of(messages, True)))[0]

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            calls = json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
            if match := self.control_tokens.search(
                f"{message['content']}\0{message.get('reasoning_content', '')}\0{calls}"
            ):
                raise RowError(f"a turn's text contains the control token {match.group()}")

    def _tokenize(self, rendered: Rendered) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids [T] int32 and the characters [T] at which each token starts and ends.

        The prompt of each answer has the same ids as at inference: a token over its end and the answer's beginning (a
        space and a word) is split.
        """
        text = rendered.text
        ids, starts, ends = self._offsets(text)
        crossed = []
        for border, _ in rendered.spans.values():
            crosses = bool(((starts < border) & (ends > border)).any())
            if not crosses and text[border - 1 : border] == " ":
                # byte-level tokenizers may join a space to a word without showing it in the offsets
                crosses = not np.array_equal(self._offsets(text[:border])[0], ids[ends <= border])
            if crosses:
                crossed.append(border)
        if crossed:
            borders = list(pairwise([0, *crossed, len(text)]))
            pieces = [self._offsets(text[first:last], continued=first > 0) for first, last in borders]
            ids = np.concatenate([piece[0] for piece in pieces])
            starts, ends = (
                np.concatenate([piece[i] + first for (first, _), piece in zip(borders, pieces)]) for i in (1, 2)
            )
        return self._checked_bos(ids), starts, ends

    def _offsets(self, text: str, continued: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tokens of a text, perhaps ``continued`` from another one, without special tokens: the template writes BOS."""
        try:
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except BaseException as error:
            # a panic in Rust is not an Exception: a regular expression of tokenizer.json that backtracks too far
            if type(error).__name__ != "PanicException":
                raise
            raise RowError(f"the tokenizer fails on it: {' '.join(str(error).split())[:200]}") from None
        ids = np.asarray(encoding["input_ids"], dtype=np.int32)
        # three times as fast as an array of the pairs
        offsets = np.fromiter(chain.from_iterable(encoding["offset_mapping"]), dtype=np.int64, count=2 * len(ids))
        starts, ends = offsets[::2], offsets[1::2]
        if continued and text[:1] != " " and len(ids) and self.tokenizer.convert_ids_to_tokens(int(ids[0]))[0] == "▁":
            # SentencePiece puts a space before the first word of a text, but not after a newline
            ids, starts, ends = self._offsets("\n" + text)
            inside = ends > 1
            return ids[inside], starts[inside] - 1, ends[inside] - 1
        return ids, starts, ends

    def _checked_bos(self, ids: np.ndarray) -> np.ndarray:
        bos = self.bos_token_id
        if bos is not None and (len(ids) == 0 or ids[0] != bos or (ids[:2] == bos).all()):
            raise RowError("the row does not begin with BOS, once")
        return ids


def resolve_template(choice: str, tokenizer: Any, now: datetime.datetime | None = None) -> ChatTemplate:
    """Choose a chat template, set it on the tokenizer, and check that it can be trained on.

    Args:
        choice: ``auto`` (the tokenizer's own, or Zephyr's if it has none), ``zephyr``, ``chatml``, ``llama3``, or a
            Jinja file.
        tokenizer: a fast tokenizer with an eos token.
        now: the time for templates that write it; default: the current one.

    Raises:
        UserError: no such template; a tokenizer without offsets or without the template's tokens; a template that fails
            on a plain conversation, has no end token after an answer, ignores ``add_generation_prompt``, or writes BOS
            twice at the beginning.
    """
    own = tokenizer.chat_template
    name, text = find_template(choice, own.get("default") if isinstance(own, dict) else own)
    what = f"chat template {name}"
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise UserError(
            f"{what}: the tokenizer ({type(tokenizer).__name__}) gives no character offsets, or has no eos token.",
            "Use a model folder with a tokenizer.json, whose tokenizer_config.json names an eos_token.",
        )
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in NEEDED_TOKENS.get(name, ()) if token not in vocabulary]:
        raise UserError(
            f"{what}: the tokenizer does not know {', '.join(missing)} as one token.",
            "Choose chat_template: zephyr, which needs no token but eos.",
        )
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos_id]
    template = ChatTemplate(tokenizer, text if adds_bos or name not in TEMPLATES else text.removeprefix(BOS), name, now)
    try:
        try:
            rendered = template.render(PROBE)
        except RowError as error:
            template.content_parts = True  # templates of vision models read lists of parts only
            try:
                rendered = template.render(PROBE)
            except RowError:
                raise error from None
        probe, span = rendered.text, rendered.spans[3]
        opening = probe[span.start : probe.find(PROBE[3]["content"], span.start)]
        if opening.strip() and template.text_of(PROBE[:1]) == template.text_of(PROBE[:1], True):
            raise RowError(
                f"it ignores add_generation_prompt, so that an answer would begin with its own tag {opening!r}"
            )
        prompt = template.text_of(PROBE[:3], True)
        if probe.startswith(prompt) and probe[len(prompt) : span.start].strip():
            template.block_end = vocabulary.get("</think>")
            template.notes.append(
                f"{what}: answers without reasoning follow an empty block of reasoning, which the generation prompt has "
                "with enable_thinking=false"
            )
        if adds_bos and not probe.startswith(bos):
            # the tokenizer writes BOS, and servers that render the template do not
            template.use(BOS + text)
            probe = bos + probe
            template.notes.append(f"{what} writes no BOS, the tokenizer does: {BOS} was put in front")
        # Llama 3's tokenizer leaves BOS to the template; a BOS before each turn, as ChatML's, is a turn's tag
        if adds_bos or (bos and probe.startswith(bos) and probe.count(bos) == 1):
            template.bos_token_id = bos_id if bos_id != tokenizer.eos_token_id else None  # OPT has one token for both
        ends = template.end_token_ids
    except RowError as error:
        raise UserError(
            f"{what}: cannot be trained on: {error}.",
            "Choose zephyr, chatml or llama3, or change the template.",
        ) from None
    if tokenizer.eos_token_id not in ends:
        words = ", ".join(tokenizer.convert_ids_to_tokens(ends))
        template.notes.append(
            f"{what}: answers end with {words}, which is not the tokenizer's eos {tokenizer.eos_token}"
        )
    return template
