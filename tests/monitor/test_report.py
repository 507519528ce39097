"""report.html: its values are those of the run's files, rows are shown as text, and it loads nothing."""

import base64
import hashlib
import html.parser
import json
import math
import os
import re

import pytest

from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import dump_config, load_config
from zephyr_lite.monitor import report_writer
from zephyr_lite.monitor.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Curve,
    line_chart,
)
from zephyr_lite.monitor.records import read_source
from zephyr_lite.monitor.report import MARK, run_page
from zephyr_lite.monitor.report_writer import ReportWriter

VOID = {"meta", "br", "link", "img", "input", "hr"}
EVIL = '</pre></script><script>alert("x")</script><img src=x onerror=alert(1)>'
SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123"


class Page(html.parser.HTMLParser):
    """Tags must close one another; keeps texts, scripts and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.scripts, self.texts, self.attributes, self.kinds = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag == "script":
            self.kinds.append(dict(attributes).get("type"))
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)

    def charts(self):
        return [json.loads(s) for s, kind in zip(self.scripts, self.kinds) if kind == "application/json"]


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def a_stage(run, name="sft", method="sft", steps=12, *, complete=True, words=(), **info):
    """A stage's folder with everything but weights."""
    folder = run / name
    folder.mkdir(parents=True)
    config = load_config(method, None, [f"output_dir={run}", *words]).config
    (folder / "config.yaml").write_text(dump_config(config))
    told = {
        "format": 1,
        "id": "x",
        "method": method,
        "stage": name,
        "status": "complete" if complete else "running",
        "engine": "fused",
        "base": {"name_or_path": "/home/somebody/models/tiny", "fingerprint": "f00d"},
        "adapters": [],
        "versions": {"torch": "2.13"},
        "machine": {"host": "hidden-host", "device": "cpu", "dtype": "float32"},
        "plan": {
            "keep": ["all", "input"],
            "micro_tokens": 64,
            "threads": 1,
            "free_bytes": 2**33,
            "account": {"decoder layers": 2**29, "peak": 2**30},
        },
        "data": {
            "rows": 24,
            "kept": 20,
            "read": 30,
            "cut": 3,
            "dropped": {"no supervised token": {"count": 7, "first": ["/data/mine/rows.jsonl row 4"]}},
        },
        "created": f"2026-01-0{1 + (method == 'dpo')}T10:00:00+00:00",
        "own": {"path": "adapter", "sha256": f"own-{name}"},
        **info,
    }
    if complete:
        told["result"] = {"steps": steps, "seconds": 100.0, "peak_memory_bytes": 2**31, "warnings": ["it wavers"]}
    (folder / "stage.json").write_text(json.dumps(told))
    logged = []
    for step in range(1, steps + 1):
        both = {"step": step, "loss": 2 - step / steps, "grad_norm": 0.5, "learning_rate": 1e-4, "seconds": 2.0}
        if method == "sft":
            logged.append({**both, "tokens_per_second": 99.0, "peak_memory_gib": 0.75})
        else:
            rewards = {"rewards/chosen": 0.1 * step, "rewards/rejected": -0.1 * step, "rewards/accuracies": 0.75}
            logged.append({**both, **rewards, "rewards/margins": 0.2 * step, "pairs_per_second": 0.5})
        if step % 4 == 0:
            logged.append({"step": step, "eval_loss": 1.875 - step / steps})
    lines(folder / "metrics.jsonl", logged)
    return folder


