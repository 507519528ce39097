"""``report.html``: one self-contained file about a run's stages, or about two runs side by side.

This module computes what the template ``report.html.j2`` shows; ``charts`` draws the curves.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .. import __version__
from ..errors import UserError
from ..io.text import duration
from .charts import chart, figures_of, histogram, number
from .console import visible
from .stage_record import StageRecord, is_number

REPORT = "report.html"
MARK = Markup("<!-- a report of zephyr-lite -->")  # by which a report is recognized
_METHODS = {"sft": "supervised fine-tuning", "dpo": "direct preference optimization"}
_OF_THE_RUN = ("output_dir", "stage")  # keys that differ between any two runs
COUNTS = {  # keys of the data report
    "read": "rows read",
    "kept": "kept",
    "rows": "packed rows",
    "tokens": "tokens",
    "supervised": "supervised tokens",
    "cut": "cut to max_length",
    "prompts_cut": "of them prompts",
    "supervised_lost": "supervised tokens lost by cutting",
    "longest": "longest, tokens",
}
SAMPLES, BETWEEN = 6, 8  # prompts; answers between the first and the last of each
_PATH = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?(?:[/\\][\w.@+=-]+){2,}/?")  # absolute, of two parts or more
Records = Sequence[StageRecord]


@dataclass
class Table:
    """Rows of a name and one value per stage.

    Attributes:
        head: column titles; [] for none.
        marked: indices of highlighted rows.
    """

    head: Sequence[str]
    rows: list[list[Any]]
    kind: str = "facts"
    marked: Sequence[int] = ()


@dataclass
class Group:
    """What one section of the page is about: a stage, or the same stage of two runs.

    Attributes:
        labels: the names of the two runs; [] for one stage.
    """

    name: str
    records: Records
    labels: Sequence[str] = ()

    @property
    def head(self) -> list[str]:
        return ["", *self.labels] if self.labels else []

    def named(self) -> Iterator[tuple[StageRecord, str]]:
        """Each record with a prefix for sentences about it."""
        for place, record in enumerate(self.records):
            yield record, f"{self.labels[place]}: " if self.labels else ""


def run_page(records: Records) -> str:
    """The page of one run's stages."""
    name = records[0].run if len(records) > 1 else f"{records[0].run} / {records[0].name}"
    return _page(name, [Group(record.name, [record]) for record in records])


def side_by_side(first: Records, second: Records) -> str:
    """The page of two runs, or of two stages: stages of one name side by side, then the others.

    Raises:
        UserError: they have no stage in common, or stages of one name have different methods.
    """
    if len(first) == len(second) == 1:
        pairs = [(first[0], second[0])]
    else:
        pairs = [(one, other) for one in first for other in second if one.name == other.name]
    if not pairs:
        names = [", ".join(r.name for r in records) for records in (first, second)]
        raise UserError(
            f"the runs have no stage in common ({names[0]}; {names[1]}).", "Name two stages: runs/A/sft runs/B/sft"
        )
    for one, other in pairs:
        if one.method != other.method:
            raise UserError(
                f"{one.folder} is {one.method}, and {other.folder} is {other.method}: their numbers mean different things.",
                "Name two stages of one method.",
            )
    labels = _labels(*pairs[0])
    groups = [
        Group(one.name if one.name == other.name else " and ".join(labels), [one, other], labels)
        for one, other in pairs
    ]
    paired = {id(record) for pair in pairs for record in pair}
    for side, label in zip((first, second), labels):
        groups += [Group(f"{label} / {record.name}", [record]) for record in side if id(record) not in paired]
    return _page(" and ".join(labels), groups)


def _labels(one: StageRecord, other: StageRecord) -> list[str]:
    """Distinct names: of the runs, of the stages of one run, or with the parent folder of runs of one name."""
    if one.run != other.run:
        return [one.run, other.run]
    if one.name != other.name:
        return [one.name, other.name]
    above = [record.folder.absolute().parent.parent.name for record in (one, other)]
    return [f"{place}/{one.run}" for place in above] if above[0] != above[1] else [f"{one.run} (A)", f"{one.run} (B)"]


