"""A conversation → token ids and the mask of what is supervised.

The conversation is rendered once, and the characters of each answer are recorded; the whole text is tokenized once;
the mask follows from the tokens' character offsets. Tokenizing turn by turn gives other ids (SentencePiece's differ
on every conversation), and looking for a tag's tokens in the ids can mask everything, since a tag's tokens depend on
what stands before it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateSyntaxError

from ..errors import UserError
from ..strict_json import shown
from .formats import TEXT, Message, RowError
from .template_render import Renderer, own_template
from .template_trial import ADDED, LONGEST_TEMPLATE, REPEATED, is_own, reason, texts_of, try_template
from .templates import BOS, NEEDED_TOKENS, TEMPLATES

# Characters of a conversation; a tokenizer takes some 350 bytes a character in the worst case.
LONGEST_ROW = 2**21

LossOn = Literal["assistant", "last", "all"]

_REWRITES = "the chat template rewrites earlier turns when later ones are added"

_OTHER = "Choose zephyr, chatml or llama3, or change the template."

# What a template must render without a surprise before any row is read.
_PROBE: list[Message] = [
    {"role": "user", "content": "question one"},
    {"role": "assistant", "content": "answer one"},
    {"role": "user", "content": "question two"},
    {"role": "assistant", "content": "answer two"},
]


@dataclass
class Example:
    """One conversation.

    Attributes:
        ids: [T] int32.
        mask: [T] bool, the token is supervised, i.e. a target; never the first.
        where: "train.jsonl row 17".
        index: its position in the data set, its identity wherever it is batched.
    """

    ids: np.ndarray
    mask: np.ndarray
    where: str
    index: int


@dataclass
class PairExample:
    """One preference pair: prompt + chosen and prompt + rejected, the prompt held once.

    ``prompt_ids`` are the tokens that are equal in both texts and lie wholly in the prompt's. Where the tokenizer
    merged across the prompt's end, the merged token is the first of each response, and unsupervised.

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


class Span(NamedTuple):
    """Characters ``start:end`` of a text: an answer with its end token, from after the generation prompt."""

    start: int
    end: int


