"""``report.html``: one self-contained file about a run's stages, or about two runs side by side.

This module computes what the template ``report.html.j2`` lays out from the stages' files (``records``). Imports no torch.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from .. import __version__
from ..config.load import DPO_DEFAULTS, RunConfig
from ..errors import UserError
from .charts import Curve, charts_of, is_number, line_chart, number
from .console import visible
from .records import StageRecord, gib, share

REPORT = "report.html"
MARK = Markup("<!-- a report of zephyr-lite -->")  # by which a report is recognized
_METHODS = {"sft": "supervised fine-tuning", "dpo": "preference optimization"}
SAMPLES = 6  # prompts that are shown
LEFT_OUT = 20  # steps that are named
# an absolute path of two parts or more, and its last part
_PATH = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?(?:[/\\][\w.@+=-]+)+[/\\]([\w.@+=-]+)[/\\]?")


# the sections of a page: name, one stage or two of the same method, and the labels of two
_Groups = list[tuple[str, Sequence[StageRecord], Sequence[str]]]


def side_by_side(first: Sequence[StageRecord], second: Sequence[StageRecord]) -> str:
    """The page of two runs, or of two stages: stages of one name side by side, then the others."""
    pairs = [(one, other) for one in first for other in second if one.name == other.name]
    if len(first) == len(second) == 1:
        pairs = [(first[0], second[0])]
    if not pairs:
        names = [", ".join(record.name for record in records) for records in (first, second)]
        raise UserError(
            f"the runs have no stage in common ({names[0]}; {names[1]}).", "Name two stages: runs/A/sft runs/B/sft"
        )
    one, other = pairs[0]
    labels = [one.run, other.run]
    if one.run == other.run:  # two stages of one run, or runs of one name in different folders
        labels = [one.name, other.name]
        if one.name == other.name:
            labels = [f"{record.folder.absolute().parent.parent.name}/{record.run}" for record in pairs[0]]
    groups: _Groups = []
    for one, other in pairs:
        if one.method != other.method:
            raise UserError(
                f"{one.folder} is {one.method}, and {other.folder} is {other.method}: their metrics cannot be compared.",
                "Name two stages of one method.",
            )
        one.who, other.who = (f"{label}: " for label in labels)
        groups.append((one.name if one.name == other.name else " and ".join(labels), [one, other], labels))
    for records, label in ((first, labels[0]), (second, labels[1])):
        groups += [(f"{label} / {record.name}", [record], []) for record in records if not record.who]
    return _page(" and ".join(labels), groups)


def run_page(records: Sequence[StageRecord]) -> str:
    """The page of one run's stages."""
    title = records[0].run if len(records) > 1 else f"{records[0].run} / {records[0].name}"
    groups: _Groups = []
    for record in records:
        groups.append((record.name, [record], []))
    return _page(title, groups, general_text(records))


def general_text(records: Sequence[StageRecord]) -> str:
    """``General text: 2.91 nats a token before, 2.95 after sft, 2.97 after dpo``; empty if no stage measured it."""
    losses: list[str] = []
    for record in records:
        if found := record.info["result"].get("general_loss"):
            losses = losses or [f"{found['before']:.2f} nats a token before"]
            losses.append(f"{found['after']:.2f} after {record.name}")
    return f"General text: {', '.join(losses)}" if losses else ""


