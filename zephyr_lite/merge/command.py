"""What ``zephyr-lite merge`` does: find the chain, merge it, compare the merged folder with the live stack."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.chat_template import resolve_template
from ..errors import Interrupted, UserError
from ..io.atomic import folder_aside, sweep, write_json
from ..io.run_dir import read_json, stages_of
from ..io.stage_info import check_rendering
from ..model.base import (
    compute_device,
    compute_dtype,
    fetch_base,
    fingerprint,
    is_fingerprint_of,
    load_tokenizer,
)
from ..model.chain import Chain, chain_of_adapters, chain_of_run
from .base_files import open_base
from .measure import CHECK_ROWS, MEASURE_ROWS, MergeMeasure, measure
from .weights import COMPOSED, MARK, MERGED, MergeReport, adapter_only, merge

Say = Callable[[str], None]
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
    say: Say = print,
) -> MergeMeasure | None:
    """Merge a run's chain, or explicit adapters, into ``out``.

    Args:
        run, stage: which; the newest run's last complete stage by default.
        adapters: instead of a run, from the bottom up.
        base: what the adapters belong on; of a run, where its base is now.
        onto, overwrite: see ``merge.merge``.
        as_adapter: write one PEFT adapter instead of a model.
        check: compare the result with the live stack, and keep what was found in the folder's zephyr_lite.json.
        both: measure the other way of merging too; its folder is removed again.
        rows: held-out conversations to measure on; None: few for a check, more for ``both``.

    Returns:
        the comparison, where one was made now.

    Raises:
        UserError: nothing to merge, a chain that is not what the stage was finished with, another base, an ``out``
            that is not ours.
        Interrupted: while the whole folder was compared.
    """
    out = out.expanduser()
    if adapters and (run is not None or stage is not None):
        raise UserError("--adapter names the chain itself; --run and --stage name one too.", "Give one or the other.")
    if both and (as_adapter or not check):
        raise UserError(
            f"--measure compares merged models; {'--adapter-only makes none' if as_adapter else '--no-check forbids it'}.",
            "Give one of the two.",
        )
    if rows is not None and (as_adapter or not check):
        raise UserError(
            f"--rows are for the comparison; {'--adapter-only makes none' if as_adapter else '--no-check forbids it'}.",
            "Give one of the two.",
        )
    chain = chain_of_adapters(list(adapters), base) if adapters else chain_of_run(run, stage=stage, base=base)
    name = chain.base["name_or_path"]
    where = f"{chain.run}, stage {chain.stage}" if chain.run is not None else "explicit adapters"
    say(f"{where}: {' + '.join([name, *(str(a.path) for a in chain.adapters)])}")
    for other in stages_of(chain.run) if chain.run is not None and stage is None else ():
        if not other.complete():
            say(f"note: {other.path} is not finished, and not in it")
    if chain.run is not None and chain.stage is not None and chain.tokenizer_from is not None:
        template = resolve_template("auto", load_tokenizer(chain.tokenizer_from))
        check_rendering(chain.info, chain.run / chain.stage, template.text, template.tokenizer)
    for note in chain.notes:
        say(note)
    lineage = chain.lineage()
    if as_adapter:
        if not overwrite and _earlier(out, {"kind": COMPOSED, **lineage}) is not None:
            say(f"{out} is complete already.")
            return None
        for adapter in chain.adapters:
            if adapter.copies:
                adapter.check_copies(open_base(name, chain.base.get("revision", "main")).parameter)
        adapter_only(
            chain.adapters,
            out,
            base_model_name=name,
            tokenizer_from=chain.tokenizer_from,
            lineage=lineage,
            overwrite=overwrite,
        )
        say(f"{out}: the whole chain as one PEFT adapter; it belongs on the bare {name}")
        return None
    folder = fetch_base(name, chain.base.get("revision", "main"))
    found_base = fingerprint(folder)
    if (known := chain.base.get("fingerprint")) is not None and not is_fingerprint_of(known, folder):
        raise UserError(
            f"{folder}: is not the model that the stage was trained on (its files changed since, or it is another one).",
            "Restore it, or give the folder of that model with --base.",
        )

    lineage = {**lineage, "base": {**chain.base, "fingerprint": found_base}}

    def merged(where: Path, way: Way) -> MergeReport:
        return _merge(chain, folder, where, way, lineage, overwrite, say)

    earlier = None if overwrite else _earlier(out, {"kind": MERGED, "onto": onto, **lineage})
    if earlier is None:
        for line in merged(out, onto).lines():
            say(line)
    elif not check or _is_measured(earlier, onto, both, rows):
        say(f"{out} is complete already.")
        return None
    else:
        say(f"{out}: its weights are complete already; what is missing is the comparison")
    if not check:
        return None
    try:
        found = _measured(chain, out, onto, merged, rows or MEASURE_ROWS, say) if both else None
        if found is None:
            found = measure(chain, {onto: out}, rows=rows or CHECK_ROWS, say=say)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted while it was compared: {out} is whole, only the numbers are missing. The same command makes them."
        ) from None
    write_json(out / MARK, {**(read_json(out / MARK) or {}), "measured": found.as_dict()})
    say(found.ways[onto].logps.line())
    for line in found.lines():
        say(line)
    if onto == "base" and chain.base.get("load_in_4bit", True):
        say(
            "(live is in 4 bits, merged is not: this is mostly the base's rounding; --onto nf4 keeps what training saw"
            + (")" if both else ", --measure compares the two)")
        )
    return found


def _earlier(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What ``out`` says of itself, where that is the merge that is wanted."""
    sweep(out.absolute().parent, out.name)
    told = read_json(out / MARK)
    wanted = json.loads(json.dumps(wanted, default=str))
    return told if told is not None and all(told.get(key) == value for key, value in wanted.items()) else None


