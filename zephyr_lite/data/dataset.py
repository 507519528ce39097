"""Rows → tokenized examples → packed rows: the preparation of data before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers

from ..config.load import DatasetSpec, RunConfig
from ..errors import UserError
from .chat_template import ChatTemplate, Example, Pair, PairExample
from .formats import Method
from .load import load_rows, summarise
from .messages import RowError
from .packing import best_fit, cut_conversation, cut_pair
from .workers import map_rows

_PLACES = 5

# columns of arrays
_ARRAYS: dict[Method, tuple[str, ...]] = {"sft": ("ids", "mask"), "dpo": Pair._fields}


@dataclass
class DataReport:
    """Counts of prepared data, for the console and for a run's ``stage.json``."""

    what: str  # "training" or "evaluation"
    notes: list[str] = field(default_factory=list)  # the sources, their formats and their numbers of rows
    read: int = 0  # rows
    kept: int = 0  # examples made of them, repeats included
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason → places of the rows left out
    changed: dict[str, list[str]] = field(default_factory=dict)  # change → places of the rows it was made in
    cut: int = 0  # examples cut to max_length
    prompts_cut: int = 0  # pairs among them with a cut prompt
    supervised_lost: int = 0  # supervised tokens lost by cutting
    rows: int = 0  # packed rows (sft) or pairs (dpo)
    tokens: int = 0
    supervised: int = 0
    fill: float | None = None  # tokens / (rows × max_length); None for pairs, which are packed by the plan
    longest: int = 0  # tokens of the longest example

    def lines(self, places: int | None = _PLACES) -> list[str]:
        """One fact a line. ``places``: how many rows to name for each reason; None: all."""
        pairs = self.fill is None
        unit = "pairs" if pairs else "conversations"
        result = [f"{self.what} data: {note}" for note in self.notes]
        result += self.dropped_lines(places)
        for reason, where in sorted(self.changed.items(), key=lambda item: -len(item[1])):
            result.append(summarise({reason: where}, places))
        if self.cut:
            extra = f", {self.prompts_cut:,} of them on the prompt's left" if self.prompts_cut else ""
            result.append(
                f"{self.cut:,} {unit} cut to max_length{extra}; {self.supervised_lost:,} supervised tokens lost"
            )
        packed = "" if pairs else f" in {self.rows:,} packed rows, {self.fill:.1%} full"
        result.append(
            f"{self.kept:,} {unit}{packed}; {self.tokens:,} tokens, {self.supervised:,} supervised "
            f"({self.supervised / max(1, self.tokens):.1%}); the longest has {self.longest:,}"
        )
        return result

    def dropped_lines(self, places: int | None = _PLACES) -> list[str]:
        """The reasons for which rows were left out, the most frequent first."""
        dropped = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        return [f"left out, {summarise({reason: where}, places)}" for reason, where in dropped]

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON; places as a count and the first few."""
        values = dict(vars(self))
        for key in ("dropped", "changed"):
            values[key] = {
                reason: {"count": len(where), "first": where[:_PLACES]} for reason, where in values[key].items()
            }
        return values


class Examples(Sequence[Any]):
    """Examples, each read from an Arrow table on disk when it is indexed."""

    def __init__(self, table: datasets.Dataset, method: Method) -> None:
        self._table = table.with_format("arrow")
        self._columns = _ARRAYS[method]
        self._kind: type[Example] | type[PairExample] = Example if method == "sft" else PairExample

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        row = self._table[position : position + 1]
        arrays = {c: row.column(c).combine_chunks().flatten().to_numpy(zero_copy_only=False) for c in self._columns}
        return self._kind(**arrays, where=row.column("where")[0].as_py(), index=position)

    def columns(self, *names: str) -> datasets.Dataset:
        """Columns of all examples as Arrow: arrays, where, length, supervised, lost, cut."""
        return self._table.select_columns(list(names)).with_format("arrow")


@dataclass
class TokenizedDataset:
    """Data as a stage trains on it."""

    examples: Examples  # ``Example`` (sft) or ``PairExample`` (dpo) by index, read lazily
    lengths: np.ndarray  # int64 [n], the tokens of each example in a batch
    rows: list[list[int]]  # indices of the examples in each packed row (sft), or of one pair (dpo)
    report: DataReport
    fingerprint: str  # hash of all ids, masks and the template


def prepare(
    specs: Sequence[DatasetSpec],
    method: Method,
    config: RunConfig,
    template: ChatTemplate,
    *,
    what: str = "training",
) -> TokenizedDataset:
    """Load, tokenize, cut and pack.

    Args:
        specs: ``config.dataset`` or ``config.eval_dataset``.
        method: the stage.
        config: for ``seed``, ``system``, ``loss_on``, ``max_length`` and ``max_prompt_length`` (dpo).
        template: of ``resolve_template``.
        what: the data's name in the report.

    Raises:
        UserError: as ``load_rows``; or no row is left.
    """
    rows = load_rows(specs, method, seed=config.seed, system=config.system)
    report = DataReport(
        what, notes=[*rows.notes, *template.notes], read=rows.read, dropped=rows.dropped, changed=rows.changed
    )
    arrays = {
        name: datasets.Sequence(datasets.Value("bool" if name.endswith("mask") else "int32"))
        for name in _ARRAYS[method]
    }
    counts = dict.fromkeys(("length", "supervised", "lost", "cut"), datasets.Value("int32"))
    texts = dict.fromkeys(("where", "fault", "note"), datasets.Value("string"))
    options = {
        "method": method,
        "loss_on": config.loss_on,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
    }
    versions = f"{tokenizers.__version__} {transformers.__version__}"
    table = map_rows(
        rows.dataset,
        _encode,
        datasets.Features({**arrays, **counts, **texts}),
        options={"template": template, **options},
        key={**options, "template": template.fingerprint, "versions": versions},
        batch_size=200,
        desc=f"tokenizing {what} data",
    )
    stats = {name: np.asarray(table.with_format("numpy")[name][:]) for name in (*counts, "fault", "note")}
    faulty, kept = np.flatnonzero(stats["fault"] != ""), np.flatnonzero(stats["fault"] == "")
    noted = kept[stats["note"][kept] != ""]
    for places, column, found in ((report.dropped, "fault", faulty), (report.changed, "note", noted)):
        for index, where in zip(found, table.select(found)["where"] if len(found) else ()):
            for text in str(stats[column][index]).split("\n"):
                places.setdefault(text, []).append(where)
    if len(kept) == 0:
        hint = "Correct the rows, or choose others or another chat_template."
        if any("max_length" in reason or "budget" in reason for reason in report.dropped):
            hint = f"Raise max_length ({config.max_length}), or lower max_prompt_length ({config.max_prompt_length})."
        raise UserError(f"{what} data: no row is left to train on: {summarise(report.dropped)}.", hint)
    if len(faulty):
        table = table.select(kept)
    lengths = stats["length"][kept].astype(np.int64)
    packed = best_fit(lengths, config.max_length) if method == "sft" else [[i] for i in range(len(kept))]
    report.kept, report.rows = len(kept), len(packed)
    report.cut, report.prompts_cut = (int((stats["cut"][kept] > level).sum()) for level in (0, 1))
    report.supervised_lost = int(stats["lost"][kept].sum())
    report.tokens, report.supervised = int(lengths.sum()), int(stats["supervised"][kept].sum())
    report.fill = report.tokens / (len(packed) * config.max_length) if method == "sft" else None
    report.longest = int(lengths.max())
    return TokenizedDataset(Examples(table, method), lengths, packed, report, _fingerprint(table, method, template))


def _encode(
    batch: dict[str, list[Any]],
    *,
    template: ChatTemplate,
    method: Method,
    loss_on: Any,
    max_length: int,
    max_prompt_length: int,
) -> dict[str, list[Any]]:
    """A batch of normalised rows as arrays, counts and texts. ``cut`` is 1 for a cut example, 2 with a cut prompt."""
    names = _ARRAYS[method]
    masks = [place for place, name in enumerate(names) if name.endswith("mask")]
    rows: list[dict[str, Any]] = []
    for where, text in zip(batch["where"], batch["row"]):
        row, fault, lost, cut = json.loads(text), "", 0, 0
        notes: list[str] = []
        arrays: Any = [np.zeros(0, bool if name.endswith("mask") else np.int32) for name in names]
        whole: Any
        short: Any
        try:
            if method == "sft":
                whole = ids, mask = template.encode(row["messages"], loss_on, row.get("tools"), notes)
                short = cut_conversation(ids, mask, max_length)[:2]
            else:
                pair = row["prompt"], row["chosen"], row["rejected"]
                whole = template.encode_pair(*pair, loss_on, row.get("tools"), notes)
                short = cut_pair(whole, max_length, max_prompt_length, template.bos_token_id is not None)
            supervised = [int(whole[place].sum()) for place in masks]
            if not all(supervised):
                raise RowError("no supervised token")
            if short is None:
                raise RowError(
                    f"the prompt is longer than the budget: max_prompt_length {max_prompt_length} leaves no room in "
                    f"max_length {max_length}"
                )
            left = [int(short[place].sum()) for place in masks]
            if not all(left):
                raise RowError(f"no supervised token within max_length {max_length}")
            if method == "dpo" and np.array_equal(short.chosen_ids, short.rejected_ids):
                raise RowError(f"chosen equals rejected within max_length {max_length}")
            arrays, lost = short, sum(supervised) - sum(left)
            if list(map(len, short)) != list(map(len, whole)):
                cut = 2 if method == "dpo" and len(short[0]) < len(whole[0]) else 1
        except RowError as error:
            fault = str(error)
        rows.append(
            dict(zip(names, arrays))
            | {
                "length": sum(map(len, arrays)) - sum(len(arrays[place]) for place in masks),
                "supervised": sum(int(arrays[place].sum()) for place in masks),
                "lost": lost,
                "cut": cut,
                "where": where,
                "fault": fault,
                "note": "\n".join(dict.fromkeys(notes)),
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _fingerprint(table: datasets.Dataset, method: Method, template: ChatTemplate) -> str:
    digest = hashlib.sha256(template.text.encode())
    arrow = table.select_columns(list(_ARRAYS[method])).with_format("arrow")
    for start in range(0, len(arrow), 1000):
        rows = arrow[start : start + 1000]
        for name in rows.column_names:
            column = rows.column(name).combine_chunks()
            # lengths too: the same tokens could be divided into other rows
            digest.update(np.asarray(column.value_lengths(), dtype=np.int32).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