@pytest.fixture
def run(tmp_path):
    """A run of two stages; the second has not finished."""
    run = tmp_path / "runs" / "mine"
    sft = a_stage(run)
    lines(
        sft / "samples.jsonl",
        [
            {"step": s, "prompt": f"Question {EVIL}?", "answer": f"answer {s} {SECRET}", "reference": "r"}
            for s in (0, 4, 12)
        ],
    )
    lines(
        sft / "left_out.jsonl",
        [{"step": 5, "loss": math.nan, "grad_norm": 1.0, "rows": ["/data/mine/rows.jsonl row 9"]}],
    )
    (sft / "eval").mkdir()
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    told = {"models": {"base": {"loss": 2.0}, "sft": {"loss": interval}}, "data": {"rows": 7}}
    told["differences"] = [{"model": "sft", "minus": "base", "loss": interval}]
    told["adapters"] = [{"sha256": "own-sft"}]
    (sft / "eval" / "loss.json").write_text(json.dumps(told))
    below = [{"path": "sft/adapter", "sha256": "own-sft"}]
    a_stage(run, "dpo", "dpo", 8, complete=False, adapters=below, words=["dataset=rows.jsonl", f"system={EVIL}"])
    return run


@pytest.mark.parametrize(("loss", "name"), [("sigmoid", "DPO"), ("kto", "kto"), ("simpo,sft", "simpo + sft")])
def test_the_loss_has_its_name(tmp_path, loss, name):
    a_stage(tmp_path / "mine", "dpo", "dpo", words=[f"loss_type={loss}"])
    text = run_page(read_source(tmp_path / "mine"))
    assert f"{name} loss" in text and ("DPO loss" in text) == (loss == "sigmoid")
    assert ("share of rows" in text) == (loss == "kto")


