"""Both stages end to end on a tiny model: the invariants of the loop, the reference, checkpoints and what is refused."""

import json
import shutil
from contextlib import contextmanager
from typing import get_args

import pytest
import torch

from zephyr_lite.config.load import DPO_DEFAULTS, RunConfig, load_config
from zephyr_lite.config.resolve import resolve_run
from zephyr_lite.config.schema import REFERENCE_FREE, PairLoss
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train import loop
from zephyr_lite.train.dpo import DpoObjective, run_dpo
from zephyr_lite.train.losses import initial_loss, preference_loss
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import SftObjective, run_sft
from zephyr_lite.train.steps import micro_batches, rows_of_step, step_schedule

LN2 = 0.6931471805599453


def words(base, out, rows, **changes):
    settings = {
        "model_name_or_path": base,
        "output_dir": out,
        "dataset.path": rows,
        "eval_dataset.path": rows,
        "max_length": 128,
        "batch_size": 3,
        "lora_r": 4,
        "lora_alpha": 8,
        "learning_rate": 5e-3,
        "save_steps": 2,
        "eval_steps": 2,
        "num_train_epochs": 2,
        "optim": "adamw_torch",
        "samples": 0,
        **changes,
    }
    return [f"{k}={v}" for k, v in settings.items()]


def metrics(stage, key="loss"):
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def sft_run(tiny_base, chat_rows, tmp_path_factory):
    """A run whose SFT stage is complete."""
    out = tmp_path_factory.mktemp("runs") / "a"
    run_sft(load_config("sft", None, words(tiny_base, out, chat_rows, batch_size=1, lora_dropout=0.1)))
    return out


def dpo_words(tiny_base, run, pair_rows, **changes):
    own = {"max_prompt_length": 64, "beta": 0.1, "learning_rate": 1e-3, "precompute_ref_log_probs": False}
    return words(tiny_base, run, pair_rows, **{**own, **changes})


@pytest.fixture
def run(sft_run, tmp_path):
    """A copy of it, to go on with."""
    shutil.copytree(sft_run, tmp_path / "run")
    return tmp_path / "run"


def test_sft_learns_and_leaves_a_complete_stage(sft_run):
    losses = metrics(sft_run / "sft")
    assert losses[-1] < losses[0] - 0.3
    assert metrics(sft_run / "sft", "eval_loss")[-1] < losses[0]
    info = StageDir(sft_run / "sft").info()
    assert info["status"] == "complete" and info["result"]["steps"] == len(losses)
    assert (sft_run / "sft" / "adapter" / "chat_template.jinja").is_file()
    assert not (sft_run / "sft" / "delta").exists()
    assert any(w.b.abs().max() > 0 for w in read_adapter(sft_run / "sft" / "adapter").modules.values())


def test_a_stale_or_foreign_reference_cache_is_not_used(dpo_loaded, run, said):
    stage = setup_stage("dpo", dpo_loaded(run, precompute_ref_log_probs=True))
    first = DpoObjective(stage).cache
    assert DpoObjective(stage).cache.path == first.path and "read from" in said[-1]
    first.path.write_bytes(first.path.read_bytes()[:-7])  # torn
    DpoObjective(stage)
    assert "computing" in said[-1]
    stage.frozen = []  # other adapters below
    assert DpoObjective(stage).cache.path != first.path


def test_the_reference_of_several_epochs_is_cached_and_a_resumed_run_keeps_the_choice(dpo_loaded, run, said):
    def loaded(**changes):
        return dpo_loaded(run, **{"precompute_ref_log_probs": "auto", "save_steps": 1, **changes})

    one = setup_stage("dpo", loaded(num_train_epochs=1), claim=False)
    assert one.config.precompute_ref_log_probs is False and one.workload.live_reference
    with killed_at(2):
        run_dpo(loaded())  # two epochs
    assert "that makes 2 epochs" in " ".join(" ".join(said).split())
    assert "precompute_ref_log_probs: true\n" in (run / "dpo" / "config.yaml").read_text()
    assert len(list((run / "dpo").glob("reference-*.safetensors"))) == 1
    assert metrics(run / "dpo")[0] == pytest.approx(LN2, abs=1e-4)
    stage = setup_stage("dpo", loaded())
    assert stage.config.precompute_ref_log_probs is True and not stage.workload.live_reference
    few = [line.partition("steps: ")[2] for line in said if "so few steps" in line]  # not of the resumed stage
    assert few == [f"raise num_train_epochs (it is {epochs}) or lower batch_size (it is 3)." for epochs in (1, 2)]
    with pytest.raises(UserError, match="precompute_ref_log_probs: True then, False now"):
        setup_stage("dpo", loaded(precompute_ref_log_probs=False))
    for loss in ("simpo", "orpo"):
        with pytest.raises(UserError, match=rf"than these:\n  loss_type: 'sigmoid' then, '{loss}' now\n") as error:
            setup_stage("dpo", loaded(loss_type=loss))
        assert "precompute" not in error.value.message


