"""Claim 1: DPO's loss at step 0 is ln 2, and the reference is the SFT model, before training and after it."""

import shutil

import pytest
import torch

from tests.conftest import make_model
from tests.contract.steps import PLAIN
from tests.numeric import apart, live_stack, pair
from tests.train.test_train import LN2, dpo_words, metrics
from zephyr_lite.config.load import load_config
from zephyr_lite.data.batch import collate_pairs
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.train.dpo import DpoObjective, run_dpo
from zephyr_lite.train.loop import TrainState, train
from zephyr_lite.train.setup import setup_stage


def test_reference_is_the_frozen_stack_and_equals_an_untrained_policy_bit_for_bit():
    """Invariant 1's ground: at step 0 nothing differs, and later the reference is still base + sft, not the raw base."""
    batch = collate_pairs([pair(0, 9, 6, 4), pair(1, 5, 8, 8)])
    fresh = Decoder(live_stack(make_model(), trained=False), torch.float32)
    policy, reference = fresh.token_logps(batch).detach(), fresh.token_logps(batch, reference=True)
    assert torch.equal(policy, reference) and not reference.requires_grad
    trained = Decoder(live_stack(make_model()), torch.float32)
    assert torch.equal(trained.token_logps(batch, reference=True), reference)
    assert apart(trained.token_logps(batch).detach(), reference) > 1e-3
    bare = Decoder(live_stack(make_model(), frozen=False, trained=False), torch.float32)
    assert apart(bare.token_logps(batch).detach(), reference) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", ["all", "input"])
def test_step_0_is_ln_2_with_dropout_too(windowed, run, pair_rows, dtype, keep):
    """A YAML of the handbook sets lora_dropout for DPO: policy and reference must still be one function, to the bit."""
    if dtype == "bfloat16":  # the stage below was trained in float32, which does not matter here
        shutil.rmtree(run / "dpo", ignore_errors=True)
    settings = {"lora_dropout": 0.3, "lora_r": 64, "dtype": dtype, "memory.keep": keep, "max_steps": 3}
    run_dpo(load_config("dpo", None, dpo_words(windowed, run, pair_rows, **PLAIN, **settings)))
    losses = metrics(run / "dpo")
    assert losses[0] == pytest.approx(LN2, abs=1e-6) and losses[-1] != pytest.approx(LN2, abs=1e-6)


def test_the_reference_equals_an_untrained_policy_under_dropout():
    batch = collate_pairs([pair(i, 40 - i, 30, 20 + i) for i in range(6)])
    decoder = Decoder(live_stack(make_model(), trained=False, r=64), torch.float32)
    dropout = Dropout(0.2, 1, 0)
    policy = decoder.token_logps(batch, dropout=dropout).detach()
    assert torch.equal(policy, decoder.token_logps(batch, reference=True, dropout=dropout))
    trained = Decoder(
        live_stack(make_model(), r=64), torch.float32
    )  # what is dropped there does not reach the reference
    assert torch.equal(policy, trained.token_logps(batch, reference=True, dropout=Dropout(0.2, 1, 7)))


def test_dpo_starts_at_ln_2_moves_and_keeps_its_reference(tiny_base, quantized_run, pair_rows):
    """Invariant 1, live: step 0 is ln 2; after 3 steps the policy moved and the reference is still the SFT model."""
    loaded = load_config("dpo", None, dpo_words(tiny_base, quantized_run, pair_rows, max_steps=4, warmup_ratio=0))
    stage = setup_stage("dpo", loaded)
    batch = DpoObjective(stage)._batch(stage.data, [0, 1])
    sft_alone = stage.decoder.token_logps(batch).detach()  # B is zero: the policy is the SFT model
    shutil.rmtree(stage.dir.path)
    outcome_stage = setup_stage("dpo", loaded)
    task = DpoObjective(outcome_stage)
    train(TrainState(outcome_stage, task))
    losses = metrics(quantized_run / "dpo")
    assert losses[0] == pytest.approx(LN2, abs=1e-6)
    assert losses[-1] < LN2 - 1e-3
    assert torch.equal(outcome_stage.decoder.token_logps(batch, reference=True), sft_alone)
    assert not torch.allclose(outcome_stage.decoder.token_logps(batch).detach(), sft_alone, atol=1e-3)
