"""The shipped files that are no stage's configuration, run in small: jobs against a server of the test's own, and the table
whose stages no other test trains together. (Stages: ``test_configs``; the table ``recipe``: ``test_ablations``.)"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.chat_server import ChatServer
from tests.recipe.test_distill import teacher
from tests.recipe.test_feedback import prompts_file, script
from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import preset_configs

JOBS = preset_configs("feedback")


def on_server(name: str, url: str, folder: Path) -> Path:
    """The shipped file, its servers replaced, and the pauses that it keeps for theirs left out."""
    text, count = re.subn(r'"https?://[^"]+"', f'"{url}"', JOBS[name].read_text(encoding="utf-8"))
    assert count >= 1
    path = folder / f"{name}.yaml"
    path.write_text(re.sub(r",\s*requests_per_minute: \d+", "", text), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(set(JOBS) - {"distill"}))
def test_a_shipped_feedback_job_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with ChatServer(script) as server:
        words = ["--config", str(on_server(name, server.url, tmp_path)), "--prompts", str(prompts_file(tmp_path, 2))]
        assert cli.run(["feedback", *words, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
        asked = {seen.body["model"] for seen in server.seen}
    rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    shipped = JOBS[name].read_text(encoding="utf-8")
    assert len(rows) == 2 and all(len(row["completions"]) == 4 for row in rows)
    assert asked == set(re.findall(r'model: "([^"]+)"', shipped))
    assert all((c["overall_score"] is not None) == ("overall: true" in shipped) for c in rows[0]["completions"])
    assert (tmp_path / "out/pairs/report.md").is_file()


def test_the_shipped_distillation_runs(tmp_path, capsys):
    with ChatServer(teacher) as server:
        words = ["--config", str(on_server("distill", server.url, tmp_path)), "--out", str(tmp_path / "out")]
        assert cli.run(["distill", *words, "--count", "6"]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out/train_sft.jsonl").read_text().splitlines()]
    assert rows and all(len(row["messages"]) == 6 for row in rows)  # three rounds


def test_the_shipped_table_alpha_beta_runs(tmp_path, tiny_base, chat_rows, pair_rows, capsys):
    for name, rows, splits in (("chat", chat_rows, "sft"), ("pairs", pair_rows, "prefs")):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}_{splits}.jsonl").write_bytes(rows.read_bytes())
    small = [
        f"model_name_or_path={tiny_base}",
        f"alpha-dsft.dataset.path={chat_rows}",
        "max_steps=1",
        "lora_r=2",
        "samples=0",
        "batch_size=2",
        "max_length=128",
        "max_prompt_length=64",
    ]
    sets = ["--chat", str(tmp_path / "chat"), "--preferences", str(tmp_path / "pairs"), "--out", str(tmp_path / "run")]
    sets += ["--only", "α dDPO"]  # its two stages; the β arms are the same with other rows
    assert cli.run(["ablate", "alpha-beta", *sets, *small]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "α dDPO" in shown and "β" not in shown
    assert all((tmp_path / "run" / stage / "adapter").is_dir() for stage in ("alpha-dsft", "alpha-ddpo"))
