"""Files as AlpacaEval publishes them: outputs (instruction, output, generator), annotations (…, preference)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.text import is_file, read_text, shown

HUB, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval.json"
MAX_BYTES = 2**30


@dataclass(frozen=True)
class Output:
    """One answer of a file.

    Attributes:
        key: identifies the instruction in the file; a repeated instruction gets a key of its own.
        index: the row's place in the file.
    """

    key: str
    index: int
    instruction: str
    output: str
    generator: str
    dataset: str


@dataclass(frozen=True)
class Annotation:
    """One verdict of a file.

    Attributes:
        preference: 1: the baseline's (output_1), 2: the model's (output_2); nan: none.
    """

    index: int
    instruction: str
    output_1: str
    output_2: str
    generator_1: str
    generator_2: str
    annotator: str
    preference: float


def read_outputs(place: str | None) -> tuple[list[Output], Path]:
    """A file of one model's outputs, and its path.

    Args:
        place: a JSON file, a hub id or OWNER/NAME/FILE.json; None: AlpacaEval's instructions with their baseline.

    Raises:
        UserError: there is none, or a row is wrong.
    """
    path = _find(place)
    outputs: list[Output] = []
    seen: Counter[str] = Counter()
    for number, row in enumerate(read_rows(path), 1):
        instruction, output = _text(row, "instruction"), _text(row, "output")
        if instruction is None or output is None or not instruction.strip():
            raise UserError(
                f"{path} row {number}: expected instruction and output, found {shown(sorted(row))}.",
                "Outputs have the form of AlpacaEval's model_outputs.json.",
            )
        seen[instruction] += 1
        digest = hashlib.sha256(instruction.encode("utf-8", "replace")).hexdigest()[:16]
        key = digest if seen[instruction] == 1 else f"{digest}/{seen[instruction]}"
        generator, dataset = _text(row, "generator") or path.stem, _text(row, "dataset") or ""
        outputs.append(Output(key, number - 1, instruction, output, generator, dataset))
    _refuse_several({o.generator for o in outputs}, path, "outputs of")
    return outputs, path


def read_annotations(path: Path) -> list[Annotation]:
    """A file of annotations of one model.

    Raises:
        UserError: there is none, or a row is wrong.
    """
    result = []
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path} row {number}"
        if "preference" not in row:
            raise UserError(
                f"{where}: has no preference; found {shown(sorted(row))}.",
                "Annotations have the form of AlpacaEval's annotations.json.",
            )
        missing = [name for name in ("instruction", "output_1", "output_2") if _text(row, name) is None]
        if missing:
            raise UserError(f"{where}: {missing[0]} is missing.", "AlpacaEval's annotations have it.")
        names = {name: _text(row, name) or "" for name in ("generator_1", "generator_2", "annotator")}
        texts = {name: row[name] for name in ("instruction", "output_1", "output_2")}
        result.append(Annotation(index=number - 1, preference=_preference(row["preference"], where), **texts, **names))
    _refuse_several({a.generator_2 for a in result}, path, "verdicts on")
    return result


def _refuse_several(models: set[str], path: Path, what: str) -> None:
    if len(models) > 1:
        raise UserError(
            f"{path}: {what} {len(models)} models ({', '.join(sorted(models)[:3])}).", "Give one model's file."
        )


def check_belongs(annotations: list[Annotation], outputs: list[Output], where: str) -> int:
    """Check that annotations are verdicts on these outputs. Published folders lack some annotated outputs.

    Returns:
        the number of annotations whose instruction the outputs lack.

    Raises:
        UserError: most of them, or an annotation's output_2 is not the output to its instruction.
    """
    known: dict[str, set[str]] = {}
    for output in outputs:
        known.setdefault(output.instruction, set()).add(output.output)
    missing = [a for a in annotations if a.instruction not in known]
    if 2 * len(missing) > len(annotations):
        raise UserError(
            f"{where} row {missing[0].index + 1}: its instruction is not among the outputs: "
            f"{shown(missing[0].instruction, 60)}; nor are {len(missing):,} of {len(annotations):,}.",
            "Give the outputs that were annotated, or leave --outputs out.",
        )
    for a in annotations:
        if a.instruction in known and a.output_2 not in known[a.instruction]:
            raise UserError(
                f"{where} row {a.index + 1}: its output_2 is not the outputs' answer to {shown(a.instruction, 60)}.",
                "Are these annotations of another model? Give the outputs that were annotated.",
            )
    return len(missing)


def read_difficulty(path: Path) -> dict[int, float]:
    """{instruction's index: difficulty} of AlpacaEval's instruction_difficulty.csv (an index and a value), or of a table
    with the columns index and instruction_difficulty (df_gamed.csv).

    Raises:
        UserError: it is neither.
    """
    hint = "AlpacaEval's instruction_difficulty.csv has them."
    rows = list(csv.reader(io.StringIO(read_text(path, limit=MAX_BYTES))))
    header = rows[0] if rows else []
    place, value = 0, 1
    if "index" in header and "instruction_difficulty" in header:
        place, value = header.index("index"), header.index("instruction_difficulty")
    result: dict[int, float] = {}
    for number, row in enumerate(rows[1:], 2):
        try:
            result.setdefault(int(row[place]), float(row[value]))
        except (IndexError, ValueError):
            message = f"{path} line {number}: expected an index and a difficulty, found {shown(row)}."
            raise UserError(message, hint) from None
    if not result or not all(map(math.isfinite, result.values())):
        raise UserError(f"{path}: no difficulties in it.", hint)
    return result


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list of objects, or of JSONL.

    Raises:
        UserError: it is neither.
    """
    text = read_text(path, limit=MAX_BYTES)
    hint = "Give a JSON list of objects, or JSONL."
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            # not splitlines(): a text may hold U+2028 or U+0085, which end no line of JSONL
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}).", hint) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects.", hint)
    return list(rows)


def _find(place: str | None) -> Path:
    name = HUB if place is None else place
    path = Path(name).expanduser()
    if is_file(path):
        return path
    found = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([\w./-]+\.json))?", name)
    if found is None:
        raise UserError(
            f"{shown(name)}: no such file, and no hub id.", f"Give a JSON file, or {HUB}/{HUB_FILE} of the hub."
        )
    from huggingface_hub import hf_hub_download

    file = found[2] or HUB_FILE
    try:
        return Path(hf_hub_download(found[1], file, repo_type="dataset"))
    except Exception as error:  # no network, no such data set, no access
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{found[1]}/{file}: no such file here, and it cannot be fetched from the hub: {why}",
            "Check the name and the network (HF_HUB_OFFLINE?), or give a file with --instructions.",
        ) from None


def _text(row: dict[str, Any], key: str) -> str | None:
    return row[key] if isinstance(row.get(key), str) else None


def _preference(value: Any, where: str) -> float:
    """As pandas reads it: null is nan, a number in quotes is a number."""
    try:
        if value is None or isinstance(value, int | float | str):
            return math.nan if value is None else float(value)
    except ValueError:
        pass
    raise UserError(f"{where}: preference: expected a number or null, found {shown(value)}.", "1, 2, or between.")
