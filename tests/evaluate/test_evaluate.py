"""Loss and preference on held-out rows: the numbers are the model's, the intervals are the rows', nothing is lost."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from zephyr_lite.cli.app import run
from zephyr_lite.data.dataset import general_text
from zephyr_lite.errors import UserError
from zephyr_lite.evaluate import likelihood
from zephyr_lite.evaluate.bootstrap import Bootstrap
from zephyr_lite.evaluate.likelihood import evaluate_loss, evaluate_preference, row_logps
from zephyr_lite.evaluate.rows import held_out
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.model.loaded import open_live
from zephyr_lite.monitor.records import read_source
from zephyr_lite.monitor.report import run_page
from zephyr_lite.train import general as train_general

SMALL = "max_steps=3 lora_r=4 batch_size=4 learning_rate=5e-3 lora_dropout=0 max_length=128 samples=0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base, chat_rows, pair_rows):
    """A run of two stages, each with rows held out; 16 bits, so that plain libraries load the same base."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    common = [f"output_dir={folder}", *SMALL.split()]
    base = [f"model_name_or_path={tiny_base}", "load_in_4bit=false"]
    assert run(["sft", *base, f"dataset={chat_rows}", f"eval_dataset={chat_rows}", *common]) == 0
    pairs = [f"dataset={pair_rows}", f"eval_dataset={pair_rows}", "max_prompt_length=64", "beta=0.2"]
    assert run(["dpo", *pairs, *common]) == 0
    return folder


@pytest.fixture(scope="module")
def live(trained):
    return open_live(trained)


@pytest.fixture(scope="module")
def conversations(live):
    return held_out(live.chain, live.template, "sft")


@pytest.fixture(scope="module")
def pairs(live):
    return held_out(live.chain, live.template, "dpo")


def test_rows_that_would_change_the_angles_of_others_are_refused(live, conversations, monkeypatch):
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 8}
    monkeypatch.setattr(live.base.model.config, "rope_parameters", rope)
    with pytest.raises(UserError, match="type longrope, which change in sequences of more than 8 tokens"):
        evaluate_loss(live, conversations, Bootstrap())


def last_evaluation(trained, stage):
    return StageDir(trained / stage).info()["result"]["evaluations"][-1]


def test_loss_is_the_models_own_over_all_tokens(live, conversations, trained, tiny_base):
    """Against PEFT's composed adapter on transformers' model, conversation by conversation."""
    result = evaluate_loss(live, conversations, Bootstrap()).body
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), trained / "dpo" / "adapter"
    )
    total = tokens = 0.0
    for example in conversations.data.examples:
        ids = torch.tensor(example.ids[None].astype(np.int64))
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.from_numpy(example.mask[1:])
        total, tokens = total - logps[mask].sum().item(), tokens + int(mask.sum())
    losses = {name: found["loss"] for name, found in result["models"].items()}
    assert losses["dpo"]["value"] == pytest.approx(total / tokens, rel=1e-5)
    assert losses["sft"]["value"] == pytest.approx(last_evaluation(trained, "sft")["eval_loss"], rel=1e-5)
    assert list(losses) == ["base", "sft", "dpo"]
    gaps = {(gap["model"], gap["minus"]): gap["loss"] for gap in result["differences"]}
    assert list(gaps) == [("dpo", "sft"), ("dpo", "base"), ("sft", "base")]
    gap = gaps["sft", "base"]
    assert gap["value"] == pytest.approx(losses["sft"]["value"] - losses["base"]["value"], rel=1e-6)
    # the same rows are hard for both: the interval of the paired difference is narrower than either loss's
    assert gap["high"] - gap["low"] < losses["base"]["high"] - losses["base"]["low"]
    perplexity = result["models"]["sft"]["perplexity"]
    assert perplexity["value"] == pytest.approx(math.exp(losses["sft"]["value"]))
    assert perplexity["low"] < perplexity["value"] < perplexity["high"]


def test_preference_is_the_stages_own_last_evaluation(live, pairs, trained):
    result = evaluate_preference(live, pairs, Bootstrap()).body
    own = last_evaluation(trained, "dpo")
    compared = {(c["model"], c["against"]): c for c in result["comparisons"]}
    found = compared["dpo", "sft"]
    assert result["settings"]["beta"] == 0.2
    assert found["accuracy"]["value"] == pytest.approx(own["eval_rewards/accuracies"], abs=1e-5)
    assert found["margin"]["value"] == pytest.approx(own["eval_rewards/margins"], abs=1e-5)
    assert found["margin"]["value"] == pytest.approx(0.2 * found["margin_nats"]["value"])
    assert 0.2 * found["chosen_nats"]["value"] == pytest.approx(own["eval_rewards/chosen"], abs=1e-5)
    assert result["models"]["dpo"]["logps/chosen"]["value"] == pytest.approx(own["eval_logps/chosen"], rel=1e-5)
    sums = {
        name: row_logps(likelihood.PlainScorer(live.stack, live.models[name]), pairs.data).sums for name in live.models
    }
    gained = sums["sft"] - sums["base"]
    won = [bool(chosen > rejected) for chosen, rejected in gained]
    assert 0 < sum(won) < len(won) and compared["sft", "base"]["accuracy"]["value"] == sum(won) / len(won)
    likelier = (sums["sft"][:, 0] > sums["sft"][:, 1]).double().mean().item()
    assert result["models"]["sft"]["likelier_sum"]["value"] == likelier
    # the margin against the base is the sum of both stages' margins
    margins = {pair: c["margin_nats"]["value"] for pair, c in compared.items()}
    assert margins["dpo", "base"] == pytest.approx(margins["dpo", "sft"] + margins["sft", "base"], rel=1e-6)


