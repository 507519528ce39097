"""``zephyr-lite data stats``: lengths of rows, cut and dropped rows, packing, tokens and steps."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from ..data.load import summarise
from ..io.text import counted
from ..monitor.rows import TrainedRows
from ..train.steps import step_schedule
from .options import console, say_all

_UNCUT = 2**30  # longer than any example


def uncut_rows(rows: TrainedRows) -> TrainedRows:
    """The rows before cutting. If anything was cut, they are tokenized again without a limit."""
    report = rows.data.report
    if not report.cut and not any("max_length" in reason for reason in report.dropped):
        return rows
    free = rows.config.model_copy(update={"max_length": _UNCUT, "max_prompt_length": _UNCUT})
    return TrainedRows(rows.method, free, rows.template).prepare(report.what == "held-out")


def lengths_of(rows: TrainedRows) -> dict[str, np.ndarray]:
    """Tokens of each example, [n] int64: first what ``max_length`` bounds, then (pairs) its parts."""
    if rows.method == "sft":
        return {"conversation": rows.data.lengths}
    parts = {
        name: pc.list_value_length(rows.column(f"{name}_ids")).to_numpy().astype(np.int64)
        for name in ("prompt", "chosen", "rejected")
    }
    longer = np.maximum(parts["chosen"], parts["rejected"])
    return {"prompt + longer response": parts["prompt"] + longer, **{k: v for k, v in parts.items() if v.any()}}


def print_stats(rows: TrainedRows, places: int = 5) -> None:
    """Print the statistics.

    Args:
        places: the number of rows to name for each reason; 0: all.
    """
    report, config = rows.data.report, rows.config
    training = report.what == "training"
    console.heading(f"{report.what} data, {rows.method}")
    say_all(report.lines(places or None))
    where, cut = (rows.column(name).to_pylist() for name in ("where", "cut"))
    if cut_places := [place for place, was_cut in zip(where, cut) if was_cut]:
        console.say(summarise({f"cut to max_length {config.max_length:,}": cut_places}, places or None))
    lengths = lengths_of(uncut_rows(rows))
    table = []
    for name, values in lengths.items():
        values = values[values > 0]  # an answer with a label has no other side
        quantiles = np.quantile(values, [0.1, 0.5, 0.9, 0.99, 1], method="inverted_cdf")
        table.append([name, f"{values.mean():,.0f}", *(f"{value:,}" for value in quantiles)])
    header = ["tokens, before cutting", "mean", "10 % ≤", "median", "90 % ≤", "99 % ≤", "longest"]
    console.table(header, table)
    if report.unit == "pair":
        share = (lengths["chosen"] > lengths["rejected"]).mean()
        console.say(f"the chosen response is the longer one in {share:.1%} of the pairs")
    _print_sources(rows)
    if training:
        per_epoch, steps = step_schedule(config, len(rows.data.rows))
        batch = counted(config.batch_size, "row" if rows.method == "sft" else report.unit)
        tokens = report.tokens / per_epoch
        console.say(f"an epoch: {counted(per_epoch, 'step')} of {batch}, {tokens:,.0f} tokens each")
        why = f"max_steps {config.max_steps}" if config.max_steps else f"num_train_epochs {config.num_train_epochs:g}"
        console.say(f"in all: {counted(steps, 'step')} ({why}), about {tokens * steps:,.0f} tokens")


def _print_sources(rows: TrainedRows) -> None:
    """Of a mixture: each source's examples, cut ones, and tokens of an epoch."""
    names = ["length", "supervised", "cut"]
    frame = rows.data.examples.columns("where", *names)[:].to_pandas()
    frame["cut"] = frame["cut"] > 0  # a pair counts its prompt too
    groups = frame.groupby(frame["where"].str.rpartition(" row ")[0], sort=False)[names]
    if len(groups) < 2:
        return
    table = []
    for (source, found), kept in zip(groups.sum().iterrows(), groups.size()):
        counts = (kept, int(found["cut"]), int(found["length"]), int(found["supervised"]))
        share = found["length"] / rows.data.report.tokens
        table.append([source, *(f"{count:,}" for count in counts), f"{share:.1%}"])
    console.table(["source", "kept", "cut", "tokens", "supervised", "share"], table)
