"""The first pass: everything that can be said of a row alone, and what is needed to compare it with others.

A block of rows at a time, and blocks do not depend on how many processes there are: neither does anything that is found.
"""

from __future__ import annotations

import hashlib
import signal
from dataclasses import dataclass
from typing import Any

import datasets
import multiprocess
import numpy as np
import pyarrow as pa

from ...data.opening import Source
from .casing import broken
from .contamination import EvalSets
from .counting import count_words
from .english import is_english
from .near import bands_of, signatures
from .raw import Dialogue, dialogues
from .refusals import first_refusal
from .words import Words, joined, words_of

BLOCK = 500  # rows
SIDES = ("user", "assistant")  # bit 0 and bit 1 of ``broken``

_SCHEMA = pa.schema(
    {
        "fault": pa.string(),  # the reason for which the row is left out, or ""
        "detail": pa.string(),  # more about the fault or the cut
        "turns": pa.int32(),  # how many turns stay
        "refusal": pa.string(),  # the rule by which it was cut, or ""
        "broken": pa.uint8(),  # which sides' capitals are restored
        "words": pa.int32(),
        "prompt_hash": pa.uint64(),
        "exact": pa.binary(16),
        "bands": pa.binary(128),
        "signature": pa.binary(256),
        "lexicon": pa.binary(),  # the block's counts, in its first row
    }
)
# datasets knows no binary of a fixed length
STORED = pa.schema(
    [pa.field(f.name, pa.binary() if pa.types.is_fixed_size_binary(f.type) else f.type) for f in _SCHEMA]
)
FEATURES = datasets.Features.from_arrow_schema(STORED)


@dataclass(frozen=True)
class ScanRules:
    """What the first pass decides by.

    Attributes:
        refusals: cut dialogues before an answer that dodges.
        truecase: look for broken capitals, and count how words are written.
        learn: whether a lexicon is to be learned.
        near: whether signatures are needed.
        min_turns, min_words, max_words: of a dialogue after the cut; None for no limit.
    """

    refusals: bool = True
    truecase: bool = True
    learn: bool = True
    near: bool = True
    min_turns: int = 2
    min_words: int | None = None
    max_words: int | None = None


def scan_block(rows: Source, start: int, stop: int, rules: ScanRules, sets: EvalSets, learn: bool = True) -> pa.Table:
    """Look at rows start:stop; a table with a row for each (``STORED``). ``learn``: count this block's words."""
    found = dialogues(rows, slice(start, stop))
    count = len(found)
    details, refusals = [""] * count, [""] * count
    if rules.refusals:
        for index, dialogue in enumerate(found):
            _cut(index, dialogue, details, refusals)
    for dialogue in found:
        if not dialogue.fault and len(dialogue.texts) - (dialogue.roles[0] == "system") < rules.min_turns:
            dialogue.fault = f"fewer than {rules.min_turns} turns"
    flat = [text for dialogue in found for text in dialogue.texts]
    groups = np.concatenate(([0], np.cumsum([len(dialogue.texts) for dialogue in found])))
    words = words_of(flat)
    per_row = joined(words, groups)
    lengths = np.diff(per_row.offsets)
    for index, dialogue in enumerate(found):
        if dialogue.fault:
            continue
        if rules.min_words is not None and lengths[index] < rules.min_words:
            dialogue.fault, details[index] = f"shorter than {rules.min_words} words", f"{lengths[index]} words"
        elif rules.max_words is not None and lengths[index] > rules.max_words:
            dialogue.fault, details[index] = f"longer than {rules.max_words} words", f"{lengths[index]} words"
    for text, (name, shared) in sorted(sets.find(words).items(), reverse=True):
        index = int(np.searchsorted(groups, text, side="right")) - 1
        if not found[index].fault or found[index].fault.startswith("overlaps"):
            found[index].fault, details[index] = f"overlaps with {name}", shared
    bits = _broken(found) if rules.truecase else np.zeros(count, np.uint8)
    marks = signatures(words, groups) if rules.near else np.zeros((count, 128), np.uint16)
    prompts = ["" if d.fault else d.texts[d.roles.index("user")] for d in found]
    columns: dict[str, Any] = {
        "fault": [dialogue.fault for dialogue in found],
        "detail": details,
        "turns": np.array([len(dialogue.texts) for dialogue in found], np.int32),
        "refusal": refusals,
        "broken": bits,
        "words": lengths.astype(np.int32),
        "prompt_hash": np.array([prompt_hash(prompt) for prompt in prompts], np.uint64),
        "exact": [_digest(dialogue) for dialogue in found],
        "bands": _binary(bands_of(marks)),
        "signature": _binary(marks),
        "lexicon": [None] * count,
    }
    if rules.truecase and rules.learn and learn:
        columns["lexicon"][0] = _learn(found, bits, per_row)
    return pa.table({name: pa.array(columns[name], STORED.field(name).type) for name in STORED.names}, STORED)