def test_the_plain_forward_scores_as_the_decoder_does(live, conversations, pairs, monkeypatch):
    """Prompts that two responses share, and every choice of adapters."""
    for name in ("base", "dpo"):
        fused, other = likelihood.scorer_of(live, name), likelihood.PlainScorer(live.stack, live.models[name])
        want, got = row_logps(fused, conversations.data), row_logps(other, conversations.data)
        torch.testing.assert_close(got.sums, want.sums, rtol=1e-5, atol=1e-4)
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(
            row_logps(other, pairs.data).sums, row_logps(fused, pairs.data).sums, rtol=1e-5, atol=1e-4
        )
    monkeypatch.setattr(likelihood, "FAMILIES", ())
    assert isinstance(likelihood.scorer_of(live, "dpo"), likelihood.PlainScorer)
    monkeypatch.setattr(likelihood, "LOGIT_ROWS", 1)  # a row of logits at a time
    torch.testing.assert_close(row_logps(likelihood.scorer_of(live, "dpo"), conversations.data).sums, want.sums)


# ---- intervals ----------------------------------------------------------------------------------------------------


def test_intervals_of_a_mean_are_the_textbooks():
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    found = Bootstrap(resamples=4000, seed=3).intervals({"mean": (values, np.ones(2000))})["mean"]
    error = values.std(ddof=1) / math.sqrt(2000)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


# ---- the commands -------------------------------------------------------------------------------------------------


def said(capsys, *words):
    code = run(["eval", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_commands_write_what_they_show(trained, capsys, tmp_path):
    code, out, err = said(capsys, "loss", trained)
    assert code == 0, err
    told = json.loads((trained / "dpo" / "eval" / "loss.json").read_text())
    assert told["kind"] == "loss" and len(told["adapters"]) == 2 and told["data"]["rows"] == 8
    assert f"{told['models']['dpo']['loss']['value']:.4f}" in out and "dpo (policy)" in out and "sft (reference)" in out
    assert str(trained / "sft") in told["data"]["origin"]  # a dpo stage holds out pairs; these are the sft stage's
    code, out, err = said(capsys, "preference", trained, "--out", tmp_path / "there", "--limit", 3, "--resamples", 100)
    assert code == 0, err
    told = json.loads((tmp_path / "there" / "preference-limit-3.json").read_text())
    assert told["data"]["rows"] == 3 and told["settings"]["bootstrap"]["resamples"] == 100
    assert "dpo against sft" in out and "over 3 pairs" in out
    code, out, err = said(capsys, "preference", trained, "--stage", "sft", "--limit", 1)
    assert code == 0 and "one pair has no interval" in out  # of another stage of the run
    assert json.loads((trained / "sft" / "eval" / "preference-limit-1.json").read_text())["settings"]["beta"] == 0.2


# ---- general text -------------------------------------------------------------------------------------------------


def test_every_stage_measures_general_text_before_and_after(trained, live, capsys):
    """In the stages' own passes as the models' plain forward has it, and by the command."""
    sft, dpo = (StageDir(trained / stage).info()["result"]["general_loss"] for stage in ("sft", "dpo"))
    data = general_text(live.template, train_general.CPU_EVERY)
    found = {}
    for name, adapters in live.models.items():
        logps = row_logps(likelihood.PlainScorer(live.stack, adapters), data)
        found[name] = float(-logps.sums.sum() / logps.tokens.sum())
    assert [sft["before"], sft["after"], dpo["after"]] == pytest.approx([*found.values()], rel=1e-5)
    assert dpo["before"] == pytest.approx(sft["after"], rel=1e-6) and abs(sft["after"] - sft["before"]) > 1e-3
    code, out, err = said(capsys, "loss", trained, "--general")
    assert code == 0 and "over 64 passages" in out, err
    told = json.loads((trained / "dpo" / "eval" / "loss-general.json").read_text())
    assert told["data"]["origin"] == "general text" and told["data"]["rows"] == 64 and "loss_on" not in told["data"]
    assert [model["loss"]["value"] for model in told["models"].values()] == pytest.approx([*found.values()], rel=0.1)
    code, _, err = said(capsys, "loss", trained, "--general", "--limit", 3)
    assert code == 2 and "--general has its own text" in err
    page = run_page(read_source(trained))
    line = f"General text: {sft['before']:.2f} nats a token before, {sft['after']:.2f} after sft, {dpo['after']:.2f} after dpo"
    assert line in page
