"""Numbers that are not finite, a collapse, and signals: what is skipped, reported, stopped and resumed."""

import json
import os
import signal

import pytest
import torch

from tests.messages import Logged
from tests.train.test_train import metrics
from zephyr_lite.errors import Interrupted, UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train.monitors import DpoCollapseMonitor, SkippedSteps
from zephyr_lite.train.sft import SftObjective, run_sft


def same_adapter(one, other):
    a, b = read_adapter(one).modules, read_adapter(other).modules
    return a.keys() == b.keys() and all(torch.equal(a[m].a, b[m].a) and torch.equal(a[m].b, b[m].b) for m in a)


def left_out(stage):
    return [json.loads(line) for line in (stage / "left_out.jsonl").read_text().splitlines()]


@pytest.fixture
def loaded(loaded):
    return lambda name="run", **keys: loaded(name, **{"batch_size": 2, **keys})


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_a_step_that_is_not_finite_is_left_out_and_its_row_named(loaded, tmp_path, monkeypatch, what, said):
    plain = SftObjective.loss

    def loss(self, examples, step, total):
        found, sums = plain(self, examples, step, total)
        if 3 in examples and what == "gradients":
            found.register_hook(lambda grad: grad * float("inf"))
        return (found * float("nan") if 3 in examples and what == "loss" else found), sums

    monkeypatch.setattr(SftObjective, "loss", loss)
    outcome = run_sft(loaded(max_length=80))
    stage = StageDir(tmp_path / "run" / "sft")
    records = left_out(stage.path)
    assert outcome.skipped == len(records) == stage.info()["result"]["steps_left_out"] == 2  # once an epoch
    for record in records:
        assert record["not_finite_alone"] and len(record["rows"]) == 1 and record["rows"][0].endswith("row 4")
        assert f"step {record['step']}: loss " in " ".join(said) and "Not finite:" in " ".join(said)
    assert all(w.b.isfinite().all() for w in read_adapter(stage.adapter).modules.values())


def test_three_in_a_row_stop_the_run_with_a_checkpoint_of_before(loaded, tmp_path, monkeypatch, said):
    with monkeypatch.context() as patch:
        plain = SftObjective.loss

        def loss(self, examples, step, total):
            found, sums = plain(self, examples, step, total)
            return (found * float("nan") if step >= 3 else found), sums

        patch.setattr(SftObjective, "loss", loss)
        with pytest.raises(UserError, match=r"three times in a row; rows of the last: .*row \d") as stopped:
            run_sft(loaded(save_steps=100, eval_steps=100))
    stage = tmp_path / "run" / "sft"
    assert "checkpoint-3 has the adapter from before" in str(stopped.value) and "left_out.jsonl" in stopped.value.hint
    assert [p.name for p in StageDir(stage).checkpoints()] == ["checkpoint-3"]
    assert [r["step"] for r in left_out(stage)] == [4, 5, 6]
    # resumed without the cause it is the undisturbed run
    run_sft(loaded(save_steps=100, eval_steps=100))
    assert "going on from checkpoint-3" in said and "damaged" not in " ".join(said)
    run_sft(loaded("other", save_steps=100, eval_steps=100))
    assert same_adapter(stage / "adapter", tmp_path / "other" / "sft" / "adapter")
    assert left_out(stage) == []


def test_the_loss_scalers_search_is_no_fault_until_it_has_settled(tmp_path):
    nan, inf = float("nan"), float("inf")

    def saw(skipped, scale, loss=1.0, norm=1.0):
        kind = skipped.kind({"loss": loss, "grad_norm": norm}, scale)
        skipped.count_step(kind)
        return kind

    watch, again, fresh = (SkippedSteps(tmp_path) for _ in range(3))
    assert [saw(watch, 2.0**n, norm=inf) for n in (15, 14, 13, 12)] == ["searching"] * 4
    assert (watch.count, watch.in_a_row) == (4, 0)
    assert saw(watch, 2.0**11, loss=nan) == "bad"  # no scale repairs a loss
    assert saw(watch, 2.0**11) == "applied"
    again.load(json.loads(json.dumps(watch.state())))
    assert [saw(again, 2.0**n, norm=nan) for n in (10, 9)] == ["bad", "bad"]
    assert (again.count, again.in_a_row) == (7, 2)
    assert saw(fresh, 0.5, norm=inf) == "bad"  # a search that went too far
    assert saw(fresh, None, norm=inf) == "bad"  # nothing is scaled


