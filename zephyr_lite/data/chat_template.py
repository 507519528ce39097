"""Conversation → token ids and the mask of supervised tokens.

``rendering`` gives the text and the spans of its answers. The text is tokenized once, and the mask follows from the
tokens' character offsets. Tokenizing turn by turn gives other ids (SentencePiece's differ on every conversation).
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateSyntaxError

from ..errors import UserError
from ..io.text import is_file, read_text, shown
from .formats import TEXT, Message, RowError
from .rendering import PROBE, Rendered, Renderer, common_length
from .templates import BOS, NEEDED_TOKENS, TEMPLATES

LossOn = Literal["assistant", "last", "all"]

_OTHER = "Choose zephyr, chatml or llama3, or change the template."


@dataclass
class Example:
    """One conversation.

    Attributes:
        ids: [T] int32.
        mask: [T] bool, the token is supervised, i.e. a target; never the first.
        where: "train.jsonl row 17".
        index: its position in the data set, which identifies it in any batch.
    """

    ids: np.ndarray
    mask: np.ndarray
    where: str
    index: int


@dataclass
class PairExample:
    """One preference pair: prompt + chosen and prompt + rejected, with one copy of the prompt.

    ``prompt_ids`` are the equal tokens of both texts that end before the first answer begins.

    Attributes:
        prompt_ids: [P] int32, P ≥ 1, never supervised.
        chosen_ids, chosen_mask: [C] int32 and bool.
        rejected_ids, rejected_mask: [R] int32 and bool.
        where, index: as in ``Example``.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    chosen_mask: np.ndarray
    rejected_ids: np.ndarray
    rejected_mask: np.ndarray
    where: str
    index: int


