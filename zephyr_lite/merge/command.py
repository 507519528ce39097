"""``zephyr-lite merge``: find the chain, merge it, compare the merged folder with the live stack."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.chat_template import resolve_template
from ..errors import Interrupted, UserError
from ..io.atomic import folder_aside, sweep, write_json
from ..io.run_dir import check_rendering, read_json, stages_of
from ..model.base import (
    check_fingerprint,
    compute_device,
    compute_dtype,
    fetch_base,
    fingerprint,
    load_tokenizer,
)
from ..model.chain import Chain, chain_of_adapters, chain_of_run
from .base_files import BaseFiles
from .measure import CHECK_ROWS, MEASURE_ROWS, MergeMeasure, measure
from .weights import COMPOSED, MARK, MERGED, MergeReport, adapter_only, merge

logger = logging.getLogger(__name__)

Way = Literal["base", "nf4"]


def run_merge(
    out: Path,
    *,
    run: Path | None = None,
    stage: str | None = None,
    adapters: Sequence[str] = (),
    base: str | None = None,
    onto: Way = "base",
    as_adapter: bool = False,
    overwrite: bool = False,
    check: bool = True,
    both: bool = False,
    rows: int | None = None,
) -> MergeMeasure | None:
    """Merge a run's chain, or explicit adapters, into ``out``.

    Args:
        run, stage: the newest run's last complete stage by default.
        adapters: instead of a run, from the bottom up.
        base: the adapters' base; for a run, where its base is now.
        onto, overwrite: see ``merge.merge``.
        as_adapter: write one PEFT adapter instead of a model.
        check: compare the result with the live stack, and write the numbers to the folder's zephyr_lite.json.
        both: measure the other way of merging too; its folder is removed again.
        rows: held-out conversations to compare on; None: few for a check, more for ``both``.

    Returns:
        the comparison, where one was made now.

    Raises:
        UserError: there is nothing to merge, the chain or its base has changed since, or ``out`` is not an earlier merge.
        Interrupted: during the comparison, when the folder is complete.
    """
    out = out.expanduser()
    if adapters and (run is not None or stage is not None):
        raise UserError("--adapter names the chain itself; --run and --stage name one too.", "Give one or the other.")
    for option, what in (
        (both, "--measure compares merged models"),
        (rows is not None, "--rows are for the comparison"),
    ):
        if option and (as_adapter or not check):
            why = "--adapter-only makes none" if as_adapter else "--no-check forbids it"
            raise UserError(f"{what}; {why}.", "Give one of the two.")
    chain = chain_of_adapters(list(adapters), base) if adapters else chain_of_run(run, stage=stage, base=base)
    _say_chain(chain, stage is None)
    name, revision = chain.base["name_or_path"], chain.base.get("revision", "main")
    if as_adapter:
        _write_adapter(chain, out, overwrite)
        return None
    folder = fetch_base(name, revision)
    check_fingerprint(chain.base.get("fingerprint"), folder, "the stage")
    lineage = chain.lineage()
    lineage["base"] = {**chain.base, "fingerprint": fingerprint(folder)}

    def merged(where: Path, way: Way) -> MergeReport:
        return _merge(chain, folder, where, way, lineage, overwrite)

    earlier = None if overwrite else _earlier(out, {"kind": MERGED, "onto": onto, **lineage})
    if earlier is None:
        for line in merged(out, onto).lines():
            logger.info(line)
    elif not check or _is_measured(earlier, onto, both, rows):
        logger.info(f"{out} is complete already.")
        return None
    else:
        logger.info(f"{out}: its weights are complete already; the comparison is still to be made")
    if not check:
        return None
    try:
        found = _measure_both(chain, out, onto, merged, rows or MEASURE_ROWS) if both else None
        if found is None:
            found = measure(chain, {onto: out}, rows=rows or CHECK_ROWS)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted during the comparison: {out} is whole, only the numbers are missing. The same command makes them."
        ) from None
    write_json(out / MARK, {**(read_json(out / MARK) or {}), "measured": found.as_dict()})
    for line in (found.ways[onto].logps.line(), *found.lines()):
        logger.info(line)
    if onto == "base" and chain.base.get("load_in_4bit", True):
        logger.info(
            "(live is in 4 bits, merged is not: this is mostly the base's rounding; --onto nf4 keeps what training saw"
            + (")" if both else ", --measure compares the two)")
        )
    return found


def _say_chain(chain: Chain, last_stage: bool) -> None:
    where = f"{chain.run}, stage {chain.stage}" if chain.run is not None else "explicit adapters"
    logger.info(f"{where}: {' + '.join([chain.base['name_or_path'], *(str(a.path) for a in chain.adapters)])}")
    for other in stages_of(chain.run) if chain.run is not None and last_stage else ():
        if not other.complete():
            logger.info(f"note: {other.path} is not finished, and not in it")
    if chain.run is not None and chain.stage is not None and chain.tokenizer_from is not None:
        template = resolve_template("auto", load_tokenizer(chain.tokenizer_from))
        check_rendering(chain.info, chain.run / chain.stage, template.text, template.tokenizer)
    for note in chain.notes:
        logger.info(note)


def _write_adapter(chain: Chain, out: Path, overwrite: bool) -> None:
    name = chain.base["name_or_path"]
    if not overwrite and _earlier(out, {"kind": COMPOSED, **chain.lineage()}) is not None:
        logger.info(f"{out} is complete already.")
        return
    for adapter in chain.adapters:
        if adapter.copies:
            folder = fetch_base(name, chain.base.get("revision", "main"))
            adapter.check_copies(BaseFiles(name, folder).parameter)
    adapter_only(
        chain.adapters,
        out,
        base_model_name=name,
        tokenizer_from=chain.tokenizer_from,
        lineage=chain.lineage(),
        overwrite=overwrite,
    )
    logger.info(f"{out}: the whole chain as one PEFT adapter; it belongs on the bare {name}")


def _earlier(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The mark of ``out``, if it is the merge that is wanted."""
    sweep(out.absolute().parent, out.name)
    told = read_json(out / MARK)
    wanted = json.loads(json.dumps(wanted, default=str))
    return told if told is not None and all(told.get(key) == value for key, value in wanted.items()) else None