def test_a_reference_that_is_not_the_policy_at_step_0_is_refused(dpo_loaded, run):
    """A stale cache would give a loss that is not ln 2; TRL and LLaMA-Factory train on."""
    task = DpoObjective(setup_stage("dpo", dpo_loaded(run, precompute_ref_log_probs=True)))
    task.cache.sums += 40
    with pytest.raises(UserError, match="differ by"):
        task.loss([0, 1], 0, task.num_targets([0, 1]))


def test_rows_of_a_step_cover_each_epoch_once():
    config = RunConfig(batch_size=4, num_train_epochs=2)
    per_epoch, total = step_schedule(config, 10)
    assert (per_epoch, total) == (3, 6)
    epochs = [[r for step in range(e * 3, e * 3 + 3) for r in rows_of_step(config, 10, step)] for e in (0, 1)]
    assert [sorted(e) for e in epochs] == [list(range(10))] * 2 and epochs[0] != epochs[1]
    assert len(rows_of_step(config, 10, 2)) == 2  # the last partial step
    assert sorted(i for g in micro_batches([3, 5, 9], [0, 0, 0, 7, 0, 100, 0, 0, 0, 3], 10) for i in g) == [3, 5, 9]


class Killed(BaseException):
    pass


@contextmanager
def killed_at(step):
    """The run inside it dies when it would begin that step."""
    plain = loop.accumulate_gradients

    def dies(state, number):
        if number == step:
            raise Killed
        return plain(state, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", dies)
        with pytest.raises(Killed):
            yield


def test_best_checkpoint_and_early_stopping(loaded, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(SftObjective, "eval_metrics", lambda self, sums: {"eval_loss": next(losses)})
    keys = {"eval_steps": 1, "save_steps": 1, "num_train_epochs": 20, "save_total_limit": 1}
    outcome = run_sft(loaded("r", **keys, load_best_model_at_end="true", early_stopping_patience=2))
    assert outcome.best == (2.0, 2) and outcome.step == 4
    assert {p.name for p in StageDir(tmp_path / "r" / "sft").checkpoints()} == {"checkpoint-2", "checkpoint-4"}
    from safetensors.torch import load_file

    best = load_file(tmp_path / "r" / "sft" / "checkpoint-2" / "state.safetensors")
    adapter = read_adapter(tmp_path / "r" / "sft" / "adapter").modules
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(adapter[name].b, best[f"adapter.{name}.lora_B"])


def test_a_damaged_best_checkpoint_does_not_lose_the_run(loaded, tmp_path, monkeypatch, said):
    losses, folder = iter([2.0, 3.0]), tmp_path / "r" / "sft" / "checkpoint-1"

    def damaged(self, sums):
        if folder.exists():
            (folder / "state.safetensors").write_bytes(b"torn")
        return {"eval_loss": next(losses)}

    monkeypatch.setattr(SftObjective, "eval_metrics", damaged)
    outcome = run_sft(loaded("r", eval_steps=1, save_steps=1, max_steps=2, load_best_model_at_end="true"))
    assert outcome.step == 2 and StageDir(tmp_path / "r" / "sft").complete()
    (warning,) = (line for line in said if "checkpoint-1, the best, is damaged" in line)
    assert warning in outcome.warnings


def test_plain_texts_are_trained_on_and_some_are_held_out(tiny_base, tmp_path):
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"story": f"Once upon a time {i}."}) + "\n" for i in range(9))
    )
    (tmp_path / "theirs.yaml").write_text(
        f"datasets: [{{path: {tmp_path / 'texts.jsonl'}}}]\ndataset_text_field: story\ntest_split_size: 3\n"
        f"warmup_steps: 2\nmax_steps: 4\nlearning_rate: 1.0e-3\nlr_scheduler_type: constant_with_warmup\n"
    )
    settings = {"model_name_or_path": tiny_base, "output_dir": tmp_path / "r", "load_in_4bit": "false", "samples": 1}
    words = [f"{key}={value}" for key, value in settings.items()]
    run_sft(load_config("sft", str(tmp_path / "theirs.yaml"), words))
    stage = StageDir(tmp_path / "r" / "sft")
    info = stage.info()
    assert info["data"]["kept"] == 6 and info["eval_data"]["fingerprint"] != info["data"]["fingerprint"]
    assert info["data"]["supervised"] == info["data"]["tokens"] - 6  # all but the first token of each
    rates = [
        json.loads(line)["learning_rate"] for line in stage.metrics.read_text().splitlines() if "learning_rate" in line
    ]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3])


