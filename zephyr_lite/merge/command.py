"""``zephyr-lite merge``: find the chain, merge it, compare the merged folder with the live stack."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.chat_template import resolve_template
from ..errors import UserError
from ..io.atomic import remove_tree, sweep, write_json
from ..io.run_dir import check_rendering, read_json, stages_of
from ..model.base import compute_device, compute_dtype
from ..model.base_folder import check_fingerprint, fingerprint
from ..model.chain import Chain
from ..model.files import fetch_base
from ..model.loaded import find_chain
from ..model.tokenizer import load_tokenizer
from .base_files import BaseFiles
from .measure import CHECK_ROWS, MEASURE_ROWS, MergeMeasure, measure
from .weights import COMPOSED, MARK, MERGED, adapter_only, merge

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
    """
    out = out.expanduser()
    if (both or rows is not None) and (as_adapter or not check):
        raise UserError(
            "--measure and --rows are for the comparison, which --adapter-only and --no-check leave out.",
            "Give one or the other.",
        )
    chain = find_chain(run, stage=stage, adapters=adapters, base=base, option="--run ")
    if chain is None:
        raise UserError(f"{run}: is a model's folder, without adapters to merge.", "Give a run's folder (runs/NAME).")
    _report_chain(chain, stage is None)
    sweep(out.absolute().parent, out.name)
    if as_adapter:
        _write_adapter(chain, out, overwrite)
        return None
    folder = fetch_base(chain.base["name_or_path"], chain.base.get("revision", "main"))
    check_fingerprint(chain.base.get("fingerprint"), folder, "the stage")
    lineage = {**chain.lineage(), "base": {**chain.base, "fingerprint": fingerprint(folder)}}
    in_4bit = chain.base.get("load_in_4bit", True)
    stored = chain.base.get("dtype")
    settings: dict[str, Any] = {
        "double_quant": chain.base.get("double_quant", True),
        "quant_dtype": getattr(torch, stored) if stored else compute_dtype("auto", compute_device()),
        "tokenizer_from": chain.tokenizer_from,
        "lineage": lineage,
    }
    ways: set[Way] = {"base", "nf4"} if both and in_4bit else {onto}
    if both and not in_4bit:
        logger.info("trained on the base in 16 bits, so merging onto NF4 would be another model, and is not measured")

    mark = read_json(out / MARK) or {}
    merged = not overwrite and _is_merge(mark, {"kind": MERGED, "onto": onto, **lineage})
    if not merged:
        merge(folder, chain.adapters, out, onto=onto, overwrite=overwrite, **settings)
        mark = read_json(out / MARK) or {}
    measured = mark.get("measured") or {}
    done = ways <= {*measured, *measured.get("missing", ())} and rows in (None, measured["data"]["rows"])
    if merged:
        logger.info(
            f"{out} is complete already." if done or not check else f"{out}: the comparison is still to be made"
        )
    if done or not check:
        return None

    folders: dict[Way, Path] = {onto: out}
    missing: dict[str, str] = {}
    aside = out.with_name(f".{out.name}.measure")
    try:
        for other in ways - {onto}:
            try:
                merge(folder, chain.adapters, aside, onto=other, overwrite=True, **settings)
                folders[other] = aside
            except UserError as error:  # the disk is too small, or the base has no 16-bit weights
                missing[other] = error.message
        found = measure(chain, folders, rows=rows or (MEASURE_ROWS if both else CHECK_ROWS))
    finally:
        remove_tree(aside)
    found.missing.update(missing)
    write_json(out / MARK, {**mark, "measured": found.as_dict()})
    for line in (found.logps[onto].line(), *found.lines()):
        logger.info(line)
    if onto == "base" and in_4bit:
        logger.info(
            "(live is in 4 bits, merged is not: most of the difference is the base's rounding; --onto nf4 keeps what "
            "training saw, --measure compares the two)"
        )
    return found


def _report_chain(chain: Chain, last_stage: bool) -> None:
    """Log the chain. Raises UserError where the stage's template or tokenizer was changed."""
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
    name, lineage = chain.base["name_or_path"], chain.lineage()
    if not overwrite and _is_merge(read_json(out / MARK) or {}, {"kind": COMPOSED, **lineage}):
        logger.info(f"{out} is complete already.")
        return
    for adapter in chain.adapters:
        if adapter.copies:
            base = fetch_base(name, chain.base.get("revision", "main"))
            adapter.check_copies(BaseFiles(name, base).parameter)
    adapter_only(
        chain.adapters,
        out,
        base_model_name=name,
        tokenizer_from=chain.tokenizer_from,
        lineage=lineage,
        overwrite=overwrite,
    )
    logger.info(f"{out}: the whole chain as one PEFT adapter; it belongs on the bare {name}")


def _is_merge(mark: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a folder's zephyr_lite.json is that of the merge that is wanted."""
    return {**mark, **json.loads(json.dumps(wanted, default=str))} == mark
