"""The commands: exit codes, messages and output."""
# ruff: noqa: F811

from __future__ import annotations

import json
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

ROOT = Path(__file__).parents[2]


def test_help_imports_nothing_heavy_and_the_module_runs():
    heavy = "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    code = f"import sys, zephyr_lite.cli.app as c; c.run(['sft', '--help']); {heavy}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.strip().endswith("[]")
    module = [sys.executable, "-m", "zephyr_lite", "--version"]
    assert subprocess.run(module, capture_output=True, text=True, cwd=ROOT, check=True).stdout.startswith(
        "zephyr-lite 0."
    )


def test_a_dry_run_shows_the_plan_a_row_and_a_step_and_leaves_nothing(invoke, sft_words, dpo_words, tmp_path):
    code, out, err = invoke(*sft_words, "--dry-run")
    assert code == 0, err
    for text in ("tokens at once", "⟦", "</s>⟧", "first step: loss", "nothing was written"):
        assert text in out
    code, out, err = invoke(*dpo_words, "adapters=none", "precompute_ref_log_probs=true", "--dry-run")
    assert code == 0, err
    assert "first step: loss 0.6931" in out and "prompt and rejected:" in out
    assert "at most, the reference included, evaluations aside" in " ".join(out.split())
    assert "pass of its own" not in out  # the run caches it
    code, out, err = invoke(*sft_words, "--dry-run", "--quiet")
    assert (code, err) == (0, "") and out.startswith("plan of sft on ") and "⟦" not in out and "data:" not in out
    assert out.splitlines()[-1].startswith("at this pace ")
    assert not list(tmp_path.iterdir())


def test_dpo_continues_the_newest_run(invoke, runs, dpo_words):
    shutil.rmtree(runs / "dpo")
    code, out, err = invoke(*(word for word in dpo_words if not word.startswith("model_name")))
    assert code == 0 and err == "runs/t, the newest run; output_dir=runs/NAME chooses another\n", err
    assert "step 1/2  loss 0.6931" in out and "zephyr-lite merge" in out
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


def test_the_survey_never_fails_and_never_shows_the_token(invoke, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    code, out, _ = invoke("env")
    assert code == 0
    for name in ("system:", "packages:", "GPU:", "kernels:", "hub token:", "disk:", "extras:"):
        assert name in out
    assert "secret" not in out and "there is one" in out
    assert all(len(line) <= 80 or " " not in line.strip() for line in out.splitlines())
    assert "mistralai/Mistral-7B-v0.1 is not in the hub's cache, and HF_HUB_OFFLINE is set" in " ".join(out.split())


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_a_run_of_one_step_learns(invoke, sft_words, tmp_path, schedule):
    assert invoke(*sft_words, "output_dir=runs/t", "max_steps=1", f"lr_scheduler_type={schedule}")[0] == 0
    line = json.loads((tmp_path / "runs/t/sft/metrics.jsonl").read_text().splitlines()[0])
    assert line["learning_rate"] > 0


def test_two_runs_of_a_day_are_asked_about_in_the_words_of_the_command(invoke, runs, dpo_words):
    (runs.parent / "latest").symlink_to("t")
    code, out, err = invoke("report")
    assert (code, err) == (0, "runs/t, the newest run; runs/NAME chooses another\n") and out.startswith("runs/t/report")
    shutil.copytree(runs, runs.parent / "other")
    dpo = [word for word in dpo_words if not word.startswith("model_name")]
    for option, words in {"--run ": ["merge", "--out", "m"], "": ["eval", "loss"], "output_dir=": dpo}.items():
        code, out, err = invoke(*words)
        assert (code, out) == (2, "") and err.startswith("error: which run? These 2 changed within a day:\n"), words
        assert f"  {option}runs/t      changed " in err and f"  {option}runs/other  changed " in err, words
    assert invoke("report")[0] == 2 and invoke("report", "runs/other")[::2] == (0, "")


def test_a_hub_id_may_end_as_a_file_does(invoke):
    code, _, err = invoke("data", "show", "sft", "model_name_or_path=owner/model.gguf", "dataset=owner/data.bin")
    assert code == 2 and "it is not in the hub's cache" in err
