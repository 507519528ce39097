"""``zephyr-lite merge``: find the chain, merge it the better way, compare the merged folder with the live stack."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.chat_template import resolve_template
from ..errors import UserError
from ..io.atomic import remove_folder, remove_tree, sweep, write_json
from ..io.run_dir import check_rendering, read_json, stages_of
from ..model.base import compute_device, compute_dtype
from ..model.base_folder import check_fingerprint, fingerprint
from ..model.chain import Chain
from ..model.files import check_config_file, fetch_base
from ..model.loaded import find_chain
from ..model.tokenizer import load_tokenizer
from .base_files import BaseFiles
from .measure import CHECK_ROWS, MEASURE_ROWS, NAMES, MergeMeasure
from .weights import COMPOSED, MARK, MERGED, Way, adapter_only, merge

logger = logging.getLogger(__name__)


def run_merge(
    out: Path,
    *,
    run: Path | None = None,
    stage: str | None = None,
    adapters: Sequence[str] = (),
    base: str | None = None,
    onto: Way | None = None,
    as_adapter: bool = False,
    overwrite: bool = False,
    check: bool = True,
    both: bool = False,
    rows: int | None = None,
) -> MergeMeasure | None:
    """Merge a run's chain, or explicit adapters, into ``out``; returns the comparison with the live stack, if one was made now.

    Args:
        onto: see ``merge.merge``; None: the 16-bit base, and where a chain trained in 4 bits is worse on it than live (the
            interval of the difference on its own held-out rows excludes 0), NF4, which keeps the live stack.
        as_adapter: write one PEFT adapter instead of a model.
        both: measure the other way of merging too; its folder is removed again.
        rows: held-out conversations to compare on; None: few for a check of a given way, more to choose or for ``both``.

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
    aside = out.with_name(f".{out.name}.measure")
    remove_tree(aside)  # of a merge that was killed
    if as_adapter:
        _write_adapter(chain, out, overwrite)
        return None
    folder = fetch_base(chain.base["name_or_path"], chain.base.get("revision", "main"))
    check_fingerprint(chain.base.get("fingerprint"), folder, "the stage")
    lineage = {**chain.lineage(), "base": {**chain.base, "fingerprint": fingerprint(folder)}}
    stored_in_4bit = "quantization_config" in check_config_file(folder)
    two_ways = chain.base.get("load_in_4bit", True) and not stored_in_4bit
    dtype = chain.base.get("dtype")

    def make(place: Path, way: Way, overwrite: bool = False) -> None:
        merge(
            folder,
            chain.adapters,
            place,
            onto=way,
            double_quant=chain.base.get("double_quant", True),
            quant_dtype=getattr(torch, dtype) if dtype else compute_dtype("auto", compute_device()),
            tokenizer_from=chain.tokenizer_from,
            lineage=lineage,
            overwrite=overwrite,
        )

    mark = read_json(out / MARK) or {}
    merged = not overwrite and _is_merge(mark, {"kind": MERGED, **lineage, **({"onto": onto} if onto else {})})
    way: Way = mark["onto"] if merged else onto or ("nf4" if stored_in_4bit else "base")
    measured = mark.get("measured", {}) if merged else {}
    wanted: set[Way] = {"base", "nf4"} if both and two_ways else {way}
    choose = onto is None and two_ways
    # an earlier --onto base may have been the worse way
    settled = not choose or way == "nf4" or mark.get("chosen", False)
    done = not check or (settled and wanted <= measured.keys() and rows in (None, measured["data"]["rows"]))
    if merged:
        logger.info(
            f"{out} is complete already, onto {NAMES[way]}." if done else f"{out}: the comparison is still to be made"
        )
    else:
        make(out, way, overwrite)
    if done:
        return None

    found = MergeMeasure(chain, rows or (MEASURE_ROWS if choose or both else CHECK_ROWS), trained=choose)
    found.add(way, out)
    logger.info(found.live_line())
    verdict = ""
    if choose and way == "base" and found.lost is None:
        difference = found.numbers[way]["loss_minus_live"]
        better = difference.high is not None and difference.high < 0
        verdict = ": better, kept" if better else ": about equal, kept"
        if found.is_worse(way):
            logger.info(f"{found.line(way)}: worse, removed")
            remove_folder(out)  # first, since the disk may have room for one only
            way, verdict = "nf4", ": kept"
            make(out, way)
            found.add(way, out)
    logger.info(found.line(way) + verdict)
    if choose and found.lost is not None:
        logger.info(f"{found.lost.rstrip('.')}, so the 16-bit base is kept; --onto nf4 is the other way.")
    mark = {**(read_json(out / MARK) or {}), **({"chosen": True} if choose else {})}
    write_json(out / MARK, {**mark, "measured": found.as_dict()})
    for other in wanted - found.logps.keys():
        try:
            make(aside, other, overwrite=True)
            found.add(other, aside)
        finally:
            remove_tree(aside)
        logger.info(f"{found.line(other)}: measured only")
        write_json(out / MARK, {**mark, "measured": found.as_dict()})
    for measured_way in found.logps if both or onto is not None else ():
        logger.info(found.closeness(measured_way))
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
            adapter.check_copies(BaseFiles(base).parameter)
    adapter_only(
        chain.adapters,
        out,
        base_model_name=name,
        tokenizer_from=chain.tokenizer_from,
        lineage=lineage,
        overwrite=overwrite,
    )
    logger.info(
        f"{out}: the whole chain as one PEFT adapter for the bare {name}, which needs no merge. Its card says how to load it."
    )


def _is_merge(mark: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a folder's zephyr_lite.json is that of the merge that is wanted."""
    return {**mark, **json.loads(json.dumps(wanted, default=str))} == mark