class Pair(NamedTuple):
    """The arrays of a ``PairExample``."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    chosen_mask: np.ndarray
    rejected_ids: np.ndarray
    rejected_mask: np.ndarray


class ChatTemplate:
    """A tokenizer and the chat template that it is saved with.

    Made by ``resolve_template``, which also checks it. Public methods raise ``RowError`` where one row cannot be
    rendered or encoded faithfully.

    Attributes:
        tokenizer: a fast tokenizer; its ``chat_template`` is ``text``.
        text: the Jinja template.
        name: what was chosen: "zephyr", "the tokenizer's own", a file's name.
        bos_token_id: the token that every sequence starts with, exactly once; None where the model has none.
        notes: what was decided on the way.
    """

    def __init__(self, tokenizer: Any, text: str, name: str, bos_token_id: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.name = name
        self.bos_token_id = bos_token_id
        self.notes: list[str] = []
        tokens = tokenizer.special_tokens_map
        self._tokens = texts_of(tokens)
        self._renderer = None if is_own(text) else Renderer(text, _whence(name, tokenizer), tokens)
        tokenizer.chat_template = text

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Every text that the tokenizer turns into a control token, wherever it stands."""
        added = self.tokenizer.added_tokens_decoder.values()
        scaffold = self._apply(_PROBE, False)
        words = set(self.tokenizer.all_special_tokens)
        words |= {token.content for token in added if token.special or token.content in scaffold}
        return re.compile("|".join(re.escape(word) for word in sorted(words, key=lambda w: (-len(w), w)) if word))

    @cached_property
    def end_token_ids(self) -> list[int]:
        """The tokens that end an answer: what generation must stop at, beside the tokenizer's own eos."""
        text, spans = self.render(_PROBE)
        ids, mask = self._tokenize(text, spans, "assistant")
        last = [i for i in range(len(ids)) if mask[i] and (i + 1 == len(ids) or not mask[i + 1])]
        return sorted({int(ids[i]) for i in last})

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the template and of the tokenizer: equal fingerprints give equal ids."""
        parts = [self.text, self.tokenizer.backend_tokenizer.to_str(), str(self.bos_token_id)]
        parts += [f"{key}={value}" for key, value in sorted(self.tokenizer.special_tokens_map.items())]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    # -- text ----------------------------------------------------------------------------------------------------

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The conversation's text, and the characters of each answer in it.

        An answer starts where the generation prompt of the turns before it ends; its span includes its end token and
        nothing after that. A greeting before the first user turn answers nothing, and has no span.

        Raises:
            RowError: the template refuses the turns, rewrites earlier ones, or gives an answer no end token.
        """
        text = self._render(messages, add_generation_prompt)
        roles = [message["role"] for message in messages]
        answers = [turn for turn, role in enumerate(roles) if role == "assistant" and "user" in roles[:turn]]
        return text, [self._span(messages, turn, text) for turn in answers]

    def _span(self, messages: list[Message], turn: int, text: str) -> Span:
        before = self._render(messages[:turn], True)
        upto = self._render(messages[: turn + 1], False)
        if not (text.startswith(before) and text.startswith(upto) and len(before) <= len(upto)):
            raise RowError(_REWRITES)
        ends = [match.end() for match in self._control.finditer(text, len(before), len(upto))]
        if not ends:
            raise RowError("the chat template writes no end token after an answer")
        return Span(len(before), ends[-1])

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            return self._apply(messages, add_generation_prompt)
        except (MemoryError, RowError, UserError):
            raise
        except Exception as error:  # a template adds numbers to text, or asks a list for a key
            raise RowError(f"the chat template refuses the row: {reason(error)}") from None

    def _apply(self, messages: list[Message], add_generation_prompt: bool) -> str:
        content = sum(len(message["content"]) for message in messages)
        if content > LONGEST_ROW:
            raise RowError(f"longer than {LONGEST_ROW:,} characters, the most that a row may have")
        if self._renderer is None:
            # a quarter of the time that apply_chat_template takes, which copies every turn first
            return own_template(self.text).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._tokens
            )
        most = ADDED + min(REPEATED * content, LONGEST_ROW)  # the trial saw other rows than this one
        try:
            return self._renderer.render(messages, add_generation_prompt, most)
        except ValueError as error:
            raise RowError(f"the chat template makes {error} of {content:,}") from None

    def _refuse_control_tokens(self, messages: list[Message]) -> None:
        for message in messages:
            if match := self._control.search(message["content"]):
                raise RowError(f"a turn's text contains the control token {match.group()}")

    # -- ids -----------------------------------------------------------------------------------------------------

    def encode(self, messages: list[Message], loss_on: LossOn = "assistant") -> tuple[np.ndarray, np.ndarray]:
        """The conversation's ids and which of them are supervised.

        Args:
            messages: turns; those of the assistant are supervised. Or one plain text, which is supervised whole.
            loss_on: every answer, the last one, or every token but the first.

        Returns:
            ids [T] int32, mask [T] bool.

        Raises:
            RowError: as ``render``; a turn's text contains a control token, which would become a real one; or BOS
                does not stand exactly once.
        """
        if messages[0]["role"] == TEXT:
            ids = self.text_ids(messages[0]["content"])
            return ids, np.arange(len(ids)) > 0
        self._refuse_control_tokens(messages)
        text, spans = self.render(messages)
        return self._tokenize(text, spans, loss_on)

    def text_ids(self, text: str) -> np.ndarray:
        """The ids of a plain text as TRL makes them, [T] int32: BOS once, first, and eos at the end. A text that was
        rendered already may hold both, and other control tokens.

        Raises:
            RowError: BOS is not there exactly once.
        """
        eos, bos = self.tokenizer.eos_token, self.tokenizer.bos_token if self.bos_token_id is not None else None
        text = text if text.endswith(eos) else text + eos
        begun = bos is not None and text.startswith(bos)
        ids = np.asarray(self.tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"], dtype=np.int32)
        if bos is not None and ids[0] != self.bos_token_id:  # tokenizers that leave BOS to the template
            ids = np.concatenate([np.asarray([self.bos_token_id], dtype=np.int32), ids])
        self._check_bos(ids)
        return ids

    def encode_pair(
        self, prompt: list[Message], chosen: list[Message], rejected: list[Message], loss_on: LossOn = "assistant"
    ) -> Pair:
        """The ids of a preference pair; the prompt's own answers are never supervised.

        Raises:
            RowError: as ``encode``.
        """
        self._refuse_control_tokens([*prompt, *chosen, *rejected])
        head = self._render(prompt, True)
        sides = []
        for response in (chosen, rejected):
            text, spans = self.render([*prompt, *response])
            if not text.startswith(head):
                raise RowError(_REWRITES)
            ids, starts, ends = self._offsets(text)
            mask = self._mask(starts, [s for s in spans if s.start >= len(head)], loss_on)
            if loss_on == "all":
                mask &= starts >= len(head)
            sides.append((ids, mask, ends))
        (a, a_mask, a_ends), (b, b_mask, _) = sides
        shorter = min(len(a), len(b))
        shared = (a[:shorter] == b[:shorter]) & (a_ends[:shorter] <= len(head))
        length = int(np.argmin(shared)) if not shared.all() else shorter
        if length == 0:
            raise RowError("no token of the prompt is the same before both answers")
        return Pair(a[:length], a[length:], a_mask[length:], b[length:], b_mask[length:])

    def prompt_ids(self, messages: list[Message]) -> np.ndarray:
        """The ids that generation starts from: the turns and the generation prompt, [P] int32."""
        self._refuse_control_tokens(messages)
        return self._offsets(self._render(messages, True))[0]

    def _tokenize(self, text: str, spans: list[Span], loss_on: LossOn) -> tuple[np.ndarray, np.ndarray]:
        ids, starts, _ = self._offsets(text)
        return ids, self._mask(starts, spans, loss_on)

    def _offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids [T] int32 and the characters [T] at which each token starts and ends."""
        # the template writes BOS itself
        try:
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except (
            BaseException
        ) as error:  # a panic in Rust (a regex of tokenizer.json that backtracks too far) is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise RowError(f"the tokenizer fails on it: {' '.join(str(error).split())[:200]}") from None
        ids = np.asarray(encoding["input_ids"], dtype=np.int32)
        # a third of the time that an array of the pairs takes
        offsets = np.fromiter(chain.from_iterable(encoding["offset_mapping"]), dtype=np.int64, count=2 * len(ids))
        self._check_bos(ids)
        return ids, offsets[::2], offsets[1::2]

    def _check_bos(self, ids: np.ndarray) -> None:
        if self.bos_token_id is not None:
            count = int((ids == self.bos_token_id).sum())
            if len(ids) == 0 or ids[0] != self.bos_token_id or count != 1:
                raise RowError(f"BOS stands {count} times in the row, not once at its beginning")

    @staticmethod
    def _mask(starts: np.ndarray, spans: list[Span], loss_on: LossOn) -> np.ndarray:
        if loss_on == "all":
            mask = np.ones(len(starts), dtype=bool)
        else:
            mask = np.zeros(len(starts), dtype=bool)
            for span in spans[-1:] if loss_on == "last" else spans:
                # a token that begins before the answer holds a part of the prompt: the model never has to write it
                mask |= (starts >= span.start) & (starts < span.end)
        mask[:1] = False  # nothing predicts the first token
        return mask


def resolve_template(choice: str, tokenizer: Any) -> ChatTemplate:
    """Choose a chat template, set it on the tokenizer, and check that its rows can be trained on.

    Args:
        choice: ``auto`` (the tokenizer's own, Zephyr's where it has none), ``zephyr``, ``chatml``, ``llama3``, or a
            Jinja file.
        tokenizer: a fast tokenizer with an eos token.

    Raises:
        UserError: no such template; a tokenizer without offsets or without the tokens that the template writes; a
            template that its trial (``template_trial``) ended, that cannot be rendered, rewrites earlier turns, has no end
            token after an answer, ignores ``add_generation_prompt``, or writes BOS twice.
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
    try_template(text, _whence(name, tokenizer), tokenizer.special_tokens_map)
    notes = []
    adds_bos = _adds_bos(tokenizer)
    if name in TEMPLATES and not adds_bos:
        text = text.removeprefix(BOS)
    template = ChatTemplate(tokenizer, text, name)
    probe = _probe(template, what)
    if not adds_bos:
        bos = tokenizer.bos_token
        if bos and probe.startswith(bos) and probe.count(bos) == 1:
            adds_bos = True  # tokenizers such as Llama 3's leave BOS to the template
    elif not probe.startswith(tokenizer.bos_token):
        # the tokenizer begins every text with BOS, and a server takes the template's word for it
        template = ChatTemplate(tokenizer, BOS + text, name)
        probe = _probe(template, what)
        notes.append(f"{what} writes no BOS, the tokenizer does: {BOS} was put in front")
    if adds_bos:
        bos_ids = (np.asarray(tokenizer(probe, add_special_tokens=False)["input_ids"]) == tokenizer.bos_token_id).sum()
        if tokenizer.bos_token_id == tokenizer.eos_token_id:
            adds_bos = False  # OPT's: the same token ends each turn, so that it cannot be counted
        elif bos_ids != 1:
            raise UserError(f"{what}: writes BOS {bos_ids} times in one conversation.", "It must stand once, first.")
    template.bos_token_id = tokenizer.bos_token_id if adds_bos else None
    if tokenizer.eos_token_id not in template.end_token_ids:
        ends = ", ".join(tokenizer.convert_ids_to_tokens(template.end_token_ids))
        notes.append(f"{what}: answers end with {ends}, which is not the tokenizer's eos {tokenizer.eos_token}")
    template.notes = notes
    return template


def _choose(choice: str, tokenizer: Any) -> tuple[str, str]:
    if choice == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        return ("the tokenizer's own", own) if own else ("zephyr", TEMPLATES["zephyr"])
    if choice in TEMPLATES:
        return choice, TEMPLATES[choice]
    if "{%" in choice or "{{" in choice:  # the alignment handbook's YAML files spell it out
        return "of the configuration", choice
    path = Path(choice)
    try:
        path = path.expanduser()
        found = path.is_file()
    except (OSError, RuntimeError):  # no name that a file or a user can have
        found = False
    if not found:
        raise UserError(
            f"chat_template {shown(repr(choice), 200)}: neither a template's name nor a file.",
            f"Choose auto, {', '.join(TEMPLATES)}, or a .jinja file.",
        )
    try:
        if (size := path.stat().st_size) > 4 * LONGEST_TEMPLATE:
            raise UserError(f"chat_template {choice}: is {size:,} bytes long, and no template.")
        return str(choice), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template {choice}: cannot be read: {error}.", "Save the template in UTF-8.") from None


def _whence(name: str, tokenizer: Any) -> str:
    """What a template is, and where it comes from."""
    folder = str(getattr(tokenizer, "name_or_path", "")) if name == "the tokenizer's own" else ""
    return f"chat template {name} ({folder})" if folder else f"chat template {name}"


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _probe(template: ChatTemplate, what: str) -> str:
    """The text of a plain conversation, after every check that does not need real rows."""
    try:
        text = template._apply(_PROBE, False)
        plain, prompt = (template._apply(_PROBE[:1], add) for add in (False, True))
    except TemplateSyntaxError as error:
        raise UserError(f"{what} line {error.lineno}: {error.message}.") from None
    except RowError as error:
        raise UserError(f"{what}: {error}.", _OTHER) from None
    except (MemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{what}: fails on a plain conversation of two turns: {reason(error)}.", _OTHER) from None
    try:
        spans = template.render(_PROBE)[1]
    except RowError as error:
        raise UserError(f"{what}: cannot be trained on: {error}.", _OTHER) from None
    for span, message in zip(spans, _PROBE[1::2]):
        place = text.find(message["content"], span.start, span.end)
        if place < 0:
            raise UserError(f"{what}: does not write the assistant's text as it is.")
        if plain == prompt and text[span.start : place].strip():
            raise UserError(
                f"{what}: ignores add_generation_prompt, so that an answer would begin with its own tag "
                f"{text[span.start : place]!r}.",
                "End the template with {% if add_generation_prompt %}…{% endif %}.",
            )
    return text