class Pair(NamedTuple):
    """The arrays of a ``PairExample``."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    chosen_mask: np.ndarray
    rejected_ids: np.ndarray
    rejected_mask: np.ndarray


class Encoding(NamedTuple):
    """An encoded conversation.

    Attributes:
        text: of the template.
        ids: [T] int32.
        mask: [T] bool, supervised tokens.
        starts, ends: [T] int64, characters at which each token starts and ends.
        first: the character at which the first answer after the prompt begins; 0 if there is none.
    """

    text: str
    ids: np.ndarray
    mask: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    first: int


class ChatTemplate(Renderer):
    """A tokenizer and the chat template that it is saved with, checked by ``resolve_template``.

    Public methods raise ``RowError`` for a row that cannot be rendered or encoded faithfully.

    Attributes:
        name: "zephyr", "the tokenizer's own", a file's name.
        bos_token_id: the first token of every sequence; None if the model has none.
        repeats_bos: the template writes BOS before later turns too.
        notes: decisions on the way.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: str,
        name: str,
        bos_token_id: int | None = None,
        now: datetime.datetime | None = None,
    ) -> None:
        super().__init__(tokenizer, text, now)
        self.name = name
        self.bos_token_id = bos_token_id
        self.repeats_bos = False
        self.notes: list[str] = []

    @cached_property
    def end_token_ids(self) -> list[int]:
        """The tokens that end an answer; generation stops at them and at the tokenizer's eos."""
        ids, mask = self.encode(PROBE)
        return sorted({int(ids[i]) for i in range(len(ids)) if mask[i] and not mask[i + 1 : i + 2].any()})

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the template and the tokenizer; equal fingerprints give equal ids."""
        parts = [self.text, self.tokenizer.backend_tokenizer.to_str(), str(self.bos_token_id)]
        parts += [f"{key}={value}" for key, value in sorted(self.tokenizer.special_tokens_map.items())]
        if self.reads_clock:
            parts.append(self.now.isoformat())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

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
            tools: as for ``render``.
            notes: the notes of the rendering are added to it.

        Returns:
            ids [T] int32, mask [T] bool.

        Raises:
            RowError: as ``render``; a turn's text contains a control token; or BOS does not occur exactly once.
        """
        if messages[0]["role"] == TEXT:
            ids = self.text_ids(messages[0]["content"])
            return ids, np.arange(len(ids)) > 0
        encoding = self.encoding(messages, loss_on, tools, notes)
        return encoding.ids, encoding.mask

    def text_ids(self, text: str) -> np.ndarray:
        """The ids of a plain text as TRL makes them, [T] int32: with BOS first and eos last, unless the text has them. It
        may contain other control tokens.

        Raises:
            RowError: BOS does not occur exactly once.
        """
        eos, bos = self.tokenizer.eos_token, self.tokenizer.bos_token if self.bos_token_id is not None else None
        text = text if text.endswith(eos) else text + eos
        begun = bos is not None and text.startswith(bos)
        ids = np.asarray(self.tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"], dtype=np.int32)
        if bos is not None and ids[0] != self.bos_token_id:  # the tokenizer leaves BOS to the template
            ids = np.concatenate([np.asarray([self.bos_token_id], dtype=np.int32), ids])
        self._check_bos(ids)
        return ids

    def encode_pair(
        self,
        prompt: Sequence[Message],
        chosen: Sequence[Message],
        rejected: Sequence[Message],
        loss_on: LossOn = "assistant",
        tools: list[Any] | None = None,
        notes: list[str] | None = None,
    ) -> Pair:
        """The ids of a preference pair; answers in the prompt are never supervised.

        Args:
            notes: the notes of both renderings are added to it.

        Raises:
            RowError: as ``encode``.
        """
        a, b = (
            self.encoding([*prompt, *response], loss_on, tools, notes, len(prompt)) for response in (chosen, rejected)
        )
        shorter = min(len(a.ids), len(b.ids))
        shared = (a.ids[:shorter] == b.ids[:shorter]) & (a.ends[:shorter] <= min(a.first, b.first))
        length = int(np.argmin(shared)) if not shared.all() else shorter
        if length == 0:
            raise RowError("no token of the prompt is the same before both answers")
        return Pair(a.ids[:length], a.ids[length:], a.mask[length:], b.ids[length:], b.mask[length:])

    def encoding(
        self,
        messages: Sequence[Message],
        loss_on: LossOn = "assistant",
        tools: list[Any] | None = None,
        notes: list[str] | None = None,
        prompt: int = 0,
    ) -> Encoding:
        """The encoding of turns, of which the first ``prompt`` are not supervised.

        Answers without supervision are tokenized as part of the context, as at inference.

        Raises:
            RowError: as ``encode``; or no turn after the prompt is an answer.
        """
        self._refuse_control_tokens(messages)
        rendered = self.render(messages, tools)
        if notes is not None:
            notes += rendered.notes
        first = min((span.start for turn, span in rendered.spans.items() if turn >= prompt), default=0)
        if prompt and not first:
            raise RowError("no supervised token")
        turns = list(rendered.spans)[-1:] if loss_on == "last" else list(rendered.spans)
        turns = [turn for turn in turns if turn >= prompt and messages[turn].get("train", True)]
        rendered.spans = {turn: rendered.spans[turn] for turn in turns}
        ids, starts, ends = self.tokenize(rendered)
        mask = np.full(len(ids), loss_on == "all")
        for span in rendered.spans.values():
            mask |= (starts >= span.start) & (starts < span.end)
        for turn in [i for i, message in enumerate(messages) if loss_on == "all" and not message.get("train", True)]:
            begin, end = (
                common_length(rendered.text, self.text_of(messages[:count], tools=tools)) for count in (turn, turn + 1)
            )
            mask[(starts >= begin) & (starts < end)] = False
        mask &= starts >= first if prompt else np.arange(len(ids)) > 0  # nothing predicts the first token
        return Encoding(rendered.text, ids, mask, starts, ends, first)

    def prompt_ids(self, messages: Sequence[Message], tools: list[Any] | None = None) -> np.ndarray:
        """The ids of the turns and the generation prompt, [P] int32."""
        self._refuse_control_tokens(messages)
        return self.tokenize(Rendered(self.text_of(messages, True, tools)))[0]

    def tokenize(self, rendered: Rendered) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids [T] int32 and the characters [T] at which each token starts and ends.

        The prompt of each answer has the same ids as at inference: a token over its end and the answer's beginning (a
        space and a word) is split.
        """
        text = rendered.text
        ids, starts, ends = self._offsets(text)
        crossed = [
            border
            for border, _ in rendered.spans.values()
            if ((starts < border) & (ends > border)).any()
            # byte-level tokenizers may join a space to a word without showing it in the offsets
            or (
                text[border - 1 : border] == " "
                and not np.array_equal(self._offsets(text[:border])[0], ids[ends <= border])
            )
        ]
        if crossed:
            pieces = [
                (first, self._offsets(text[first:second], continued=first > 0))
                for first, second in pairwise([0, *crossed, len(text)])
            ]
            ids = np.concatenate([piece[0] for _, piece in pieces])
            starts, ends = (np.concatenate([piece[i] + first for first, piece in pieces]) for i in (1, 2))
        self._check_bos(ids)
        return ids, starts, ends

    def _offsets(self, text: str, continued: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        try:  # without special tokens: the template writes BOS
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
        spaced = (
            continued and text[:1] != " " and len(ids) and self.tokenizer.convert_ids_to_tokens(int(ids[0]))[0] == "▁"
        )
        if spaced:
            # SentencePiece puts a space before the first word of a text, but not after a newline
            ids, starts, ends = self._offsets("\n" + text)
            inside = ends > 1
            return ids[inside], starts[inside] - 1, ends[inside] - 1
        return ids, starts, ends

    def _check_bos(self, ids: np.ndarray) -> None:
        if self.bos_token_id is None:
            return
        count = int((ids == self.bos_token_id).sum())
        doubled = len(ids) > 1 and ids[1] == self.bos_token_id
        if len(ids) == 0 or ids[0] != self.bos_token_id or doubled or (count > 1 and not self.repeats_bos):
            raise RowError(f"BOS occurs {count} times in the row, not once at its beginning")


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
    name, text = _choose(choice, tokenizer)
    what = f"chat template {name}"
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{what}: the tokenizer is {type(tokenizer).__name__}, which gives no character offsets.",
            "Use a model folder with a tokenizer.json, or one whose tokenizer transformers can convert.",
        )
    if tokenizer.eos_token is None:
        raise UserError(
            f"{what}: the tokenizer has no eos token, so answers could not end.",
            "Name one as eos_token in its tokenizer_config.json.",
        )
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in NEEDED_TOKENS.get(name, ()) if token not in vocabulary]:
        raise UserError(
            f"{what}: the tokenizer does not know {', '.join(missing)} as one token.",
            "Choose chat_template: zephyr, which needs no token but eos.",
        )
    if not isinstance(text, str):
        raise UserError(f"{what}: is a {type(text).__name__}, not text.", _OTHER)
    notes = []
    adds_bos = _adds_bos(tokenizer)
    if name in TEMPLATES and not adds_bos:
        text = text.removeprefix(BOS)
    template = ChatTemplate(tokenizer, text, name, now=now)
    probe = _probe(template, what)
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if not adds_bos:
        # Llama 3's tokenizer leaves BOS to the template; a BOS before each turn, as ChatML's, is a turn's tag
        adds_bos = bool(bos) and probe.startswith(bos) and probe.count(bos) == 1
    elif not probe.startswith(bos):
        # the tokenizer writes BOS, and servers that render the template do not
        parts = template.content_parts
        template = ChatTemplate(tokenizer, BOS + text, name, now=now)
        template.content_parts = parts
        probe = _probe(template, what)
        notes.append(f"{what} writes no BOS, the tokenizer does: {BOS} was put in front")
    if adds_bos and bos_id != tokenizer.eos_token_id:  # OPT has one token for both
        ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if ids[:2] == [bos_id, bos_id]:
            raise UserError(f"{what}: writes BOS twice at the beginning.", "It must be written once, first.")
        template.repeats_bos = ids.count(bos_id) > 1
        template.bos_token_id = bos_id
    if tokenizer.eos_token_id not in template.end_token_ids:
        ends = ", ".join(tokenizer.convert_ids_to_tokens(template.end_token_ids))
        notes.append(f"{what}: answers end with {ends}, which is not the tokenizer's eos {tokenizer.eos_token}")
    template.notes = notes
    return template


def _choose(choice: str, tokenizer: Any) -> tuple[str, Any]:
    if choice == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        return ("the tokenizer's own", own) if own else ("zephyr", TEMPLATES["zephyr"])
    if choice in TEMPLATES:
        return choice, TEMPLATES[choice]
    if "{%" in choice or "{{" in choice:  # in the alignment handbook's YAML files
        return "of the configuration", choice
    path = Path(os.path.expanduser(choice))
    if not is_file(path):
        raise UserError(
            f"chat_template {shown(repr(choice), 200)}: neither a template's name nor a file.",
            f"Choose auto, {', '.join(TEMPLATES)}, or a .jinja file.",
        )
    return choice, read_text(path, name=f"chat_template {choice}")


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _probe(template: ChatTemplate, what: str) -> str:
    """The text of a plain conversation, after the checks that need no rows."""
    try:
        try:
            rendered = template.render(PROBE)
        except RowError as error:
            if template.content_parts:
                raise
            template.content_parts = True  # templates of vision models read lists of parts only
            try:
                rendered = template.render(PROBE)
            except RowError:
                raise error from None
        plain, prompt = (template.text_of(PROBE[:1], add) for add in (False, True))
    except TemplateSyntaxError as error:
        raise UserError(f"{what} line {error.lineno}: {error.message}.") from None
    except RowError as error:
        raise UserError(f"{what}: cannot be trained on: {error}.", _OTHER) from None
    text, span = rendered.text, rendered.spans[3]
    opening = text[span.start : text.find(PROBE[3]["content"], span.start)]
    if plain == prompt and opening.strip():
        raise UserError(
            f"{what}: ignores add_generation_prompt, so that an answer would begin with its own tag {opening!r}.",
            "End the template with {% if add_generation_prompt %}…{% endif %}.",
        )
    return text
