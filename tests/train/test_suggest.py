"""`zephyr-lite suggest`: values with reasons, the command that it prints, and the probe of learning rates."""

import re
import shlex

import numpy as np
import pytest

from zephyr_lite.config.load import load_config
from zephyr_lite.config.resolve import resolve_run
from zephyr_lite.data.dataset import DataReport, TokenizedDataset
from zephyr_lite.memory.expected import MISTRAL_SHAPE
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.suggest import SUGGESTED, choose, pick


def suggested(method, rows, tokens, *words):
    """{key: (value, reason)} for so many rows of so many tokens, half of them supervised, on Mistral-7B."""
    loaded = load_config(method, f"zephyr-7b/{method}", ["dataset=mine.jsonl", *words])
    loaded.automatic = SUGGESTED - loaded.typed
    total = rows * tokens
    report = DataReport("training", kept=rows, rows=rows, tokens=total, supervised=total // 2, longest=tokens)
    data = TokenizedDataset(None, np.full(rows, tokens), [[place] for place in range(rows)], report, "")
    if method == "sft":
        data.pack(loaded.config.max_length)
    return {key: rest for key, *rest in choose(method, loaded, loaded.typed, [data], MISTRAL_SHAPE)}


@pytest.mark.parametrize(
    ("rows", "tokens", "values"),
    [
        (30, 60, {"lora_r": "16", "batch_size": "5", "num_train_epochs": "10", "max_length": "60", "eval_steps": "15"}),
        (
            200_000,
            600,
            {"lora_r": "32", "batch_size": "8", "num_train_epochs": "1", "max_length": "2048", "eval_steps": "500"},
        ),
    ],
)
def test_values_and_reasons_for_few_and_many_rows(rows, tokens, values):
    found = suggested("sft", rows, tokens)
    assert {key: found[key][0] for key in values} == values
    assert found["learning_rate"] == ["0.0002", "ten times full fine-tuning's 2e-5 [1, 2, 4]"]
    assert f"for each of {rows * tokens // 2:,} supervised tokens" in found["lora_r"][1]
    assert found["lora_alpha"][0] == "16" and found["lora_target_modules"][0] == "all-linear"
    assert found["max_length"][1] == (
        "the recipe's [4]" if rows == 200_000 else "the longest conversation, so that none is cut"
    )


def test_the_printed_command_and_the_file_have_the_suggested_values(own, invoke, tmp_path):
    code, out, err = invoke("suggest", "sft", *own, "lora_alpha=4")
    assert code == 0, err
    assert max(map(len, out.split("Next:")[0].splitlines())) <= 80
    for text in ("  lora_alpha           4          set by you", "[2] Biderman", "plan of sft on", "memory  fits"):
        assert text in out
    words = shlex.split(out.splitlines()[-1])
    assert "num_train_epochs=9" in words and "batch_size=4" in words
    method, *rest = words[words.index("sft") :]
    config = setup_stage(method, resolve_run(method, None, rest), claim=False).config
    assert invoke("suggest", "sft", *own, "lora_alpha=4", "-o", "a/b.yaml")[1].endswith("sft --config a/b.yaml\n")
    assert load_config("sft", "a/b.yaml").config == config and not (tmp_path / "run").exists()


def test_the_plan_has_the_rows_sizes(own, invoke):
    """Tokenized where the base is a folder, as for a run; else by their characters. A step takes no row twice."""
    changes = ["max_steps=3", "val_size=0", "max_length=2048"]
    code, out, err = invoke("plan", "sft", *own, *changes, "--details")
    assert code == 0 and "by their characters" not in out, err
    (exact,) = re.findall(r"longest row ([\d,]+) tokens", out)
    assert int(exact) < 100
    code, out, err = invoke("plan", "sft", *own[1:], *changes, "--gpu", "3060", "--details")
    assert code == 0 and "30 rows of about" in " ".join(out.split()), err
    a_step, together = (int(re.search(rf"([\d,]+) {w}", out)[1].replace(",", "")) for w in ("a step", "tokens in all"))
    assert a_step < 2048 and together == 3 * a_step


def test_a_probe_picks_a_rate_that_trains_and_leaves_nothing(own, invoke, tmp_path):
    code, out, err = invoke("suggest", "sft", *own, "learning_rate=1e-5", "lora_r=4", "--probe")
    assert code == 0, err
    table = out[out.index("held-out loss after 20 steps (before: ") :].splitlines()
    losses = {float(line.split()[1]): line.split()[2:] for line in table if line.startswith("  learning_rate ")}
    assert losses.keys() == {1e-5, 4e-5, 1.6e-4, 3.2e-4, 6.4e-4}  # it goes up from a rate that hardly trains
    best = min(losses, key=lambda rate: float(losses[rate][0]))
    assert best >= 3.2e-4 and losses[best][1:] == ["best"] and float(losses[best][0]) < float(table[0][:-1].split()[-1])
    assert f"  picked for 63 steps: {pick({best: 0.0}, 1.0, 63):g}" in table
    assert f"learning_rate={pick({best: 0.0}, 1.0, 63):g}" in table[-1].split()
    assert "probe: held-out loss " in out and " after 0 steps at learning_rate=1e-05" in out
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]
