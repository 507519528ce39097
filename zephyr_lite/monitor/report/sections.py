"""The sections of the page about one stage, or about the same stage of two runs: each takes the records and their labels."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...io.words import duration
from .figures import figures_of
from .read import StageRecord, as_dict, as_list, is_number
from .svg import bars, chart
from .text import Html, esc, gib, moment, number, share, table, without_paths

Records = Sequence[StageRecord]
Labels = Sequence[str]
_MADE_HERE = ("output_dir", "stage")  # every run has its own


def overview(records: Records, labels: Labels) -> Html:
    """How it went, in a dozen numbers."""
    facts = [dict(_facts(record)) for record in records]
    names = list(dict.fromkeys(name for told in facts for name in told))
    if len(records) > 1:
        return table(["", *labels], [[name, *(told.get(name, "–") for told in facts)] for name in names])
    tiles = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(facts[0][name])}</dd></div>" for name in names)
    return Html(f"<dl class=tiles>{tiles}</dl>")


def _facts(record: StageRecord) -> Iterator[tuple[str, Any]]:
    result, total = record.part("result"), record.total()
    yield (
        "steps",
        number(record.step) if record.complete or total is None else f"{number(record.step)} of {number(total)}",
    )
    losses = record.points("eval_loss")[1]
    if losses:
        yield "held-out loss", f"{number(losses[0])} → {number(losses[-1])}" if len(losses) > 1 else number(losses[0])
    ys = record.points("loss")[1]
    if ys:
        first, last = _end(ys, first=True), _end(ys)
        yield "training loss, mean of ends", f"{number(first)} → {number(last)}"
    best = as_list(result.get("best"))
    if len(losses) > 2 and len(best) == 2 and is_number(best[0]):
        yield "best held-out loss", f"{number(best[0])} (step {number(best[1])})"
    if record.method == "dpo":
        held = record.last("eval_rewards/accuracies")
        yield (
            "preference accuracy" + (", held-out" if held is not None else ""),
            share(held if held is not None else _end(record.points("rewards/accuracies")[1])),
        )
        held = record.last("eval_rewards/margins")
        yield (
            "margin" + (", held-out" if held is not None else ""),
            number(held if held is not None else _end(record.points("rewards/margins")[1])),
        )
    else:
        held = record.last("eval_mean_token_accuracy")
        if held is not None:
            yield "token accuracy, held-out", share(held)
    for unit in ("tokens", "pairs"):
        speeds = [y for y in record.points(f"{unit}_per_second")[1] if math.isfinite(y)]
        if speeds:
            yield f"{unit} a second", number(float(f"{statistics.median(speeds):.3g}"))
    if is_number(result.get("seconds")) and math.isfinite(result["seconds"]):
        yield "time, last start" if record.info.get("resumed") else "time", duration(result["seconds"])
    elif not record.complete and total is not None:
        seconds = [y for y in record.points("seconds")[1] if math.isfinite(y)]
        if seconds and total > record.step:
            yield "left, at this speed", duration(statistics.median(seconds) * (total - record.step))
    peak, planned = result.get("peak_memory_bytes"), as_dict(record.part("plan").get("account")).get("peak")
    measured = [y for y in record.points("peak_memory_gib")[1] if math.isfinite(y)]
    if not is_number(peak) and measured:
        peak = max(measured) * 2**30
    if is_number(peak) and is_number(planned) and planned:
        yield "memory, measured / planned", f"{peak / 2**30:.2f} / {planned / 2**30:.2f} GiB"
    elif is_number(peak):
        yield "memory, measured", gib(peak)
    elif is_number(planned) and planned:
        yield "memory planned", gib(planned)
    left = result.get("steps_left_out", len(record.left_out))
    if left:
        yield "steps left out", number(left)


def _end(values: Sequence[float], *, first: bool = False) -> float | None:
    """The mean of the last (or the first) tenth: one step's value is noise."""
    fine = [value for value in values if math.isfinite(value)]
    count = max(1, len(fine) // 10)
    return statistics.fmean(fine[:count] if first else fine[-count:]) if fine else None


def warnings(records: Records, labels: Labels) -> Html:
    """What was said about the numbers, and which steps were left out."""
    told = []
    for record, label in zip(records, labels):
        who = f"{label}: " if len(records) > 1 else ""
        told += [f"{who}{without_paths(str(text))}" for text in as_list(record.part("result").get("warnings"))]
        for line in record.left_out[:20]:
            rows = ", ".join(without_paths(str(row)) for row in as_list(line.get("rows"))[:3])
            loss = f"loss {number(line.get('loss'))}, gradient norm {number(line.get('grad_norm'))}"
            told.append(f"{who}step {line.get('step')} was left out ({loss}); rows: {rows or 'unknown'}")
        if len(record.left_out) > 20:
            told.append(f"{who}and {len(record.left_out) - 20:,} more steps were left out (left_out.jsonl)")
    if not told:
        return Html("")
    return Html(f"<ul class=warnings>{''.join(f'<li>{esc(text)}</li>' for text in told)}</ul>")


def curves(records: Records, labels: Labels) -> Html:
    figures = figures_of(records, labels)
    if not figures:
        return Html("<p class=aside>No step was logged yet.</p>")
    marked = any(figure.marks for figure in figures)
    note = "<p class=aside>Red marks on an axis are steps that were left out.</p>" if marked else ""
    return Html(f"<div class=charts>{''.join(chart(figure) for figure in figures)}</div>{note}")


def data(records: Records, labels: Labels) -> Html:
    """What was read, left out and cut, and how long the rows are."""
    rows: list[list[Any]] = []
    named = (
        ("rows read", "read"),
        ("kept", "kept"),
        ("rows of the recipe", "rows"),
        ("tokens", "tokens"),
        ("supervised tokens", "supervised"),
        ("cut to max_length", "cut"),
        ("of them prompts", "prompts_cut"),
        ("supervised tokens lost by cutting", "supervised_lost"),
        ("longest, tokens", "longest"),
    )
    reports = [record.part("data") for record in records]
    for title, key in named:
        if any(report.get(key) for report in reports):
            rows.append([title, *(number(report.get(key)) for report in reports)])
    if any(is_number(report.get("fill")) for report in reports):
        rows.append(["packed rows are full", *(share(report.get("fill")) for report in reports)])
    for key, title in (("dropped", "left out"), ("changed", "changed")):
        for reason in dict.fromkeys(reason for report in reports for reason in as_dict(report.get(key))):
            found = [as_dict(as_dict(report.get(key)).get(reason)) for report in reports]
            cells = []
            for each in found:
                first = [without_paths(str(place)) for place in as_list(each.get("first"))]
                more = f" ({', '.join(first)}{', …' if is_number(each.get('count')) and each['count'] > len(first) else ''})"
                cells.append(f"{number(each.get('count', 0))}{more if first else ''}")
            rows.append([f"{title}: {reason}", *cells])
    parts = [table(["", *labels] if len(records) > 1 else [], rows)] if rows else []
    # of the same rows one picture is enough
    same = len({report.get("fingerprint") for report in reports}) == 1
    shown = list(zip(records, labels))[: 1 if same else None]
    pictures = [picture for record, label in shown for picture in _histograms(record, label, len(shown) > 1)]
    if pictures:
        parts.append(Html(f"<div class=charts>{''.join(pictures)}</div>"))
    notes = [without_paths(str(note)) for report in reports for note in as_list(report.get("notes"))]
    if notes:
        parts.append(Html(f"<ul class=notes>{''.join(f'<li>{esc(note)}</li>' for note in dict.fromkeys(notes))}</ul>"))
    return Html("".join(parts))


def _histograms(record: StageRecord, label: str, named: bool) -> Iterator[Html]:
    unit = str(record.lengths.get("unit", "row"))
    titles = {"length": f"Tokens a {unit}", "supervised": f"Supervised tokens a {unit}"}
    for part in ("training", "held-out"):
        for key, title in titles.items():
            told = as_dict(as_dict(record.lengths.get(part)).get(key))
            edges, whole, cut = (as_list(told.get(name)) for name in ("edges", "whole", "cut"))
            numbers = all(is_number(value) and 0 <= value < 1e15 for value in (*edges, *whole, *cut))
            if (key == "supervised" and part != "training") or len(edges) < 2 or not numbers:
                continue
            if not len(whole) == len(cut) == len(edges) - 1 or edges[-1] <= edges[0]:
                continue
            said = f"{part}; median {number(told.get('median'))}, longest {number(told.get('longest'))}"
            yield bars(f"{label}: {title}" if named else title, said, edges, [("as they were", whole), ("cut", cut)])


def memory(records: Records, labels: Labels) -> Html:
    """What the plan counted, as bars of one scale."""
    accounts = [
        {k: v for k, v in as_dict(r.part("plan").get("account")).items() if is_number(v) and 0 <= v < math.inf}
        for r in records
    ]
    names = [name for name in dict.fromkeys(n for a in accounts for n in a) if name != "peak"]
    if not names:
        return Html("")
    most = max(max(account.values(), default=1) for account in accounts) or 1
    names.sort(key=lambda name: -max(account.get(name, 0) for account in accounts))
    lines = []
    for name in [*names, "peak"]:
        cells = []
        for hue, account in enumerate(accounts):
            wide = 100 * account.get(name, 0) / most
            bar = f'<span class=track><span class="bar fill{hue}" style="width:{wide:.1f}%"></span></span>'
            cells.append(Html(f"{bar}<span class=amount>{esc(gib(account.get(name)))}</span>"))
        lines.append(["the whole, at its peak" if name == "peak" else name, *cells])
    said = []
    for record, label in zip(records, labels):
        plan = record.part("plan")
        keep = [str(k) for k in as_list(plan.get("keep"))]
        counts = ", ".join(f"{k} in {keep.count(k)} layers" for k in dict.fromkeys(keep))
        free = f"{gib(plan.get('free_bytes'))} were free; " if is_number(plan.get("free_bytes")) else ""
        at = f"the peak is at: {plan['at']}; " if isinstance(plan.get("at"), str) else ""
        who = f"{label}: " if len(records) > 1 else ""
        said.append(
            f"{who}{free}{at}{number(plan.get('micro_tokens'))} tokens at once; kept for the backward pass: {counts}."
        )
        if record.on_cpu:
            said[-1] += " On a CPU what is measured is the whole process, libraries and rows included."
    head = ["", *labels] if len(records) > 1 else []
    return Html(table(head, lines, kind="bars") + "".join(f"<p class=aside>{esc(text)}</p>" for text in said))


def results(records: Records, labels: Labels) -> Html:
    """What ``zephyr-lite eval`` found of these stages."""
    parts = []
    for record, label in zip(records, labels):
        for kind, told in record.results.items():
            models = {str(name): dict(leaves(as_dict(body))) for name, body in told["models"].items()}
            keys = list(dict.fromkeys(key for found in models.values() for key in found))
            if not keys:
                continue
            count = as_dict(told.get("data")).get("rows")
            title = f"{label}: {kind}" if len(records) > 1 else kind
            own, of = record.part("own").get("sha256"), [as_dict(link) for link in as_list(told.get("adapters"))]
            if own and of and of[-1].get("sha256") not in (None, own):
                title += " (of another adapter than this stage has now)"
            rows = [[key, *(found.get(key, "–") for found in models.values())] for key in keys]
            on = f" <small>{number(count)} held-out rows</small>" if is_number(count) else ""
            parts.append(f"<h4>{esc(title)}{on}</h4>{table(['', *models], rows, kind='numbers')}")
            lines = "".join(f"<li>{esc(line)}</li>" for line in _compared(told))
            parts.append(f"<ul class=notes>{lines}</ul>" if lines else "")
    if not parts:
        return Html("")
    return Html("".join(parts) + "<p class=aside>In brackets: bootstrap confidence intervals.</p>")


def _compared(told: dict[str, Any]) -> Iterator[str]:
    """How far apart two of the models are, on the same rows."""
    for key, between in (("differences", " minus "), ("comparisons", " against ")):
        pairs = told.get(key)
        entries = [as_dict(entry) for entry in pairs] if isinstance(pairs, list) else []
        for names, entry in as_dict(pairs).items():
            entries.append({"": names, **as_dict(entry)})
        for entry in entries:
            names = between.join(str(value) for value in entry.values() if isinstance(value, str))
            found = "; ".join(f"{name} {value}" for name, value in leaves(entry))
            if found:
                yield f"{names}: {found}"


def leaves(body: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The numbers of a nested result: (path, text); a value with its interval is one of them."""
    for key, value in body.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and is_number(value.get("value")):
            low, high = value.get("low"), value.get("high")
            interval = f" [{number(low)}, {number(high)}]" if is_number(low) and is_number(high) else ""
            yield name, number(value["value"]) + interval
        elif isinstance(value, dict):
            yield from leaves(value, f"{name} ")
        elif is_number(value):
            yield name, number(value)


def configuration(records: Records, labels: Labels) -> Html:
    """What differs, from the published recipe or between two runs; and every key, folded."""
    if not any(record.config for record in records):
        return Html("<p class=aside>There is no config.yaml.</p>")
    keys = list(dict.fromkeys(key for record in records for key in record.config if key not in _MADE_HERE))
    if len(records) > 1:
        sides, head = [record.config for record in records], ["", *labels]
        what, same = "What differs between them", "Nothing differs."
    else:
        sides, head = [records[0].config, records[0].recipe()], ["", "here", "published recipe"]
        what, same = "What differs from the published recipe", "It is the published recipe."
    differ = [key for key in keys if len({_plain(side.get(key)) for side in sides if key in side}) > 1]
    rows = [[key, *(_value(side.get(key)) for side in sides)] for key in differ]
    every = [[key, *(_value(record.config.get(key)) for record in records)] for key in keys]
    names = ["", *labels] if len(records) > 1 else []
    return Html(
        f"<h4>{what}</h4>"
        + (table(head, rows) if rows else f"<p>{same}</p>")
        + f"<details><summary>Every key</summary>{table(names, every, marked=[key in differ for key in keys])}</details>"
    )


def _plain(value: Any) -> str:
    if is_number(value):
        value = float(value)
    if isinstance(value, dict):  # what an older version did not write is None there
        value = {k: v for k, v in value.items() if v not in (None, {}, 1.0)}
    if isinstance(value, list):
        value = [json.loads(_plain(each)) for each in value]
    return json.dumps(value, sort_keys=True)


def _value(value: Any) -> str:
    """A key's value, short: what says nothing is left out of data sets, and of a path only its end is shown."""
    if isinstance(value, str):
        return f"…/{Path(value).name}" if Path(value).is_absolute() or value.startswith("~") else value
    if isinstance(value, list):
        return ", ".join(_value(each) for each in value) or "none"
    if isinstance(value, dict):
        told = {k: _value(v) for k, v in value.items() if v is not None and v != {} and not (k == "weight" and v == 1)}
        path = told.pop("path", None)
        rest = ", ".join(f"{k} {v}" for k, v in told.items())
        return f"{path} ({rest})" if path and rest else path or rest or "auto"
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else number(value)


def lineage(records: Records, labels: Labels) -> Html:
    """Base, adapters below, rows: by content."""
    rows: list[list[Any]] = []
    bases = [record.part("base") for record in records]
    rows.append(["base", *(_base(base) for base in bases)])
    for place in range(max(len(as_list(record.info.get("adapters"))) for record in records)):
        rows.append([f"adapter below, {place + 1}" if place else "adapter below", *(_below(r, place) for r in records)])
    hashes = (
        ("its own adapter", "own", "sha256"),
        ("rows", "data", "fingerprint"),
        ("held-out rows", "eval_data", "fingerprint"),
        ("chat template", "data", "template_sha256"),
        ("tokenizer", "data", "tokenizer_sha256"),
    )
    for title, part, key in hashes:
        found = [record.part(part).get(key) for record in records]
        if any(found):
            rows.append([title, *(Html(f"<code>{esc(value)}</code>") if value else "–" for value in found)])
    if any(record.complete for record in records):
        rows.append(["the whole chain in one", *(_hash(record.info.get("adapter_sha256")) for record in records)])
    return table(["", *labels] if len(records) > 1 else [], rows, kind="facts hashes")


def _hash(value: Any) -> Html:
    return Html(f"<code>{esc(value)}</code>") if value else Html("–")


def _base(base: dict[str, Any]) -> Html:
    name = str(base.get("name_or_path", "–"))
    local = Path(name).is_absolute() or name.startswith(("~", "."))
    shown = f"{Path(name).name} (a local folder)" if local else f"{name} ({base.get('revision', 'main')})"
    how = "NF4, " if base.get("load_in_4bit") else ""
    return Html(
        f"{esc(shown)}, {esc(how)}computed in {esc(base.get('dtype', '–'))}<br>{_hash(base.get('fingerprint'))}"
    )


def _below(record: StageRecord, place: int) -> Html:
    links = as_list(record.info.get("adapters"))
    if place >= len(links):
        return Html("–")
    link = as_dict(links[place])
    name, sha = str(link.get("path", "")), link.get("sha256")
    stage = Path(name).parts[0] if name and not Path(name).is_absolute() else ""
    known = ""
    if stage in record.own:
        same = record.own[stage] == sha
        known = ", as it is in this run" if same else ": NOT what lies there now; that was trained or replaced since"
    return Html(f"{esc(_value(name))}{esc(known)}<br>{_hash(sha)}")


def environment(records: Records, labels: Labels) -> Html:
    """On what, with what, when; and each start that went on."""
    rows: list[list[Any]] = []
    for key in ("device", "processor", "dtype"):
        rows.append([key, *(str(as_dict(record.info.get("machine")).get(key, "–")) for record in records)])
    rows.append(["threads", *(number(record.part("plan").get("threads")) for record in records)])
    rows.append(["engine", *(str(record.info.get("engine", "–")) for record in records)])
    versions = [as_dict(record.info.get("versions")) for record in records]
    for name in dict.fromkeys(name for each in versions for name in each):
        rows.append([name, *(str(each.get(name, "–")) for each in versions)])
    rows.append(["begun", *(moment(record.info.get("created", "–")) for record in records)])
    rows.append(["finished", *(moment(record.info.get("finished", "not yet")) for record in records)])
    differ = [len(set(row[1:])) > 1 for row in rows]
    parts = [table(["", *labels] if len(records) > 1 else [], rows, marked=differ)]
    for record, label in zip(records, labels):
        lines = []
        for entry in as_list(record.info.get("resumed")):
            entry = as_dict(entry)
            changed = (
                "; ".join(without_paths(str(each)) for each in as_list(entry.get("changed"))) or "nothing was changed"
            )
            lines.append(
                f"<li>{esc(moment(entry.get('at')))}: went on from step {esc(entry.get('step'))}; {esc(changed)}</li>"
            )
        if lines:
            who = f"{label}: " if len(records) > 1 else ""
            parts.append(Html(f"<h4>{esc(who)}Starts that went on</h4><ul class=notes>{''.join(lines)}</ul>"))
    return Html("".join(parts))
