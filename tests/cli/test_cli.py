"""The commands: exit codes, messages and output."""
# ruff: noqa: F811

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.test_bad_input import (  # noqa: F401 (fixtures)
    dpo_words,
    files_of_runs,
    finished,
    refused,
    runs,
    sft_words,
    tiny_base,
)
from zephyr_lite.cli.options import next_lines
from zephyr_lite.cli.train import _next_commands
from zephyr_lite.config.load import load_config
from zephyr_lite.errors import UserError
from zephyr_lite.monitor.console import Console, duration, metrics_line

ROOT = Path(__file__).parents[2]


# -- help, version, usage ----------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy_and_the_module_runs():
    heavy = "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    code = f"import sys, zephyr_lite.cli.app as c; c.run(['sft', '--help']); {heavy}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.strip().endswith("[]")
    module = [sys.executable, "-m", "zephyr_lite", "--version"]
    assert subprocess.run(module, capture_output=True, text=True, cwd=ROOT, check=True).stdout.startswith(
        "zephyr-lite 0."
    )


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_unexpected_error_is_ours(invoke, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("[bold]a [/wrong] thing")

    monkeypatch.setattr("zephyr_lite.cli.environment.survey", broken)
    code, out, err = invoke("env")
    assert code == 1 and "[bold]a [/wrong] thing" in err and "a bug in zephyr-lite" in err and "--verbose" in err
    assert "Traceback" not in out + err
    code, _, err = invoke("env", "--verbose")
    assert code == 1 and "Traceback" in err


def test_an_interrupted_command_ends_with_130(invoke, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("zephyr_lite.cli.environment.survey", interrupted)
    assert invoke("env")[::2] == (130, "interrupted\n")
    monkeypatch.setattr("zephyr_lite.config.load.load_config", lambda *_, **__: interrupted())
    code, _, err = invoke("sft")
    assert code == 130 and "resumes from the last checkpoint, if there is one" in err


# -- what goes well ----------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_plan_a_row_and_a_step_and_leaves_nothing(invoke, sft_words, dpo_words, tmp_path):
    code, out, err = invoke(*sft_words, "--dry-run")
    assert code == 0, err
    for text in ("tokens at once", "⟦", "</s>⟧", "first step: loss", "nothing was written"):
        assert text in out
    code, out, err = invoke(*dpo_words, "adapters=none", "precompute_ref_log_probs=true", "--dry-run")
    assert code == 0, err
    assert "first step: loss 0.6931" in out and "prompt and rejected:" in out
    code, out, err = invoke(*sft_words, "--dry-run", "--quiet")
    assert (code, err) == (0, "") and out.startswith("plan of sft on ") and "⟦" not in out and "data:" not in out
    assert out.splitlines()[-1].startswith("at this pace ")
    assert not list(tmp_path.iterdir())


def test_dpo_continues_the_newest_run(invoke, runs, pair_rows):
    shutil.rmtree(runs / "dpo")
    code, out, err = invoke(
        "dpo",
        f"dataset={pair_rows}",
        "max_length=128",
        "max_prompt_length=64",
        "max_steps=1",
        "lora_r=4",
        "samples=0",
        "batch_size=4",
    )
    assert code == 0 and err == "runs/t, the newest run; output_dir=runs/NAME chooses another\n", err
    assert "step 1/1  loss 0.6931" in out and "zephyr-lite merge" in out
    assert (runs / "dpo" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("onto", ["base", "nf4"])
def test_merge_compares_with_the_live_stack(invoke, runs, onto):
    code, out, err = invoke("merge", "--out", "model", "--onto", onto)
    assert code == 0 and "runs/t, stage dpo" in out, err
    assert err == "runs/t, the newest run; --run runs/NAME chooses another\n"
    mean = float(out.split("mean |Δ log p| ")[1].split(",")[0])
    # onto what training saw, only float32 sums in another order remain; the 16-bit base differs by NF4's rounding
    assert mean < 1e-4 if onto == "nf4" else mean > 1e-3
    code, _, err = invoke("merge", "--out", "model", "--onto", "nf4" if onto == "base" else "base")
    assert code == 2 and "--overwrite" in err


def test_merge_of_explicit_adapters_and_as_one_adapter(invoke, runs, tiny_base, tmp_path):
    chain = ["--adapter", "runs/t/sft/adapter", "--adapter", "runs/t/dpo/delta", "--base", tiny_base]
    assert invoke("merge", "--out", "model", "--onto", "nf4", *chain)[0] == 0
    assert invoke("merge", "--out", "adapter", "--adapter-only", "--run", "runs/t")[0] == 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_the_survey_never_fails_and_never_shows_the_token(invoke, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    code, out, _ = invoke("env")
    assert code == 0
    for name in ("system:", "packages:", "GPU:", "kernels:", "hub token:", "disk:", "extras:"):
        assert name in out
    assert "secret" not in out and "there is one" in out
    assert all(len(line) <= 80 or " " not in line.strip() for line in out.splitlines())
    assert (
        "base:        mistralai/Mistral-7B-v0.1 is not in the hub's cache, and\n             HF_HUB_OFFLINE is set"
        in out
    )


def test_what_the_recipe_will_take_is_said_first(invoke, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    code, out, err = invoke("sft", "--config", "zephyr-7b/overnight-sft")
    assert code == 2 and "mistralai/Mistral-7B-v0.1" in err  # offline here
    for text in (
        "download: mistralai/Mistral-7B-v0.1 14.5 GB",
        "disk:",
        "plan of sft on the CPU: mistralai/Mistral-7B-v0.1",
        "plan --gpu",
    ):
        assert text in out


# -- the console -------------------------------------------------------------------------------------------------------


def test_lines_are_plain_and_whole_in_a_pipe(capsys):
    console = Console()
    long = "[red]" + "word " * 60 + "[/]"
    console.say(long)
    console.user_error(UserError(f"{long}: no", "do this"))
    captured = capsys.readouterr()
    assert captured.out == long + "\n"
    assert captured.err == f"error: {long}: no\ndo this\n"


def test_progress_lines():
    sft = {"loss": 1.23456, "learning_rate": 2e-4, "tokens_per_second": 1234.5, "seconds": 2.0}
    assert metrics_line(7, 480, sft, 946) == "step   7/480  loss 1.2346  1,234 tokens/s  16 min left"
    dpo = {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 0.2, "pairs_per_second": 1.5}
    assert metrics_line(1, 2, dpo) == "step 1/2  loss 0.5000  accuracy 0.750  margin 0.2000  1.50 pairs/s"
    evaluation = {"eval_loss": 0.4, "eval_rewards/accuracies": 0.7}
    assert metrics_line(2, 2, evaluation) == "step 2/2  held-out  loss 0.4000  accuracy 0.700"
    assert [duration(s) for s in (3, 600, 4800, 40000, 300000)] == ["3 s", "10 min", "80 min", "11 h", "3.5 days"]


# -- what a newcomer tripped over ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_a_run_of_one_step_learns(invoke, sft_words, tmp_path, schedule):
    assert invoke(*sft_words, "output_dir=runs/t", "max_steps=1", f"lr_scheduler_type={schedule}")[0] == 0
    line = json.loads((tmp_path / "runs/t/sft/metrics.jsonl").read_text().splitlines()[0])
    assert line["learning_rate"] > 0


def test_a_reader_that_has_seen_enough_and_a_terminal_of_ascii(tiny_base, chat_rows):
    """``zephyr-lite … | head -1`` ends quietly; a letter that the terminal has not is no fault."""
    words = ["data", "show", "sft", "--table", f"model_name_or_path={tiny_base}", f"dataset={chat_rows}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "zephyr_lite", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == 141 and said == "", said


def test_a_dry_run_beside_a_finished_run_changes_nothing(invoke, dpo_words, runs):
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*")}
    words = [w for w in dpo_words if not w.startswith("model_name")]
    assert invoke(*words, "stage=again", "--dry-run")[0] == 0
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*")} == before


@pytest.mark.parametrize(
    ("method", "file", "words", "commands"),
    [
        ("sft", None, [], ["dpo output_dir=runs/zephyr-7b"]),
        (
            "sft",
            "zephyr-7b/overnight-sft",
            ["output_dir=my runs/a"],
            ["dpo --config zephyr-7b/overnight-dpo 'output_dir=my runs/a'"],
        ),
        (
            "sft",
            None,
            ["dataset=my.jsonl", "eval_dataset=[]", "output_dir=runs/mine"],
            ["chat runs/mine --compare", "merge --run runs/mine --out model/"],
        ),
        (
            "dpo",
            "zephyr-7b/overnight-dpo",
            ["output_dir=/data/a"],
            ["chat /data/a --compare", "eval preference /data/a", "merge --run /data/a --out model/"],
        ),
    ],
)
def test_what_comes_next_fits_what_was_run(method, file, words, commands):
    config = load_config(method, file or f"zephyr-7b/{method}", words).config
    assert [shlex.join(words) for words in _next_commands(method, file, config)] == commands


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_a_finished_stage_says_what_comes_next_and_nothing_else(invoke, sft_words, runs, quiet):
    code, out, _ = invoke(*sft_words, "output_dir=runs/t", "max_steps=2", "learning_rate=1e-2", *quiet)
    after = [
        ["chat", "runs/t", "--compare"],
        ["eval", "loss", "runs/t"],
        ["merge", "--run", "runs/t", "--out", "model/"],
    ]
    assert code == 0 and out == f"runs/t/sft is complete already.\n{next_lines(*after)}\n"


def test_two_runs_of_a_day_are_asked_about_in_the_words_of_the_command(invoke, runs, dpo_words):
    (runs.parent / "latest").symlink_to("t")
    code, out, err = invoke("report")
    assert (code, err) == (0, "runs/t, the newest run; runs/NAME chooses another\n") and out.startswith(
        "runs/t/report.html"
    )
    shutil.copytree(runs, runs.parent / "other")
    dpo = [word for word in dpo_words if not word.startswith("model_name")]
    commands = {"--run ": ["merge", "--out", "m"], "": ["eval", "loss"], "output_dir=": dpo}
    for option, words in commands.items():
        code, out, err = invoke(*words)
        assert (code, out) == (2, "") and err.startswith("error: which run? These 2 changed within a day:\n"), words
        assert f"  {option}runs/t      changed " in err and f"  {option}runs/other  changed " in err, words
        assert err.endswith(("runs/t.\n", "runs/other.\n"))
    assert invoke("report")[0] == 2
    code, out, err = invoke("report", "runs/other")
    assert code == 0 and err == ""


def test_a_plan_looks_at_no_run_that_is_not_named(invoke, runs, tiny_base):
    code, out, err = invoke("plan", "--gpu", "4090")
    assert code == 0 and err == "" and out.count("mistralai/Mistral-7B-v0.1") == 2 and "runs/t" not in out
    code, out, err = invoke("plan", "dpo", "output_dir=runs/t", "--gpu", "4090")
    assert code == 0 and str(tiny_base) in out and "on runs/t/sft/adapter" in out


@pytest.mark.parametrize("wrong", ["dataset=data/chats.jsonl", "eval_dataset=mine.csv", "adapters=runs/x/sft/adapter"])
def test_a_path_that_leads_nowhere_is_all_that_is_said(invoke, wrong):
    for words in (["sft"], ["data", "show", "sft"]):
        code, out, err = invoke(*words, wrong)
        path = wrong.split("=")[1]
        assert (code, out) == (2, "") and path in err and "there is no such f" in err and len(err.splitlines()) == 2


def test_a_run_that_is_not_there_is_no_hub_id(invoke):
    code, _, err = invoke("check", "runs/nope")
    assert code == 2 and err.splitlines()[0] == "error: adapter runs/nope: there is no such folder."