def test_a_page_says_what_the_files_say_and_loads_nothing(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    text = run_page(read_source(run))
    page = Page(text)
    assert text.startswith("<!doctype html>") and MARK in text[:100]
    # no address, and no script but ours, which the policy knows by its hash
    assert not [
        a for a in page.attributes if a[1] in ("src", "onerror", "srcset") or (a[1] == "href" and a[2][0] != "#")
    ]
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", text) and "url(" not in text
    code = [s for s, kind in zip(page.scripts, page.kinds) if kind is None]
    policy = next(a[2] for a in page.attributes if a[1] == "content" and "default-src" in a[2])
    assert len(code) == 1 and "default-src 'none'" in policy
    assert f"'sha256-{base64.b64encode(hashlib.sha256(code[0].encode()).digest()).decode()}'" in policy
    # what rows hold stands there as text; secrets and whose machine it was do not
    assert f"Question {EVIL}?" in page.text and EVIL in page.text.split("Configuration")[-1]
    assert "answer 12 ***" in page.text and SECRET not in text
    assert (
        "hidden-host" not in text
        and "somebody" not in text
        and "/data/mine" not in text
        and str(run.parent) not in text
    )
    for told in (
        "tiny (a local folder)",
        "no supervised token",
        "7 (…/rows.jsonl row 4, …)",
        "it wavers",
        "…/rows.jsonl row 9",
        "step 5 was left out (loss not finite",
        "before training",
        "step 12",
        "in between",
        "2.00 GiB, planned 1.00 GiB",
        "8 of 2",
        "unchanged in this run",
        "1.542 → 0.875",
        "all in 1 layers, input in 1 layers",
        "2 min",
        "7 held-out rows",
        "0.5 [0.25, 0.75]",
        "sft minus base: loss 0.5 [0.25, 0.75]",
    ):
        assert told in page.text, told
    titles = [
        page.texts[i] for i, t in enumerate(page.texts) if t.strip() in ("Memory", "Rewards", "Reward margin", "Loss")
    ]
    assert [t.strip() for t in titles] == ["Loss", "Memory", "Loss", "Reward margin", "Rewards"]
    assert "another adapter" not in page.text
    (run / "sft" / "stage.json").write_text((run / "sft" / "stage.json").read_text().replace("own-sft", "retrained"))
    assert "loss (of another adapter than this stage has now)" in Page(run_page(read_source(run))).text
    first = page.charts()[0]
    assert first["series"][0]["x"] == list(range(1, 13)) and first["series"][0]["y"][-1] == 1.0
    assert first["series"][1] == {"n": "held-out", "h": 1, "k": "dots", "x": [4, 8, 12], "y": [1.5417, 1.2083, 0.875]}


def test_the_command_writes_where_it_says_and_over_its_own_only(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent.parent)
    for stage in run.glob("*/stage.json"):
        os.utime(stage, (0, 0))
    a_stage(run.parent / "b")
    (run.parent.parent / "notes.html").write_text("mine")
    for words, code, says in (
        ((run,), 0, run / "report.html"),
        ((run,), 0, run / "report.html"),  # over the one from before
        ((run / "dpo",), 0, run / "dpo" / "report.html"),
        ((), 0, "runs/b/report.html"),
        (("runs/mine", "runs/b"), 0, "report-mine-b.html"),
        ((run, run.parent / "b" / "sft", "--out", "new/ab.html"), 0, "new/ab.html"),
        (("--out", "notes.html"), 2, "not a report of zephyr-lite"),
        (("--out", "runs"), 2, "is a folder"),
        (("nowhere",), 2, "no such folder"),
        (("runs",), 2, "neither a run's folder nor a stage's"),
    ):
        assert cli.run(["report", *map(str, words)]) == code
        captured = capsys.readouterr()
        assert str(says) in captured.out + captured.err
        if code == 0:
            Page((run.parent.parent / says).read_text())
    assert "not finished, step 8" in (run / "report.html").read_text()
    assert (run.parent.parent / "notes.html").read_text() == "mine"


def test_curves_are_where_their_values_are():
    values = [0.0, 1.0, math.nan, 4.0, 2.0]
    drawn = line_chart("t", "", [Curve("s", [1, 2, 3, 4, 5], values)], {"rule": 3.0})
    path = drawn["curves"][0]["path"]
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    assert re.findall("[ML]", path) == ["M", "L", "M", "L"]  # interrupted at the gap
    for (x, y), step in zip(points, (0, 1, 3, 4)):
        assert x == pytest.approx(LEFT + step / 4 * (RIGHT - LEFT), abs=0.06)
        assert y == pytest.approx(TOP + (4 - values[step]) / 4 * (BOTTOM - TOP), abs=0.06)
    assert drawn["rules"] == [(pytest.approx(TOP + (BOTTOM - TOP) / 4, abs=0.06), "rule")]


# While a stage is trained


@pytest.fixture(scope="module")
def trained(tiny_base, chat_rows, tmp_path_factory):
    """A tiny SFT run with a report, and the pages as they were at each evaluation."""
    from tests.train.test_train import words
    from zephyr_lite.train.sft import run_sft

    out, pages = tmp_path_factory.mktemp("runs") / "tiny", []

    class Watched(ReportWriter):
        def on_evaluate(self, step, metrics):
            super().on_evaluate(step, metrics)
            pages.append((step, (self.folder / "report.html").read_text()))

    settings = {"max_length": 40, "max_steps": 4, "samples": 1, "sample_tokens": 2, "load_in_4bit": "false"}
    loaded = load_config("sft", None, words(tiny_base, out, chat_rows, **settings))
    run_sft(loaded, observers=[Watched()])
    return out, pages


def test_the_report_is_written_at_every_evaluation_and_at_the_end(trained):
    out, pages = trained
    assert [step for step, _ in pages] == [2, 4] and "not finished, step 2 of 4" in pages[0][1]
    for place in (out, out / "sft"):
        page = Page((place / "report.html").read_text())
        assert "finished" in page.texts and "before training" in page.text and "step 4" in page.text
    assert not [path.name for path in out.rglob(".*report*")]  # nothing is left aside


def test_a_report_that_cannot_be_written_ends_nothing(run, monkeypatch, caplog):
    writer, page = ReportWriter(), run / "sft" / "report.html"
    writer.folder, writer.due = run / "sft", math.inf
    writer.on_step_end(3, {})
    assert not page.exists()
    writer.due = 0.0  # the last report is too old
    writer.on_step_end(4, {})
    assert page.exists()

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(report_writer, "write_text", full)
    writer.on_evaluate(4, {})
    writer.on_sample(4, [])
    (message,) = caplog.messages
    assert "No space left on device" in message and "training continues" in message
