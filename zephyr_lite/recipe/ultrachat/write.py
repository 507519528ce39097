"""The second pass: the rows that stay, their capitals restored, written shard by shard."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...data.opening import Source
from .casing import restore
from .lexicon import Lexicon
from .raw import Dialogue, dialogues
from .scan import SIDES, stop_quietly

Format = Literal["parquet", "jsonl"]
# Rows of a file. It depends on nothing but the rows, so that the files do not depend on the number of processes.
SHARD_ROWS = 12_500
EXAMPLES = 3
_BATCH = 1000
_ROUND = 40  # characters shown around an example's change

MESSAGE = pa.struct({"content": pa.string(), "role": pa.string()})
SCHEMA = pa.schema({"prompt": pa.string(), "prompt_id": pa.string(), "messages": pa.list_(MESSAGE)})
STATS = datasets.Features({"stats": datasets.Value("string")})


@dataclass
class Restored:
    """What truecasing did: counts by rule, and the first examples of each.

    Attributes:
        rows, turns: written.
        dialogues: in how many of them something was changed.
        words: rule → words changed.
        examples: rule → (row, before, after), the first few.
    """

    rows: int = 0
    turns: int = 0
    dialogues: int = 0
    words: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)

    def add(self, other: Restored) -> None:
        self.rows += other.rows
        self.turns += other.turns
        self.dialogues += other.dialogues
        self.words.update(other.words)
        for rule, found in other.examples.items():
            mine = self.examples.setdefault(rule, [])
            mine += found[: EXAMPLES - len(mine)]

    def to_json(self) -> str:
        return json.dumps([self.rows, self.turns, self.dialogues, self.words, self.examples])

    @classmethod
    def from_json(cls, text: str) -> Restored:
        rows, turns, changed, words, examples = json.loads(text)
        return cls(rows, turns, changed, Counter(words), {k: [tuple(e) for e in v] for k, v in examples.items()})


def shards_of(split: str, rows: int, suffix: str) -> list[tuple[str, int, int]]:
    """(file name, first, end) of each file of a split, in the hub's naming."""
    count = -(-rows // SHARD_ROWS)
    if count <= 1:
        return [(f"{split}.{suffix}", 0, rows)] if rows else []
    each = -(-rows // count)
    return [(f"{split}-{n:05d}-of-{count:05d}.{suffix}", n * each, min(rows, (n + 1) * each)) for n in range(count)]


def restore_dialogue(dialogue: Dialogue, bits: int, lexicon: Lexicon | None, index: int, stats: Restored) -> None:
    """Restore the capitals of the sides whose bit is set, in place."""
    any_change = False
    for place, (role, text) in enumerate(zip(dialogue.roles, dialogue.texts)):
        if role not in SIDES or not bits >> SIDES.index(role) & 1:
            continue
        after, changes = restore(text, lexicon)
        for start, rule, _ in changes:
            stats.words[rule] += 1
            examples = stats.examples.setdefault(rule, [])
            if len(examples) < EXAMPLES:
                where = slice(max(0, start - _ROUND), start + _ROUND)
                examples.append((index, text[where], after[where]))
        any_change |= bool(changes)
        dialogue.texts[place] = after
    stats.dialogues += any_change


def to_table(found: Sequence[Dialogue]) -> pa.Table:
    """Dialogues as rows of the hub's schema: prompt, prompt_id (its SHA-256), messages."""
    prompts = [dialogue.texts[dialogue.roles.index("user")] for dialogue in found]
    ids = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts]
    texts = pa.array([text for dialogue in found for text in dialogue.texts], pa.string())
    roles = pa.array([role for dialogue in found for role in dialogue.roles], pa.string())
    offsets = pa.array(np.concatenate(([0], np.cumsum([len(d.texts) for d in found]))), pa.int32())
    turns = pa.StructArray.from_arrays([texts, roles], fields=list(MESSAGE))
    return pa.table(
        [pa.array(prompts, pa.string()), pa.array(ids), pa.ListArray.from_arrays(offsets, turns)], schema=SCHEMA
    )


def write_shard(
    batch: pa.Table,
    *,
    rows: Source,
    scanned: datasets.Dataset,
    folder: str,
    kept: dict[str, str],
    lexicon: Lexicon | None,
) -> pa.Table:
    """Write files; a function for ``datasets.map`` over a table of shards (split, name, first, end).

    Args:
        rows: the raw rows.
        scanned: what the first pass said of them.
        folder: where the files go.
        kept: split → a file with its rows' numbers, int64.
        lexicon: of names, decided; None to leave capitals alone.

    Returns:
        ``Restored`` of each shard, as JSON.
    """
    stop_quietly()
    stats = []
    arrow = scanned.select_columns(["turns", "broken"]).with_format("arrow")
    for shard in batch.to_pylist():
        numbers = np.load(kept[shard["split"]], mmap_mode="r")[shard["first"] : shard["end"]]
        done = Restored()
        with _Sink(Path(folder) / shard["name"]) as sink:
            for start in range(0, len(numbers), _BATCH):
                indices = numbers[start : start + _BATCH].tolist()
                found = dialogues(rows, indices)
                said = arrow[indices]
                turns, bits = said["turns"].to_numpy(), said["broken"].to_numpy()
                for index, dialogue, count, bit in zip(indices, found, turns.tolist(), bits.tolist()):
                    dialogue.roles, dialogue.texts = dialogue.roles[:count], dialogue.texts[:count]
                    if bit:
                        restore_dialogue(dialogue, bit, lexicon, index, done)
                done.rows += len(found)
                done.turns += int(turns.sum())
                sink.write(found)
        stats.append(done.to_json())
    return pa.table({"stats": stats})


class _Sink:
    """A Parquet or JSONL file that dialogues are appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Sink:
        if self.path.suffix == ".parquet":
            schema = datasets.Features.from_arrow_schema(SCHEMA).arrow_schema
            self.parquet: Any = pq.ParquetWriter(self.path, schema, compression="zstd", compression_level=1)
        else:
            self.text = self.path.open("w", encoding="utf-8")
        return self

    def write(self, found: Sequence[Dialogue]) -> None:
        table = to_table(found)
        if self.path.suffix == ".parquet":
            self.parquet.write_table(table.cast(self.parquet.schema))
        else:
            self.text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())

    def __exit__(self, *_: object) -> None:
        (self.parquet if self.path.suffix == ".parquet" else self.text).close()
