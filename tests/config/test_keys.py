"""The reference of all keys, as ``zephyr-lite keys`` prints it. (docs/configuration.md: ``tests/docs``.)"""

from __future__ import annotations

from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import LIST_KEYS, RunConfig


def keys(capsys, *words: str) -> str:
    assert cli.run(["keys", *words]) == 0
    return capsys.readouterr().out


def test_every_key_is_listed_in_80_columns_without_markdown(capsys):
    out = keys(capsys)
    assert all(f"  {name}: " in out for name in [*RunConfig.model_fields, "dataset.split", "memory.keep"])
    assert max(map(len, out.splitlines())) <= 80 and "](#" not in out
    assert "  batch_size: whole number ≥ 1; default 8 (dpo: 16)\n" in out and "dataset.path: text; required\n" in out


def test_a_word_filters_by_name_and_description_and_finds_other_tools_keys(capsys):
    out = keys(capsys, "Warm-up")
    assert "  warmup_ratio: " not in out and "  learning_rate: " in out and "warm-up" in out
    assert [line.split(":")[0] for line in keys(capsys, "lora-dropout").splitlines()[1:]] == [
        "  lora_dropout",
        "      dropout on the adapter's input",
    ]
    for name, what in (
        ("cutoff_len", "max_length here"),
        ("bf16", "accepted"),
        ("use_dora", "refused, except null, false"),
    ):
        assert f"\n  {name}: {what}" in keys(capsys, name)
    kto, loss = keys(capsys, "kto"), keys(capsys, "loss")
    assert "\n  stage: " in kto and "\n  rl: loss_type (" in kto and "\n  rl: loss_type (" in loss
    assert "(docs/recipe.md)" in loss and "LLaMA-Factory and Axolotl\n" in loss
    assert cli.run(["keys", "learnign_rate"]) == 2
    assert capsys.readouterr().err == (
        f"error: there is no key 'learnign_rate'. Did you mean 'learning_rate'?\n{LIST_KEYS}\n"
    )