def _page(title: str, groups: _Groups, general: str = "") -> str:
    script = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(loader=jinja2.PackageLoader(__package__, ""), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    for function in (number, share, gib, without_paths, value_text, places):
        environment.filters[function.__name__] = function
    environment.filters["counted"] = Counter
    page = environment.get_template("report.html.j2").render(
        mark=MARK,
        title=title,
        general=general,
        stages=[_section(*group) for group in groups],
        version=__version__,
        now=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return visible(page) + "\n"


def _section(name: str, records: Sequence[StageRecord], labels: Sequence[str]) -> dict[str, Any]:
    """What the page shows of a stage, or of the same stage of two runs."""
    first, last = records[0], records[-1]
    warnings: list[str] = []
    results: list[dict[str, Any]] = []
    samples: dict[str, dict[str, Any]] = {}
    notes: dict[str, None] = {}
    facts: dict[StageRecord, dict[str, str]] = {}
    lengths: list[dict[str, Any]] = []
    same_rows = first.info["data"].get("fingerprint") == last.info["data"].get("fingerprint")
    for place, record in enumerate(records):
        facts[record] = record.facts()
        warnings.extend(record.who + without_paths(text) for text in record.info["result"].get("warnings") or ())
        for line in record.left_out[:LEFT_OUT]:
            rows = ", ".join(map(without_paths, (line.get("rows") or [])[:3])) or "unknown"
            loss = f"loss {number(line.get('loss'))}, gradient norm {number(line.get('grad_norm'))}"
            warnings.append(f"{record.who}step {line.get('step')} was left out ({loss}); rows: {rows}")
        if len(record.left_out) > LEFT_OUT:
            warnings.append(f"{record.who}more steps were left out; left_out.jsonl has them all")
        results += _results(record)
        for line in record.samples:
            sample = samples.setdefault(line["prompt"], {"prompt": line["prompt"], "answers": [{}, {}]})
            sample["answers"][place][line["step"]] = line["answer"]
            sample["reference"] = line.get("reference")
        notes |= dict.fromkeys(map(without_paths, record.info["data"].get("notes") or ()))
        if place and same_rows:
            continue
        for part, key, quantity in (
            ("training", "length", "Tokens"),
            ("training", "supervised", "Supervised tokens"),
            ("held-out", "length", "Tokens"),
        ):
            if counts := record.lengths.get(part, {}).get(key):
                title = f"{'' if same_rows else record.who}{quantity} a {record.lengths['unit']}"
                about = f"{part}; median {number(counts['median'])}, longest {number(counts['longest'])}"
                edges = np.asarray(counts["edges"])
                middles = ((edges[:-1] + edges[1:]) / 2).tolist()
                curves = [Curve("complete", middles, counts["whole"])]
                if any(counts["cut"]):
                    curves.append(Curve("cut", middles, counts["cut"], hue=1))
                lengths.append(line_chart(title, about, curves, bounds=(0,), x_name="tokens"))
    reasons = [
        (key, title, {**(first.info["data"].get(key) or {}), **(last.info["data"].get(key) or {})})
        for key, title in (("dropped", "left out"), ("changed", "changed"))
    ]
    recipe = RunConfig.model_validate(DPO_DEFAULTS if first.method == "dpo" else {}).model_dump(mode="json")
    other = last.config if labels else recipe
    keys, differences = [], []
    for key in {**first.config, **last.config}:
        here = value_text(first.config[key]) if key in first.config else ""
        there = value_text(other[key]) if key in other else ""
        keys.append([key, here, there] if labels else [key, here])
        # a key that an older version did not write has its default
        if key not in ("output_dir", "stage") and here and there and here != there:
            differences.append([key, here, there])
    planned = {**last.planned, **first.planned}
    return {
        "name": name,
        "records": records,
        "labels": labels,
        "head": ["", *labels] if labels else [],
        "method": _METHODS[first.method],
        "facts": facts,
        "warnings": warnings,
        "curves": charts_of(records, labels),
        "samples": list(samples.values())[:SAMPLES],
        "more_samples": len(samples) - SAMPLES,
        "results": results,
        "reasons": reasons,
        "data_notes": list(notes),
        "lengths": lengths,
        "parts": sorted(planned, key=planned.__getitem__, reverse=True),
        "most": max(first.planned.get("peak", 0), last.planned.get("peak", 0)) or 1,
        "config": keys,
        "differences": differences,
        "below": max(len(first.info["adapters"]), len(last.info["adapters"])),
        "versions": list({**first.info["versions"], **last.info["versions"]}),
    }


def _results(record: StageRecord) -> Iterator[dict[str, Any]]:
    """The results of ``zephyr-lite eval`` for a stage: a table of models, and differences between two of them."""
    for kind, result in record.results.items():
        own, links = record.info["own"].get("sha256"), result.get("adapters")
        other = own and links and links[-1].get("sha256") not in (None, own)
        yield {
            "title": record.who + kind + (" (of another adapter than this stage has now)" if other else ""),
            "count": (result.get("data") or {}).get("rows"),
            **result_tables(result),
        }


def result_tables(result: dict[str, Any]) -> dict[str, Any]:
    """Of an evaluation's result: ``header`` and ``rows`` of the table of models, and ``compared``, a line for two of them."""
    models = {name: dict(leaves(body)) for name, body in result["models"].items()}
    keys = dict.fromkeys(key for numbers in models.values() for key in numbers)
    compared = []
    for key, between in (("differences", " minus "), ("comparisons", " against ")):
        entries = result.get(key) or ()
        if isinstance(entries, dict):
            entries = [{"": names, **entry} for names, entry in entries.items()]
        for entry in entries:
            names = between.join(value for value in entry.values() if isinstance(value, str))
            compared.append(f"{names}: {'; '.join(f'{name} {value}' for name, value in leaves(entry))}")
    rows = [[key, *(numbers.get(key, "–") for numbers in models.values())] for key in keys]
    return {"header": ["", *models], "rows": rows, "compared": compared}


def leaves(body: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The numbers of a nested result as (path, text); a value with its interval or standard error is one."""
    for key, value in body.items():
        if is_number(value):
            yield f"{prefix}{key}", number(value)
        elif isinstance(value, dict) and is_number(value.get("value")):
            spread = f" ± {number(value['stderr'])}" if is_number(value.get("stderr")) else ""
            if is_number(value.get("low")):
                spread = f" [{number(value['low'])}, {number(value['high'])}]"
            yield f"{prefix}{key}", number(value["value"]) + spread
        elif isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key} ")


# Filters of the template


def value_text(value: Any) -> str:
    """A configuration value in short: data sets without defaults, of absolute paths the name."""
    if value is None or value == {}:
        return "none"
    if isinstance(value, str):
        return f"…/{Path(value).name}" if Path(value).is_absolute() or value.startswith("~") else value
    if isinstance(value, list):
        return ", ".join(map(value_text, value)) or "none"
    if isinstance(value, dict):
        path, parts = value_text(value.get("path") or ""), []
        for key, own in value.items():
            if key != "path" and own not in (None, {}) and not (key == "weight" and own == 1):
                parts.append(f"{key} {value_text(own)}")
        rest = ", ".join(parts)
        return f"{path} ({rest})" if path and rest else path or rest or "auto"
    return str(value).lower() if isinstance(value, bool) else number(value)


def places(entry: dict[str, Any] | None) -> str:
    """A count of rows with the first few of them: ``7 (…/rows.jsonl row 4, …)``."""
    count, first = (entry or {}).get("count", 0), (entry or {}).get("first", ())
    more = ", …" if count > len(first) else ""
    return number(count) + (f" ({', '.join(map(without_paths, first))}{more})" if first else "")


def without_paths(text: Any) -> str:
    """A sentence with ``…/name`` instead of absolute paths, which tell about the user's machine."""
    return _PATH.sub(r"…/\1", str(text))
