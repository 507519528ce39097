"""`zephyr-lite suggest`: values with reasons, the command that it prints, and the probe of learning rates."""

import math
import shlex

import numpy as np
import pytest

from zephyr_lite.config.load import load_config
from zephyr_lite.config.resolve import resolve_run
from zephyr_lite.data.dataset import DataReport, TokenizedDataset
from zephyr_lite.memory.expected import MISTRAL_SHAPE
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.suggest import SUGGESTED, choose, pick, search


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
            2_000,
            400,
            {"lora_r": "16", "batch_size": "8", "num_train_epochs": "1", "max_length": "400", "eval_steps": "63"},
        ),
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


def test_set_keys_are_kept_and_no_rank_above_256_is_suggested():
    found = suggested("sft", 200_000, 600, "lora_r=8", "learning_rate=1e-3")
    assert found["lora_r"] == ["8", "set by you"] and found["learning_rate"] == ["0.001", "set by you"]
    assert suggested("sft", 10**7, 600)["lora_r"][0] == "256"


def test_pairs_keep_the_recipes_rank_and_a_short_run_gets_a_higher_rate():
    found = suggested("dpo", 2_000, 300)
    assert found["lora_r"][0] == "128" and "the recipe's [4]" in found["lora_r"][1]
    assert found["learning_rate"] == [
        "2e-05",
        "ten times full fine-tuning's 5e-7 [1, 2, 4], × 4 for a run of 125 steps",
    ]


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


def test_the_rate_of_a_longer_run_is_lower_and_none_is_picked_where_none_trains():
    losses = {1e-3: 2.0, 2e-3: 1.5, 4e-3: 3.0}
    assert [pick(losses, 2.5, steps) for steps in (20, 60, 600, 6000)] == [2e-3, 2e-3, 9.6e-4, 4.6e-4]
    assert pick(losses, 1.4, 60) is None and pick({1e-3: math.inf}, 2.0, 60) is None


def test_a_probe_needs_held_out_rows(own, invoke):
    code, _, err = invoke("suggest", "sft", *own, "val_size=0", "--probe")
    assert code == 2 and "no rows are held out" in err and "Set val_size=0.1" in err


def test_a_search_goes_to_the_lowest_loss_in_at_most_five_rates():
    def curve(best):
        return lambda rate: abs(math.log2(rate / best))

    assert list(search(curve(1.0), 1.0)) == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert list(search(curve(4.0), 1.0)) == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert list(search(curve(0.2), 1.0)) == [0.0625, 0.125, 0.25, 1.0, 4.0]
    assert list(search(curve(100.0), 1.0)) == [1.0, 4.0, 16.0, 32.0, 64.0]
