"""Rows → tokenized examples → packed rows: the preparation of data before the first step."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import tokenizers
import transformers

from ..config.load import DatasetSpec, RunConfig
from ..errors import UserError
from ..io.text import counted
from .chat_template import ChatTemplate, Example, PairExample
from .formats import Method
from .load import PLACES, first_places, load_rows, summarise
from .messages import RowError
from .packing import best_fit, cut_pair
from .workers import map_rows

# columns of arrays
_COUNTS, _TEXTS = ("length", "supervised", "lost", "cut"), ("where", "fault", "note")
_PAIR = ("prompt_ids", "chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask")
_ARRAYS: dict[Method, tuple[str, ...]] = {"sft": ("ids", "mask"), "dpo": _PAIR, "kto": _PAIR}


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
    unit: str = "conversation"  # name of an example in messages: conversation (sft), pair (dpo), row (kto)

    def lines(self, places: int | None = PLACES) -> list[str]:
        """One fact a line. ``places``: how many rows to name for each reason; None: all."""
        result = [f"{self.what} data: {note}" for note in self.notes] + self.dropped_lines(places)
        changed = sorted(self.changed.items(), key=lambda item: -len(item[1]))
        result += [summarise({change: where}, places) for change, where in changed]
        if self.cut:
            extra = f", {self.prompts_cut:,} of them on the prompt's left" if self.prompts_cut else ""
            result.append(
                f"{counted(self.cut, self.unit)} cut to max_length{extra}; {self.supervised_lost:,} supervised tokens lost"
            )
        packed = "" if self.fill is None else f" in {counted(self.rows, 'packed row')}, {self.fill:.1%} full"
        result.append(f"{counted(self.kept, self.unit)}{packed}; the longest has {self.longest:,} tokens")
        result.append(
            f"{self.tokens:,} tokens, {self.supervised:,} supervised ({self.supervised / max(1, self.tokens):.1%})"
        )
        return result

    def dropped_lines(self, places: int | None = PLACES) -> list[str]:
        """The reasons for which rows were left out, the most frequent first."""
        dropped = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        return [f"left out, {summarise({reason: where}, places)}" for reason, where in dropped]

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON; places as a count and the first few."""
        return vars(self) | {"dropped": first_places(self.dropped), "changed": first_places(self.changed)}


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
        arrays = {
            column: row.column(column).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            for column in self._columns
        }
        return self._kind(**arrays, where=row.column("where")[0].as_py(), index=position)

    def columns(self, *names: str) -> datasets.Dataset:
        """Columns of all examples as Arrow: arrays, where, length, supervised, lost, cut."""
        return self._table.select_columns(list(names)).with_format("arrow")


