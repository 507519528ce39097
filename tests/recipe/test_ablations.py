"""The ablation tables: what is trained, in what order, on what; and that the scores are what the models say."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.messages import messages_to
from zephyr_lite.cli.app import run
from zephyr_lite.config.load import RunConfig, preset_configs
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.data.dataset import prepare
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.recipe.ablations import BASE, read_table, run_ablation, table_lines, table_rows

SMALL = [
    "max_steps=2",
    "lora_r=4",
    "batch_size=2",
    "load_in_4bit=false",
    "learning_rate=1e-2",
    "lora_dropout=0",
    "samples=0",
]


@pytest.fixture(scope="module")
def sets(tmp_path_factory, chat_rows, pair_rows):
    """Copies of the two published sets, in the hub's layout."""
    root = tmp_path_factory.mktemp("sets")
    for name, rows, splits in (("chat", chat_rows, "sft"), ("pairs", pair_rows, "prefs")):
        (root / name).mkdir()
        for split in ("train", "test"):
            shutil.copy(rows, root / name / f"{split}_{splits}.jsonl")
    return root


def options(sets, out):
    return {"chat": str(sets / "chat"), "preferences": str(sets / "pairs"), "out": str(out)}


@pytest.fixture(scope="module")
def ablation(tmp_path_factory, tiny_base, sets):
    where = options(sets, tmp_path_factory.mktemp("ablation") / "run")
    table = read_table("recipe", [f"model_name_or_path={tiny_base}", *SMALL], **where)
    said: list[str] = []
    with messages_to(said.append):
        return run_ablation(table), said


def test_every_stage_is_trained_once_and_stands_on_the_one_before(ablation):
    result, said = ablation
    assert [line for line in said if line.startswith("[")] == [
        "[1/4] ddpo-alone (dpo), for dDPO alone",
        "[2/4] dsft-1 (sft), for dSFT-1, dSFT-2, dDPO + dSFT",
        "[3/4] dsft-2 (sft), for dSFT-2",
        "[4/4] ddpo (dpo), for dDPO + dSFT",
    ]
    names = ("ddpo-alone", "dsft-2", "ddpo")
    below = [[a["path"] for a in StageDir(result.table.run / name).info()["adapters"]] for name in names]
    assert below == [[], ["dsft-1/adapter"], ["dsft-1/adapter"]]


def test_the_scores_are_what_the_published_adapter_says_on_the_bare_base(ablation, tiny_base):
    """An oracle of another make: plain transformers and PEFT, one row at a time."""
    result, _ = ablation
    folder = result.table.run / "ddpo" / "adapter"
    template = resolve_template("auto", AutoTokenizer.from_pretrained(folder))
    conversations = prepare([result.table.chat], "sft", RunConfig(), template)
    pairs = prepare([result.table.preferences], "dpo", RunConfig(max_length=1024), template)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), folder)

    def logps(ids, mask):
        ids = torch.tensor(ids)[None].long()
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].double().log_softmax(-1)
        return scores[torch.arange(ids.shape[1] - 1), ids[0, 1:]][torch.tensor(mask[1:]).bool()]

    def measured():
        loss = -torch.cat([logps(e.ids, e.mask) for e in conversations.examples]).mean().item()
        responses = [
            logps([*pair.prompt_ids, *ids], [False] * len(pair.prompt_ids) + list(mask))
            for pair in pairs.examples
            for ids, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask))
        ]
        return loss, responses

    loss, arm = measured()
    with model.disable_adapter():
        base_loss, base = measured()
    gained = torch.stack([(a.sum() - b.sum()) for a, b in zip(arm, base)]).view(-1, 2)
    margins = gained[:, 0] - gained[:, 1]
    score = result.scores["dDPO + dSFT"]
    assert score.chat_loss == pytest.approx(loss, rel=1e-5)
    assert result.scores[BASE].chat_loss == pytest.approx(base_loss, rel=1e-5)
    assert score.margin == pytest.approx(margins.mean().item(), abs=1e-4)
    assert score.margin_error == pytest.approx((margins.std() / len(margins) ** 0.5).item(), rel=1e-3)
    assert score.accuracy == (margins > 0).double().mean().item()
    means = torch.stack([a.mean() for a in arm]).view(-1, 2)
    assert score.likelier == (means[:, 0] > means[:, 1]).double().mean().item()
    assert result.scores[BASE].accuracy is None and len({s.chat_loss for s in result.scores.values()}) == 5


def test_the_table_is_kept_and_a_second_start_trains_nothing(ablation):
    result, _ = ablation
    kept = json.loads((result.table.run / "recipe.json").read_text())
    assert kept["scores"]["dSFT-1"]["chat_loss"] == result.scores["dSFT-1"].chat_loss
    assert (result.table.run / "recipe.md").read_text() == "\n".join(table_lines(result)) + "\n"
    said: list[str] = []
    with messages_to(said.append):
        again = run_ablation(result.table)
    assert sum(line.endswith("is complete already.") for line in said) == 4
    assert table_rows(again) == table_rows(result)


@pytest.mark.parametrize("name", sorted(preset_configs("tables")))
def test_the_shipped_tables_resolve(name):
    table = read_table(name)
    assert len(table.arms) == 4 and all(stage.loaded.config.output_dir == str(table.run) for stage in table.stages())


def test_the_command_with_some_arms_does_not_replace_the_whole_table(ablation, sets, tiny_base, capsys):
    folder = ablation[0].table.run
    before = (folder / "recipe.json").read_bytes()
    where = [word for key, value in options(sets, folder).items() for word in (f"--{key}", value)]
    words = ["ablate", "recipe", "--only", "dSFT-1", *where, f"model_name_or_path={tiny_base}", *SMALL]
    assert run([*words, "--dry-run"]) == 0
    assert "dSFT-1: dsft-1" in capsys.readouterr().out and not (folder / "recipe-some.json").exists()
    assert run(words) == 0
    out = capsys.readouterr().out
    assert "dSFT-1" in out and "base" in out and "standard error" in out
    assert (folder / "recipe.json").read_bytes() == before
    kept = json.loads((folder / "recipe-some.json").read_text())["scores"]
    assert list(kept) == ["base", "dSFT-1"] and kept["dSFT-1"]["margin"] == ablation[0].scores["dSFT-1"].margin
