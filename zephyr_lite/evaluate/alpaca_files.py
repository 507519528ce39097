"""Files as AlpacaEval publishes them: outputs (instruction, output, generator), annotations (…, preference)."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

from ..client.jobs import NotBlank
from ..errors import UserError
from ..io.text import is_file, read_text, shown
from .files import MAX_BYTES, OptionalText, from_hub, read_rows

HUB, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval.json"


class Output(BaseModel):
    """One answer of a file.

    Attributes:
        key: identifies the instruction in the file; a repeated instruction gets a key of its own.
        index: the row's place in the file.
    """

    model_config = ConfigDict(frozen=True)

    key: str = ""
    index: int = 0
    instruction: NotBlank
    output: str
    generator: OptionalText = ""
    dataset: OptionalText = ""


class Annotation(BaseModel):
    """One verdict of a file.

    Attributes:
        index: the row's place in the file.
        preference: 1: the baseline's (output_1), 2: the model's (output_2); nan: none. As pandas reads it: null is nan, a
            number in quotes is a number.
    """

    model_config = ConfigDict(frozen=True)

    index: int = 0
    instruction: str
    output_1: str
    output_2: str
    generator_1: OptionalText = ""
    generator_2: OptionalText = ""
    annotator: OptionalText = ""
    preference: Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


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
    hint = "Outputs have the form of AlpacaEval's model_outputs.json."
    for index, row in enumerate(read_rows(path, Output, hint)):
        seen[row.instruction] += 1
        key = hashlib.sha256(row.instruction.encode("utf-8", "replace")).hexdigest()[:16]
        if seen[row.instruction] > 1:
            key += f"/{seen[row.instruction]}"
        outputs.append(row.model_copy(update={"key": key, "index": index, "generator": row.generator or path.stem}))
    _refuse_several({o.generator for o in outputs}, path, "outputs of")
    return outputs, path


def read_annotations(path: Path) -> list[Annotation]:
    """A file of annotations of one model.

    Raises:
        UserError: there is none, or a row is wrong.
    """
    rows = read_rows(path, Annotation, "Annotations have the form of AlpacaEval's annotations.json.")
    _refuse_several({a.generator_2 for a in rows}, path, "verdicts on")
    return [row.model_copy(update={"index": index}) for index, row in enumerate(rows)]


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
        raise UserError(f"{path}: holds no difficulties, or one that is not finite.", hint)
    return result


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

    return from_hub(hf_hub_download, found[1], found[2] or HUB_FILE)