def test_orpo_is_finite_where_a_response_is_certain():
    policy = torch.tensor([[0.0, -3.0], [-3.0, 0.0], [0.0, 0.0]], requires_grad=True)
    losses = preference_loss(policy, None, torch.tensor([[1, 4], [2, 4], [2, 4]]), beta=0.1, loss_type="orpo").losses
    losses.sum().backward()
    assert losses.isfinite().all() and policy.grad.abs().max() < 2000


def test_what_trl_has_no_twin_for():
    """ipo_sum by the paper's equation, a weighted sum, and a loss that needs no reference."""
    policy = torch.tensor([[-3.0, -5.0], [-9.0, -4.0]], dtype=torch.float64)
    reference = torch.tensor([[-4.0, -4.0], [-8.0, -6.0]], dtype=torch.float64)
    sizes, keys = torch.tensor([[2, 4], [3, 1]]), {"beta": 0.5, "simpo_gamma": 0.3}
    found = preference_loss(policy, reference, sizes, loss_type={"ipo_sum": 1, "sft": 0.2}, **keys)
    gap, nll = torch.tensor([2.0, -3.0]).double(), torch.tensor([3.0, 9.0]).double() / 2.5
    torch.testing.assert_close(found.losses, (gap - 1 / (2 * 0.5)) ** 2 + 0.2 * nll)
    torch.testing.assert_close(found.chosen_rewards, torch.tensor([0.5, -0.5], dtype=torch.float64))
    for name in get_args(PairLoss):
        with_it, free = (preference_loss(policy, each, sizes, loss_type=name, **keys) for each in (reference, None))
        assert torch.equal(free.losses, with_it.losses) == (name in REFERENCE_FREE)
        assert free.chosen_rewards.tolist() == [-0.75, -1.5]  # β times the mean log-probability


@pytest.mark.parametrize(
    ("settings", "value", "name"),
    [
        ({}, LN2, "ln 2"),
        ({"label_smoothing": 0.2, "loss_type": "robust"}, LN2, "ln 2"),
        ({"loss_type": "ipo", "beta": 0.1}, 25, "25"),
        ({"loss_type": ["sigmoid", "apo_down"], "loss_weights": [1, 2]}, LN2 + 2, "2.693"),
    ],
)
def test_the_loss_where_policy_and_reference_are_equal(settings, value, name):
    found = initial_loss(RunConfig(**settings))
    assert found == (pytest.approx(value), name)
    assert initial_loss(RunConfig(loss_type=["sigmoid", "sft"])) is None


def test_a_model_that_is_an_adapter_goes_below_onto_its_base(tiny_base, run, pair_rows, tmp_path):
    """The handbook's QLoRA recipe for DPO names the SFT adapter as its model."""
    adapter = run / "sft" / "adapter"
    (tmp_path / "theirs.yaml").write_text(
        f"model_name_or_path: {adapter}\nuse_peft: true\ndataset: {pair_rows}\noutput_dir: {tmp_path / 'r'}\n"
    )
    loaded = resolve_run("dpo", str(tmp_path / "theirs.yaml"), [])
    assert (loaded.config.model_name_or_path, loaded.config.adapters) == (str(tiny_base), [str(adapter)])
    assert any(f"{adapter} is an adapter" in note for note in loaded.notes)
    ours = f"model_name_or_path: {tiny_base}\noutput_dir: {tmp_path / 'r'}\n"
    (tmp_path / "theirs.yaml").write_text(ours)
    assert resolve_run("dpo", str(tmp_path / "theirs.yaml"), []).config.adapters == []
    (tmp_path / "theirs.yaml").write_text(ours + "per_device_train_batch_size: 2\n")
    loaded = resolve_run("dpo", str(tmp_path / "theirs.yaml"), [])
    assert loaded.config.adapters == "none" and any("adapters: none" in note for note in loaded.notes)


def test_dpo_continues_the_newest_run_and_inherits(tiny_base, run, pair_rows, said):
    loaded = resolve_run("dpo", None, [f"dataset.path={pair_rows}"], runs_root=run.parent)
    assert loaded.config.output_dir == str(run) and loaded.config.model_name_or_path == str(tiny_base)
    assert said == [f"{run}, the newest run; output_dir=runs/NAME chooses another"]
    assert loaded.config.lora_r == DPO_DEFAULTS["lora_r"]