def _is_measured(told: dict[str, Any], onto: Way, both: bool, rows: int | None) -> bool:
    measured = told.get("measured") or {}
    ways = {"base", "nf4"} if both and told["base"].get("load_in_4bit", True) else {onto}
    return ways <= {*measured, *measured.get("missing", ())} and rows in (None, measured["data"]["rows"])


class _Done(Exception):
    """Ends a block whose folder is to be removed."""


def _measure_both(
    chain: Chain, out: Path, onto: Way, merged: Callable[[Path, Way], MergeReport], rows: int
) -> MergeMeasure | None:
    """Merge the other way into a temporary folder beside ``out``, and measure both. None where the base was not trained in
    4 bits, so that there is one way only."""
    other: Way = "nf4" if onto == "base" else "base"
    if not chain.base.get("load_in_4bit", True):
        logger.info(f"trained on the base in 16 bits: --onto {other} would be another model, and is not measured")
        return None
    found: MergeMeasure | None = None
    with suppress(_Done), folder_aside(out.with_name(f"{out.name}.measure")) as aside:
        try:
            merged(aside / other, other)
        except UserError as error:  # the disk is too small, or the base has no 16-bit weights
            found = measure(chain, {onto: out}, rows=rows)
            found.missing[other] = error.message
        else:
            folders = {way: out if way == onto else aside / other for way in ("base", "nf4")}
            found = measure(chain, folders, rows=rows)
        raise _Done
    return found


def _merge(chain: Chain, folder: Path, out: Path, onto: Way, lineage: dict[str, Any], overwrite: bool) -> MergeReport:
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if total > 2e9 and done * 10 // total > told:  # smaller models take seconds
            told = done * 10 // total
            logger.info(f"written {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    stored = chain.base.get("dtype")
    return merge(
        folder,
        chain.adapters,
        out,
        onto=onto,
        double_quant=chain.base.get("double_quant", True),
        quant_dtype=getattr(torch, stored) if stored else compute_dtype("auto", compute_device()),
        tokenizer_from=chain.tokenizer_from,
        lineage=lineage,
        overwrite=overwrite,
        progress=progress,
    )
