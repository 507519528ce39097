"""Claim 4: however a step is split into micro-batches, its loss and gradients are the same."""

import pytest
import torch

from tests.contract.steps import moved, open_dpo, step_of
from tests.numeric import apart
from tests.train.test_train import words
from zephyr_lite.config.load import load_config
from zephyr_lite.train.dpo import DpoObjective
from zephyr_lite.train.loop import TrainState, accumulate_gradients
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import SftObjective
from zephyr_lite.train.steps import rows_of_step


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("tokens", [1, 170])
def test_micro_batches_do_not_change_a_step_of_pairs(windowed, run, pair_rows, tokens, step):
    stage = open_dpo(windowed, run, pair_rows, lora_dropout=0.2)
    assert [len(rows_of_step(stage.config, len(stage.data.rows), n)) for n in (0, 2)] == [3, 2]
    moved(stage)
    task = DpoObjective(stage)
    whole, wanted = step_of(stage, task, 10_000, step + 3)  # not the first epoch, where B has to be zero
    split, grads = step_of(stage, task, tokens, step + 3)
    assert split == pytest.approx(whole, rel=1e-4, abs=1e-4) and split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    for name, grad in wanted.items():
        assert apart(grads[name], grad) < 1e-5, name


@pytest.mark.parametrize("loss", ["sigmoid,sft", "orpo"])
def test_micro_batches_do_not_change_a_loss_that_is_a_mean_over_tokens(windowed, run, pair_rows, loss):
    stage = open_dpo(windowed, run, pair_rows, loss_type=loss)
    moved(stage)
    task = DpoObjective(stage)
    whole, wanted = step_of(stage, task, 10_000, 2)
    split, grads = step_of(stage, task, 1, 2)
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    for name, grad in wanted.items():
        assert apart(grads[name], grad) < 1e-5, name


@pytest.mark.parametrize("tokens", [40, 70, 10_000])
@pytest.mark.parametrize(("step", "noise"), [(0, 0), (2, 0), (2, 5)])
def test_micro_batches_do_not_change_the_step(tiny_base, chat_rows, tmp_path, tokens, step, noise):
    """Invariant 4: however a step is split, the last partial one included, dropout on, NEFTune's noise off and on."""
    keys = {"lora_dropout": 0.2, "max_length": 80, "neftune_noise_alpha": noise}
    loaded = load_config("sft", None, words(tiny_base, tmp_path / "r", chat_rows, **keys))
    stage = setup_stage("sft", loaded, claim=False)
    torch.manual_seed(0)
    for parameter in stage.stack.parameters().values():
        parameter.data.normal_(0, 0.05)
    found = {}
    stage.config.max_grad_norm = 1e9  # unclipped
    for size in (tokens, 128):
        plan = type(stage.plan)(size, ("all",) * len(stage.plan.keep))
        task = SftObjective(stage)
        task.oom.follow(plan)
        state = TrainState(stage, task)
        got = accumulate_gradients(state, step)
        found[size] = (got["loss"], got["num_targets"], [p.grad.clone() for p in state.parameters.values()])
    assert found[tokens][:2] == pytest.approx(found[128][:2], rel=1e-6)
    for a, b in zip(found[tokens][2], found[128][2]):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_the_loss_is_normalized_by_tokens_and_not_by_micro_batch(tiny_base, chat_rows, tmp_path):
    """The fault of 2024: averaging per micro-batch weighs short rows too much."""
    stage = setup_stage("sft", load_config("sft", None, words(tiny_base, tmp_path / "r", chat_rows)), claim=False)
    task = SftObjective(stage)
    per_example = []
    for i in range(len(stage.data.lengths)):
        loss, _ = task.loss([i], 0, 1)
        per_example.append((loss.item(), task.num_targets([i])))
    everything = list(range(len(per_example)))
    total = task.num_targets(everything)
    right = sum(loss for loss, _ in per_example) / total
    wrong = sum(loss / n for loss, n in per_example) / len(per_example)
    together, _ = task.loss(everything, 0, total)
    assert together.item() == pytest.approx(right, rel=1e-5) and abs(right - wrong) > 1e-3
    assert task.eval_metrics(task.evaluate())["eval_loss"] == pytest.approx(right, rel=1e-5)