def _binary(values: np.ndarray) -> pa.Array:
    width = values.shape[1] * values.itemsize
    data = np.ascontiguousarray(values).tobytes()
    offsets = np.arange(len(values) + 1, dtype=np.int32) * width
    return pa.Array.from_buffers(pa.binary(), len(values), [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(data)])


def prompt_hash(prompt: str) -> int:
    """The first 64 bits of the prompt's SHA-256: by it the test split is drawn."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")


def _digest(dialogue: Dialogue) -> bytes:
    """Equal for dialogues that differ in case and in white space at the turns' ends at most."""
    text = "\0".join([*dialogue.roles, *(text.strip() for text in dialogue.texts)])
    return hashlib.blake2b(text.lower().encode(), digest_size=16).digest()


def _cut(index: int, dialogue: Dialogue, details: list[str], refusals: list[str]) -> None:
    """Take the dodging answer away, its question, and what comes after."""
    dodge = first_refusal(dialogue.roles, dialogue.texts)
    if dodge is None:
        return
    place, rule, start, end = dodge
    text = dialogue.texts[place]
    details[index] = " ".join(text[max(0, start - 20) : end + 80].split())
    refusals[index] = rule
    while place and dialogue.roles[place - 1] != "assistant":
        place -= 1
    dialogue.roles, dialogue.texts = dialogue.roles[:place], dialogue.texts[:place]
    if "assistant" not in dialogue.roles:
        dialogue.fault = f"begins with a refusal ({rule})"


def _broken(found: list[Dialogue]) -> np.ndarray:
    sides = [
        [text for text, role in zip(d.texts, d.roles) if role == side] if not d.fault else []
        for d in found
        for side in SIDES
    ]
    flags = np.array(broken(sides), np.uint8).reshape(-1, 2)
    return flags[:, 0] | (flags[:, 1] << 1)


def _learn(found: list[Dialogue], bits: np.ndarray, words: Words) -> bytes:
    """How the well-written English dialogues of the block write words; ``words``: of each dialogue as one text."""
    trusted = np.array([not d.fault and not b and is_english(d.texts[-1]) for d, b in zip(found, bits)], bool)
    return count_words(words, trusted).pack()


def stop_quietly() -> None:
    """In a worker of ``datasets.map``: Ctrl-C reaches all processes. An error lets the worker remove what it was writing,
    and goes to the parent, which is being interrupted itself; a KeyboardInterrupt would print a traceback."""
    if multiprocess.parent_process() is not None:
        signal.signal(signal.SIGINT, _stop)


def _stop(*_: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise RuntimeError("interrupted")


def scan(batch: pa.Table, *, rows: Source, rules: ScanRules, sets: EvalSets) -> pa.Table:
    """``scan_block`` as a function for ``datasets.map`` over a table of blocks (start, stop)."""
    stop_quietly()
    tables = [
        scan_block(rows, start, stop, rules, sets, learn)
        for start, stop, learn in zip(*(batch[name].to_pylist() for name in ("start", "stop", "learn")))
    ]
    return pa.concat_tables(tables)