@dataclass
class TokenizedDataset:
    """Data as a stage trains on it."""

    examples: Examples  # ``Example`` (sft) or ``PairExample`` (dpo, kto) by index, read lazily
    lengths: np.ndarray  # int64 [n], the tokens of each example in a batch
    rows: list[list[int]]  # indices of the examples in each packed row (sft), or of one pair (dpo)
    report: DataReport
    fingerprint: str  # hash of all ids, masks and the template

    def answers(self) -> np.ndarray:
        """[n, 2] bool: which rows have a chosen and a rejected answer; an answer with a label (kto) is alone."""
        table = self.examples.columns("chosen_ids", "rejected_ids")[:]
        return np.stack([pc.list_value_length(column).to_numpy() > 0 for column in table.columns], 1)

    def supervises(self, token: int) -> bool:
        """Whether a token is supervised anywhere."""
        names = self.examples._columns[-4:]  # ids and mask, or those of both answers
        for rows in self.examples.columns(*names).iter(1000):
            flat = [rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in names]
            if any(token in ids[mask] for ids, mask in zip(flat[::2], flat[1::2])):
                return True
        return False

    def pack(self, capacity: int) -> None:
        """Pack conversations into rows of at most ``capacity`` tokens."""
        self.rows = best_fit(self.lengths, capacity)
        self.report.rows = len(self.rows)
        self.report.fill = self.report.tokens / (len(self.rows) * capacity)


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
        method: the kind of rows (``RunConfig.row_kind``).
        config: for ``seed``, ``system``, ``loss_on``, ``max_length``, ``max_prompt_length`` (dpo) and weights (kto).
        template: of ``resolve_template``.
        what: the data's name in the report.

    Raises:
        UserError: as ``load_rows``; or no row is left.
    """
    rows = load_rows(specs, method, seed=config.seed, system=config.system)
    report = DataReport(
        what, notes=[*rows.notes, *template.notes], read=rows.read, dropped=rows.dropped, changed=rows.changed
    )
    report.unit = {"sft": "conversation", "dpo": "pair", "kto": "row"}[method]
    features: dict[str, Any] = {}
    for name in _ARRAYS[method]:
        features[name] = datasets.Sequence(datasets.Value("bool" if name.endswith("mask") else "int32"))
    features |= dict.fromkeys(_COUNTS, datasets.Value("int32")) | dict.fromkeys(_TEXTS, datasets.Value("string"))
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
        datasets.Features(features),
        options={"template": template, **options},
        key={**options, "template": template.fingerprint, "versions": versions},
        batch_size=200,
        desc=f"tokenizing {what} data",
    )
    stats = table.select_columns([*_COUNTS, *_TEXTS]).with_format("numpy")[:]
    for fault, note, where in zip(stats["fault"].tolist(), stats["note"].tolist(), stats["where"].tolist()):
        if fault:
            report.dropped.setdefault(fault, []).append(where)
            continue
        for each in note.split("\n") if note else []:
            report.changed.setdefault(each, []).append(where)
    kept = np.flatnonzero(stats["fault"] == "")
    if len(kept) == 0:
        raise UserError(
            f"{what} data: no row is left to train on: {summarise(report.dropped)}.",
            f"Raise max_length ({config.max_length}) or lower max_prompt_length ({config.max_prompt_length}) if they are "
            "too long; otherwise correct the rows, or choose others or another chat_template.",
        )
    table = table.select(kept)
    lengths = stats["length"][kept].astype(np.int64)
    report.kept = report.rows = len(kept)
    report.cut, report.prompts_cut = int((stats["cut"][kept] > 0).sum()), int((stats["cut"][kept] > 1).sum())
    report.supervised_lost = int(stats["lost"][kept].sum())
    report.tokens, report.supervised = int(lengths.sum()), int(stats["supervised"][kept].sum())
    report.longest = int(lengths.max())
    one_each = np.arange(len(kept))[:, None].tolist()
    data = TokenizedDataset(Examples(table, method), lengths, one_each, report, _fingerprint(table, method, template))
    if method == "sft":
        data.pack(config.max_length)
    elif method == "kto":
        desirable, undesirable = data.answers().sum(0).tolist()
        report.notes.append(f"answers: {desirable:,} desirable (true), {undesirable:,} undesirable (false)")
        report.notes += _unbalanced(desirable, undesirable, config) if what == "training" else []
    return data


def _unbalanced(desirable: int, undesirable: int, config: RunConfig) -> list[str]:
    """Notes on weights of desirable and undesirable answers that KTO's paper advises against (eq. 8)."""
    if not (desirable and undesirable):
        return [f"all labels are {'true' if desirable else 'false'}; KTO learns more from answers of both kinds"]
    ratio = desirable * config.desirable_weight / (undesirable * config.undesirable_weight)
    if 0.99 < ratio < 1.34:
        return []
    key, factor = ("desirable_weight", 1 / ratio) if ratio < 1 else ("undesirable_weight", ratio)
    advice = f"KTO's paper advises 1 to 1.33: set {key}={getattr(config, key) * factor:.3g}"
    return [f"the desirable answers weigh {ratio:.3g} times as much as the undesirable ones; {advice}"]


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
    columns: dict[str, list[Any]] = defaultdict(list)
    no_ids, no_mask = np.zeros(0, np.int32), np.zeros(0, bool)
    no_arrays = (no_ids, no_mask) if method == "sft" else (no_ids, no_ids, no_mask, no_ids, no_mask)
    for where, text in zip(batch["where"], batch["row"]):
        row, fault = json.loads(text), ""
        notes: list[str] = []
        arrays: tuple[np.ndarray, ...] = no_arrays
        length = supervised = lost = cut = 0
        try:
            if method == "sft":
                ids, mask = template.encode(row["messages"], loss_on, row.get("tools"), notes)
                short: Any = ids[:max_length], mask[:max_length]
                masks: tuple[np.ndarray, ...] = mask, short[1]
                cut = int(len(ids) > max_length)
            else:
                turns = row["prompt"], row["chosen"], row["rejected"]
                pair = template.encode_pair(*turns, loss_on, row.get("tools"), notes)
                fitting = cut_pair(pair, max_length, max_prompt_length, template.bos_token_id is not None)
                sides = (pair.chosen_mask, fitting.chosen_mask), (pair.rejected_mask, fitting.rejected_mask)
                masks = tuple(mask for side, turn in zip(sides, turns[1:]) if turn for mask in side)
                if fitting is not pair:
                    cut = 2 if len(fitting.prompt_ids) < len(pair.prompt_ids) else 1
                short = tuple(getattr(fitting, name) for name in _PAIR)
            counts = [int(mask.sum()) for mask in masks]  # of each response, before and after the cut
            if not all(counts[::2]):
                raise RowError("no supervised token")
            if not all(counts[1::2]):
                raise RowError(f"no supervised token within max_length {max_length}")
            if method != "sft" and np.array_equal(short[1], short[3]):
                raise RowError(f"chosen equals rejected within max_length {max_length}")
            arrays, supervised, lost = short, sum(counts[1::2]), sum(counts[::2]) - sum(counts[1::2])
            length = sum(map(len, short)) - sum(map(len, masks[1::2]))
        except RowError as error:
            fault, cut = str(error), 0
        values = (*arrays, length, supervised, lost, cut, where, fault, "\n".join(dict.fromkeys(notes)))
        for name, value in zip((*_ARRAYS[method], *_COUNTS, *_TEXTS), values, strict=True):
            columns[name].append(value)
    return columns


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


def general_text(template: ChatTemplate, every: int = 1) -> TokenizedDataset:
    """64 short passages of many kinds, on which a model's loss shows whether training made it forget. They are plain text: every
    token but the first is a target; no chat template, no end-of-text token.

    Args:
        every: take one passage of so many.
    """
    passages = Path(__file__).with_name("general.txt").read_text(encoding="utf-8").split("\n%\n")
    ids = [template.text_ids(text.strip())[:-1] for text in passages[::every]]  # without eos
    table = {
        "ids": ids,
        "mask": [np.arange(len(each)) > 0 for each in ids],
        "where": [f"general.txt passage {index * every + 1}" for index in range(len(ids))],
    }
    lengths = np.array([len(each) for each in ids])
    fingerprint = hashlib.sha256(np.concatenate(ids).tobytes()).hexdigest()
    tokens, supervised = int(lengths.sum()), int(lengths.sum()) - len(ids)
    report = DataReport("general", kept=len(ids), tokens=tokens, supervised=supervised, longest=int(lengths.max()))
    return TokenizedDataset(Examples(datasets.Dataset.from_dict(table), "sft"), lengths, [], report, fingerprint)