def _page(title: str, groups: Sequence[Group]) -> str:
    script = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(loader=jinja2.PackageLoader(__package__, ""), autoescape=True)
    for function in (number, share, gib, moment, without_paths, shortened, value_text, places):
        environment.filters[function.__name__] = function
    environment.filters["counted"] = lambda values: Counter(values).items()
    page = environment.get_template("report.html.j2").render(
        mark=MARK,
        title=title,
        stages=[_stage(group) for group in groups],
        version=__version__,
        now=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return visible(page) + "\n"


def _stage(group: Group) -> dict[str, Any]:
    figures = figures_of(group.records, group.labels)
    prompts = _samples(group)
    return {
        "name": group.name,
        "records": group.records,
        "labels": group.labels,
        "method": _METHODS.get(group.records[0].method, ""),
        "states": [who + _state(record) for record, who in group.named()],
        "overview": _overview(group),
        "warnings": list(_warnings(group)),
        "curves": [chart(figure) for figure in figures],
        "steps_left_out": any(figure.marks for figure in figures),
        "samples": prompts[:SAMPLES],
        "more_samples": len(prompts) - SAMPLES,
        "results": list(_results(group)),
        "counts": COUNTS,
        "reasons": [
            (key, title, list(dict.fromkeys(name for record in group.records for name in record.data_part(key))))
            for key, title in (("dropped", "left out"), ("changed", "changed"))
        ],
        "data_notes": list(
            dict.fromkeys(
                without_paths(line) for record in group.records for line in record.part("data").get("notes") or ()
            )
        ),
        "lengths": list(_lengths(group)),
        "parts": _memory_parts(group),
        "most": max((value for record in group.records for value in record.planned.values()), default=0) or 1,
        **_configuration(group),
        "below": max(len(record.links) for record in group.records),
        "versions": list(dict.fromkeys(name for record in group.records for name in record.part("versions"))),
    }


def _state(record: StageRecord) -> str:
    if record.complete:
        times = len(record.info.get("resumed") or [])
        return "finished" + (f", after {times} {'interruption' if times == 1 else 'interruptions'}" if times else "")
    return f"not finished, step {number(record.step)}" + (f" of {number(t)}" if (t := record.total()) else "")


def _overview(group: Group) -> Table:
    facts = [dict(_facts(record)) for record in group.records]
    names = dict.fromkeys(name for each in facts for name in each)
    return Table(group.head, [[name, *(each.get(name, "–") for each in facts)] for name in names])


def _facts(record: StageRecord) -> Iterator[tuple[str, Any]]:
    result, total = record.part("result"), record.total()
    finished = record.complete or total is None
    yield "steps", number(record.step) if finished else f"{number(record.step)} of {number(total)}"
    losses = record.points("eval_loss")[1]
    if losses:
        yield "held-out loss", f"{number(losses[0])} → {number(losses[-1])}" if len(losses) > 1 else number(losses[0])
    if ys := record.points("loss")[1]:
        yield "training loss, start → end", f"{number(_end(ys, first=True))} → {number(_end(ys))}"
    best = result.get("best")
    if len(losses) > 2 and best:
        yield "best held-out loss", f"{number(best[0])} (step {number(best[1])})"
    if record.method == "dpo":
        for name, key, form in (("preference accuracy", "accuracies", share), ("margin", "margins", number)):
            held = record.last(f"eval_rewards/{key}")
            value = held if held is not None else _end(record.points(f"rewards/{key}")[1])
            yield name + (", held-out" if held is not None else ""), form(value)
    elif (held := record.last("eval_mean_token_accuracy")) is not None:
        yield "token accuracy, held-out", share(held)
    for unit in ("tokens", "pairs"):
        if speeds := _finite(record.points(f"{unit}_per_second")[1]):
            yield f"{unit} a second", number(float(f"{statistics.median(speeds):.3g}"))
    if is_number(result.get("seconds")) and math.isfinite(result["seconds"]):
        yield "time, last start" if record.info.get("resumed") else "time", duration(result["seconds"])
    elif (
        total is not None and not finished and record.step < total and (seconds := _finite(record.points("seconds")[1]))
    ):
        yield "left, at this speed", duration(statistics.median(seconds) * (total - record.step))
    peak, planned = result.get("peak_memory_bytes"), record.planned.get("peak")
    if not is_number(peak) and (measured := _finite(record.points("peak_memory_gib")[1])):
        peak = max(measured) * 2**30
    if is_number(peak) and planned:
        yield "memory, measured / planned", f"{peak / 2**30:.2f} / {planned / 2**30:.2f} GiB"
    elif is_number(peak):
        yield "memory, measured", gib(peak)
    elif planned:
        yield "memory planned", gib(planned)
    if left := result.get("steps_left_out", len(record.left_out)):
        yield "steps left out", number(left)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _end(values: Sequence[float], *, first: bool = False) -> float | None:
    """The mean of the last (or first) tenth."""
    fine = _finite(values)
    count = max(1, len(fine) // 10)
    return statistics.fmean(fine[:count] if first else fine[-count:]) if fine else None


def _warnings(group: Group) -> Iterator[str]:
    for record, who in group.named():
        for text in record.part("result").get("warnings") or ():
            yield f"{who}{without_paths(text)}"
        for line in record.left_out[:20]:
            rows = ", ".join(without_paths(row) for row in (line.get("rows") or [])[:3]) or "unknown"
            loss = f"loss {number(line.get('loss'))}, gradient norm {number(line.get('grad_norm'))}"
            yield f"{who}step {line.get('step')} was left out ({loss}); rows: {rows}"
        if len(record.left_out) > 20:
            yield f"{who}and {len(record.left_out) - 20:,} more steps were left out (left_out.jsonl)"


def _samples(group: Group) -> list[dict[str, Any]]:
    """Each prompt with the first and last answers, those between them (of one stage), and the held-out row's answer."""
    found: dict[str, list[dict[int, str]]] = {}
    references: dict[str, str | None] = {}
    for place, record in enumerate(group.records):
        for line in record.samples:
            stages = found.setdefault(line["prompt"], [{} for _ in group.records])
            stages[place][line["step"]] = line["answer"]
            references[line["prompt"]] = line.get("reference")
    samples = []
    for prompt, stages in found.items():
        answers, between = [], []
        for by_step, (_, who) in zip(stages, group.named()):
            steps = sorted(by_step)
            # of two runs only the last answers are compared
            for step in dict.fromkeys(steps[-1:] if group.labels else [*steps[:1], *steps[-1:]]):
                answers.append((who + (f"step {step}" if step else "before training"), by_step[step]))
            inner = [] if group.labels else steps[1:-1]
            if len(inner) > BETWEEN:
                inner = [inner[round(i * (len(inner) - 1) / (BETWEEN - 1))] for i in range(BETWEEN)]
            between += [(f"step {step}", by_step[step]) for step in inner]
        samples.append({"prompt": prompt, "answers": answers, "between": between, "reference": references[prompt]})
    return samples


def places(entry: Any) -> str:
    entry = entry or {}
    count, first = entry.get("count", 0), [without_paths(place) for place in entry.get("first", ())]
    more = ", …" if count > len(first) else ""
    return number(count) + (f" ({', '.join(first)}{more})" if first else "")


def _lengths(group: Group) -> Iterator[Markup]:
    same = len({record.part("data").get("fingerprint") for record in group.records}) == 1
    shown = list(group.named())[: 1 if same else None]
    for record, who in shown:
        unit = record.lengths.get("unit", "row")
        for part, key, title in (
            ("training", "length", f"Tokens a {unit}"),
            ("training", "supervised", f"Supervised tokens a {unit}"),
            ("held-out", "length", f"Tokens a {unit}"),
        ):
            counts = record.lengths.get(part, {}).get(key)
            if counts:
                said = f"{part}; median {number(counts['median'])}, longest {number(counts['longest'])}"
                stacks = [("as they were", counts["whole"]), ("cut", counts["cut"])]
                yield histogram(f"{who}{title}" if len(shown) > 1 else title, said, counts["edges"], stacks)


def _memory_parts(group: Group) -> list[str]:
    """The names of the plan's parts, the largest first, ``peak`` last."""
    accounts = [record.planned for record in group.records]
    names = dict.fromkeys(name for account in accounts for name in account if name != "peak")
    ordered = sorted(names, key=lambda name: -max(account.get(name, 0) for account in accounts))
    return [*ordered, "peak"] if ordered else []


def _results(group: Group) -> Iterator[dict[str, Any]]:
    """The results of ``zephyr-lite eval`` for these stages."""
    for record, who in group.named():
        for kind, result in record.results.items():
            models = {name: dict(leaves(body)) for name, body in result["models"].items()}
            keys = dict.fromkeys(key for found in models.values() for key in found)
            if not keys:
                continue
            own, links = record.part("own").get("sha256"), result.get("adapters")
            other = own and links and links[-1].get("sha256") not in (None, own)
            count = (result.get("data") or {}).get("rows")
            rows = [[key, *(found.get(key, "–") for found in models.values())] for key in keys]
            yield {
                "title": f"{who}{kind}" + (" (of another adapter than this stage has now)" if other else ""),
                "rows": number(count) if is_number(count) else "",
                "table": Table(["", *models], rows, "numbers"),
                "compared": list(_compared(result)),
            }


def _compared(result: dict[str, Any]) -> Iterator[str]:
    """Differences between two of the models on the same rows."""
    for key, between in (("differences", " minus "), ("comparisons", " against ")):
        entries = result.get(key)
        if isinstance(entries, dict):
            entries = [{"": names, **entry} for names, entry in entries.items()]
        for entry in entries or ():
            names = between.join(value for value in entry.values() if isinstance(value, str))
            if found := "; ".join(f"{name} {value}" for name, value in leaves(entry)):
                yield f"{names}: {found}"


def leaves(body: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The numbers of a nested result as (path, text); a value with its confidence interval is one."""
    for key, value in body.items():
        if isinstance(value, dict) and is_number(value.get("value")):
            low, high = value.get("low"), value.get("high")
            interval = f" [{number(low)}, {number(high)}]" if is_number(low) and is_number(high) else ""
            yield f"{prefix}{key}", number(value["value"]) + interval
        elif isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key} ")
        elif is_number(value):
            yield f"{prefix}{key}", number(value)


def _configuration(group: Group) -> dict[str, Any]:
    """The keys that differ from the published recipe, or between two runs; and all keys."""
    configs = [record.config for record in group.records]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in _OF_THE_RUN]
    sides = configs if group.labels else [configs[0], group.records[0].recipe()]
    head = group.head or ["", "here", "published recipe"]
    differ = [key for key in keys if len({_comparable(side[key]) for side in sides if key in side}) > 1]
    rows = [[key, *(value_text(side.get(key)) for side in sides)] for key in differ]
    every = [[key, *(value_text(config.get(key)) for config in configs)] for key in keys]
    marked = [place for place, key in enumerate(keys) if key in differ]
    return {"differences": Table(head, rows), "all_keys": Table(group.head, every, marked=marked) if keys else None}


def _comparable(value: Any) -> str:
    if isinstance(value, dict):  # keys that an older version did not write have their defaults
        value = {k: v for k, v in value.items() if v not in (None, {}, 1.0)}
    if isinstance(value, list):
        value = [json.loads(_comparable(each)) for each in value]
    return json.dumps(float(value) if is_number(value) else value, sort_keys=True)


def value_text(value: Any) -> str:
    """A configuration value in short: data sets without defaults, of absolute paths the name."""
    if isinstance(value, str):
        return f"…/{Path(value).name}" if Path(value).is_absolute() or value.startswith("~") else value
    if isinstance(value, list):
        return ", ".join(value_text(each) for each in value) or "none"
    if isinstance(value, dict):
        parts = {k: value_text(v) for k, v in value.items() if v not in (None, {}) and not (k == "weight" and v == 1)}
        path = parts.pop("path", "")
        rest = ", ".join(f"{k} {v}" for k, v in parts.items())
        return f"{path} ({rest})" if path and rest else path or rest or "auto"
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else number(value)


def shortened(text: str) -> str:
    """A text of at most 2,000 characters."""
    return text if len(text) <= 2000 else f"{text[:2000]} … ({len(text) - 2000:,} more characters)"


def share(value: Any) -> str:
    return f"{value:.1%}" if is_number(value) and math.isfinite(value) else "–"


def gib(value: Any) -> str:
    """Bytes in GiB, or in MiB below 0.5 GiB."""
    if not is_number(value):
        return "–"
    mib = value / 2**20
    return f"{mib / 1024:.2f} GiB" if mib >= 512 else f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def moment(value: Any) -> str:
    """``2026-11-21 19:22 UTC`` of an ISO time in UTC."""
    text = str(value)
    return f"{text[:10]} {text[11:16]} UTC" if re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d", text) else text


def without_paths(text: Any) -> str:
    """A sentence with ``…/name`` instead of absolute paths, which tell about the user's machine."""
    return _PATH.sub(lambda found: "…/" + re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], str(text))