def _is_measured(told: dict[str, Any], onto: Way, both: bool, rows: int | None) -> bool:
    measured = told.get("measured") or {}
    ways = {"base", "nf4"} if both and told["base"].get("load_in_4bit", True) else {onto}
    return ways <= {*measured, *measured.get("missing", ())} and rows in (None, measured["data"]["rows"])


def _measured(
    chain: Chain, out: Path, onto: Way, merged: Callable[[Path, Way], MergeReport], rows: int, say: Say
) -> MergeMeasure | None:
    """Both ways: the other one is merged beside ``out``, measured, and removed, however this ends. None where the other
    way is none: the base was not trained in 4 bits."""
    other: Way = "nf4" if onto == "base" else "base"
    if not chain.base.get("load_in_4bit", True):
        say(f"trained on the base in 16 bits: --onto {other} would be another model, and is not measured")
        return None
    target = out.with_name(f"{out.name}.measure")
    found: MergeMeasure | None = None
    with suppress(_Done), folder_aside(target) as aside:
        try:
            merged(aside / other, other)
        except UserError as error:  # no room, or a base whose 16-bit weights are not there
            found = measure(chain, {onto: out}, rows=rows, say=say)
            found.missing[other] = error.message
        else:
            # base first, whichever was asked for
            folders = {way: out if way == onto else aside / other for way in ("base", "nf4")}
            found = measure(chain, folders, rows=rows, say=say)
        raise _Done
    return found


class _Done(Exception):
    """The folder beside has served its purpose."""


def _merge(
    chain: Chain, folder: Path, out: Path, onto: Way, lineage: dict[str, Any], overwrite: bool, say: Say
) -> MergeReport:
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if total > 2e9 and done * 10 // total > told:  # below that it takes seconds
            told = done * 10 // total
            say(f"written {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    return merge(
        folder,
        chain.adapters,
        out,
        onto=onto,
        double_quant=chain.base.get("double_quant", True),
        quant_dtype=_dtype(chain),
        tokenizer_from=chain.tokenizer_from,
        lineage=lineage,
        overwrite=overwrite,
        progress=progress,
    )


def _dtype(chain: Chain) -> torch.dtype:
    """What the base was loaded in when it was quantized."""
    stored = chain.base.get("dtype")
    return getattr(torch, stored) if stored else compute_dtype("auto", compute_device())