def steps(*, chosen, rejected, accuracy, n=40):
    for i in range(n):
        c, r = chosen(i), rejected(i)
        yield i + 1, dict(zip(DpoCollapseMonitor.KEYS, (c, r, accuracy, c - r)))


def said_by(watch, sequence):
    return [text for step, found in sequence if (text := watch.saw(step, found))]


def test_a_collapse_is_warned_of_once_with_its_cures():
    watch = DpoCollapseMonitor()
    falling = list(steps(chosen=lambda i: -1.0 - 0.5 * i, rejected=lambda i: -5.0 - 1.5 * i, accuracy=1.0))
    first = said_by(watch, falling[:30])
    assert len(first) == 1 and first[0].startswith("step 20: ")
    for cure in ("beta", "learning_rate", "early_stopping_patience", "label_smoothing", "loss_type=ipo", "rpo_alpha"):
        assert cure in first[0]
    assert said_by(watch, falling[30:]) == []


@pytest.mark.parametrize(
    "healthy",
    [
        {"chosen": lambda i: 0.1 * i, "rejected": lambda i: -0.5 * i - 6, "accuracy": 1.0},
        {"chosen": lambda i: -0.1 * i - 1, "rejected": lambda i: -0.5 * i - 9, "accuracy": 0.75},
        {"chosen": lambda i: -3.0, "rejected": lambda i: -12.0, "accuracy": 1.0},
    ],
)
def test_what_is_no_collapse_is_not_warned_of(healthy):
    assert said_by(DpoCollapseMonitor(), steps(**healthy)) == []


def test_held_out_rows_that_are_not_finite_are_never_the_best(loaded, tmp_path, monkeypatch, said):
    plain, losses = SftObjective.eval_metrics, [float("nan"), 7.0, float("inf")]
    monkeypatch.setattr(
        SftObjective, "eval_metrics", lambda self, sums: {**plain(self, sums), "eval_loss": losses.pop(0)}
    )
    outcome = run_sft(loaded(eval_steps=2, load_best_model_at_end=True))
    assert outcome.best == (7.0, 4) and sum("the held-out loss is not finite" in line for line in said) == 2


# Signals


def at_step(step, number):
    """An observer that sends the process a signal when that step is logged."""

    def send(found, logged):
        if found == step and "loss" in logged:
            os.kill(os.getpid(), number)

    return Logged(send)


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(loaded, tmp_path, capfd):
    number = signal.SIGTERM
    handler = signal.getsignal(number)
    options = {"save_steps": 100, "eval_steps": 100, "lora_dropout": 0.1, "optim": "adamw_8bit"}
    with pytest.raises(
        Interrupted, match=rf"{number.name}: stopped after step 3 of 6; .*checkpoint-3 holds everything"
    ):
        run_sft(loaded(**options), observers=[at_step(3, number)])
    assert signal.getsignal(number) is handler
    assert "finishing the step" in capfd.readouterr().err
    run_sft(loaded(**options))
    run_sft(loaded("other", **options))
    assert same_adapter(tmp_path / "run/sft/adapter", tmp_path / "other/sft/adapter")
    assert metrics(tmp_path / "run/sft") == metrics(tmp_path / "other/sft")


def test_trl_stops_after_a_step_and_resumes(loaded, tmp_path, said):
    keys = {"engine": "trl", "batch_size": 3, "max_steps": 4, "save_steps": 100, "eval_steps": 100}
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        run_sft(loaded("run", **keys), observers=[at_step(2, signal.SIGTERM)])
    checkpoint = tmp_path / "run/sft/checkpoint-2"
    assert (checkpoint / "manifest.json").is_file()
    run_sft(loaded("run", **keys))
    assert "going on from checkpoint-2" in said
    run_sft(loaded("other", **keys))
    assert metrics(tmp_path / "run/sft") == metrics(tmp_path / "other/sft")
    assert same_adapter(tmp_path / "run/sft/adapter", tmp_path / "other/sft/adapter")
