"""What must hold of a whole run and is no single operation's affair: the design's invariants and the recipe's known faults,
where no other file shows them."""

import ast
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import SchedulerType

import zephyr_lite
from tests.conftest import make_model
from tests.contract.steps import PLAIN, moved, open_dpo
from tests.numeric import apart
from tests.train.test_train import LN2, Killed, dpo_words, killed_at, metrics, words
from zephyr_lite.config.load import MemorySpec, RunConfig, load_config
from zephyr_lite.config.resolve import resolve_run
from zephyr_lite.config.strict_yaml import read_yaml
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.merge import chain_of_run
from zephyr_lite.model.adapters import AdapterStack
from zephyr_lite.model.decoder import Decoder
from zephyr_lite.model.peft_io import LoraWeights, read_adapter, write_adapter
from zephyr_lite.train import loop as loop_file
from zephyr_lite.train.dpo import DpoObjective, run_dpo
from zephyr_lite.train.loop import (
    TrainState,
    accumulate_gradients,
    forward_backward,
    train,
    update,
    warmup_largest_batch,
    zero_gradients,
)
from zephyr_lite.train.optim import make_optimizer, make_scheduler
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import SftObjective, run_sft


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A base whose sliding window is smaller than any of the rows."""
    from tests.conftest import make_tokenizer

    folder = tmp_path_factory.mktemp("windowed")
    make_model(sliding_window=9).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def sft_run(windowed, chat_rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    run_sft(load_config("sft", None, words(windowed, out, chat_rows, batch_size=1, **PLAIN)))
    return out


@pytest.fixture
def run(sft_run, tmp_path):
    shutil.copytree(sft_run, tmp_path / "run")
    return tmp_path / "run"


# Going on


def test_memory_may_be_changed_to_go_on(windowed, chat_rows, tmp_path, monkeypatch):
    """A run that was too large for the card must be able to go on with a smaller plan, and only then has a new one."""
    settings = {"save_steps": 1, **PLAIN}
    with killed_at(1):
        run_sft(load_config("sft", None, words(windowed, tmp_path / "r", chat_rows, **settings)))
    first = StageDir(tmp_path / "r" / "sft").info()["plan"]
    monkeypatch.setattr("zephyr_lite.memory.machine.free_memory", lambda device: 2**20)
    for memory, keep in ((None, first["keep"]), ("input", ["input"] * len(first["keep"]))):
        changes = {} if memory is None else {"memory.keep": memory}
        loaded = load_config("sft", None, words(windowed, tmp_path / "r", chat_rows, **settings, **changes))
        stage = setup_stage("sft", loaded)
        assert list(stage.plan.keep) == keep and (stage.plan.as_dict() == first) == (memory is None)
    assert set(stage.dir.info()["plan"]["keep"]) == {"input"}


@pytest.mark.parametrize("where", ["early", "end"])
def test_killed_before_the_adapter_is_written(windowed, chat_rows, tmp_path, monkeypatch, where):
    """After the last checkpoint, or after an early stop: nothing is trained again, and the result has its evaluations."""
    import zephyr_lite.train.main as run_file

    if where == "early":
        losses = iter([3.0, 4.0, 5.0])
        monkeypatch.setattr(SftObjective, "eval_metrics", lambda self, sums: {"eval_loss": next(losses)})
    patience = {"early_stopping_patience": 2} if where == "early" else {}
    settings = {"eval_steps": 1, "num_train_epochs": 4, **patience, **PLAIN}
    loaded = load_config("sft", None, words(windowed, tmp_path / "r", chat_rows, **settings))
    close = run_file.save_stage
    monkeypatch.setattr(run_file, "save_stage", lambda *a, **k: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run_sft(loaded)
    logged = (tmp_path / "r" / "sft" / "metrics.jsonl").read_text()
    monkeypatch.setattr(run_file, "save_stage", close)
    monkeypatch.setattr(loop_file, "accumulate_gradients", lambda *words: pytest.fail("trained again"))
    outcome = run_sft(loaded)
    assert (tmp_path / "r" / "sft" / "metrics.jsonl").read_text() == logged
    result = StageDir(tmp_path / "r" / "sft").info()["result"]
    assert (
        len(result["evaluations"]) == outcome.step and result["metrics"]["loss"] == metrics(tmp_path / "r" / "sft")[-1]
    )
    assert outcome.step == 3 or where == "end"


# What a stage takes over


@pytest.mark.parametrize("system", ["Answer: in 'one' line.\nBe kind.", "null"])
def test_the_system_turn_is_inherited_as_it_is(windowed, run, pair_rows, system):
    text = run / "sft" / "config.yaml"
    text.write_text(json.dumps({**read_yaml(text), "system": system}))
    loaded = resolve_run("dpo", None, [f"dataset.path={pair_rows}", f"output_dir={run}"])
    assert loaded.config.system == system and loaded.config.load_in_4bit is False
    own = resolve_run("dpo", None, [f"dataset.path={pair_rows}", f"output_dir={run}", "system=mine"])
    assert own.config.system == "mine"


def test_a_second_sft_and_a_second_round_of_dpo_stand_on_the_stages_below(windowed, run, chat_rows, pair_rows):
    run_dpo(load_config("dpo", None, dpo_words(windowed, run, pair_rows, **PLAIN)))
    below = [run / "sft" / "adapter", run / "dpo" / "delta"]
    named = f"[{below[0]}, {below[1]}]"
    again = dpo_words(windowed, run, pair_rows, stage="dpo2", adapters=named, max_steps=3, warmup_ratio=0, **PLAIN)
    run_dpo(load_config("dpo", None, again))
    assert metrics(run / "dpo2")[0] == pytest.approx(LN2, abs=1e-6)
    run_sft(
        load_config("sft", None, words(windowed, run, chat_rows, stage="more", adapters=named, max_steps=2, **PLAIN)),
    )
    for stage in ("dpo2", "more"):
        chain = chain_of_run(run, stage=stage)
        assert [a.path for a in chain.adapters] == [*below, run / stage / "delta"]
        assert {w.rank for w in read_adapter(run / stage / "adapter").modules.values()} == {12}
    assert metrics(run / "more")[0] < metrics(run / "sft")[0]  # it went on, and did not begin at the base


# The recipe's known faults


def test_master_weights_gradients_and_moments_are_float32_in_16_bits(windowed, chat_rows, tmp_path):
    """At a learning rate of 5e-6 half of the updates round away in bfloat16."""
    settings = {"dtype": "bfloat16", "learning_rate": 1e-7, "warmup_ratio": 0, **PLAIN}
    loaded = load_config("sft", None, words(windowed, tmp_path / "r", chat_rows, **settings))
    stage = setup_stage("sft", loaded)
    moved(stage)
    state = TrainState(stage, SftObjective(stage))
    assert stage.base.model.lm_head.weight.dtype == torch.bfloat16
    found = accumulate_gradients(state, 0)
    assert {p.grad.dtype for p in state.parameters.values()} == {torch.float32}
    before = {n: p.detach().clone() for n, p in state.parameters.items()}
    assert update(state, found)
    states = [v for s in state.optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg")]
    assert {p.dtype for p in state.parameters.values()} == {v.dtype for v in states} == {torch.float32}
    for name, parameter in state.parameters.items():
        share = (parameter != before[name]).float().mean().item()
        rounded = (parameter.bfloat16() != before[name].bfloat16()).float().mean().item()
        assert share > 0.5 and rounded < 0.1, name


def test_the_base_is_never_written_to(windowed, run, pair_rows):
    """No merge into the base, in 4 bits or in any: what the adapters stand on keeps its bytes through training."""
    stage = open_dpo(windowed, run, pair_rows, load_in_4bit="true", max_steps=3)
    frozen = {n: p.detach().clone() for n, p in stage.stack.model.named_parameters() if not p.requires_grad}
    assert any(".sft." in n for n in frozen) and any(p.dtype == torch.uint8 for p in frozen.values())
    train(TrainState(stage, DpoObjective(stage)))
    after = dict(stage.stack.model.named_parameters())
    for name, value in frozen.items():
        assert torch.equal(after[name], value), name


def test_float16_scales_the_loss_and_gives_up_when_no_scale_helps(windowed, chat_rows, tmp_path, monkeypatch):
    settings = {"dtype": "float16", "num_train_epochs": 12, "batch_size": 1, **PLAIN}
    loaded = load_config("sft", None, words(windowed, tmp_path / "r", chat_rows, **settings))
    stage = setup_stage("sft", loaded)
    objective = SftObjective(stage)
    state = TrainState(stage, objective)
    total = objective.num_targets([0])
    sums = forward_backward(state, [0], 0, total)
    scale = state.scaler.get_scale()
    scaled = {n: p.grad.clone() for n, p in state.parameters.items()}
    zero_gradients(state)
    state.scaler = torch.amp.GradScaler("cpu", enabled=False)
    forward_backward(state, [0], 0, total)
    name = "model.layers.1.mlp.down_proj.lora_B"
    assert scale > 1 and math.isfinite(sums["loss"])
    assert apart(scaled[name] / scale, state.parameters[name].grad) < 2e-2
    # a gradient that no scale makes finite must not be skipped for days
    state = TrainState(stage, objective)
    plain = loop_file.gradient_norm
    monkeypatch.setattr(loop_file, "gradient_norm", lambda state: plain(state) * float("nan"))
    real = state.scaler.update
    monkeypatch.setattr(state.scaler, "update", lambda: real(state.scaler.get_scale() / 2))
    with pytest.raises(UserError, match="not finite three times"):
        train(state)


def test_an_adapter_on_the_output_head_is_not_ignored(tmp_path):
    model = make_model()
    stack = AdapterStack(model)
    a, b = torch.randn(2, 64), torch.randn(448, 2)
    write_adapter(tmp_path / "head", {"lm_head": LoraWeights(a, b, 1.0)}, base_model_name="x")
    stack.add_frozen("head", read_adapter(tmp_path / "head"))
    with pytest.raises(UserError, match="output head"):
        Decoder(stack, torch.float32)


def test_the_largest_micro_batch_is_tried_first_and_leaves_no_trace(windowed, chat_rows, tmp_path):
    """One outlier row must not run out of memory hours into a run."""
    settings = {"lora_dropout": 0.1, **PLAIN}
    loaded = load_config("sft", None, words(windowed, tmp_path / "r", chat_rows, **settings))
    stage = setup_stage("sft", loaded, claim=False)
    lengths = stage.data.lengths
    for tokens in (1, int(lengths.max() + lengths.min()), 10_000):
        plan = type(stage.plan)(tokens, ("all",) * len(stage.plan.keep))
        task = SftObjective(stage)
        task.oom.follow(plan)
        state = TrainState(stage, task)
        before = {n: p.detach().clone() for n, p in state.parameters.items()}
        group, *others = warmup_largest_batch(state)
        assert all(lengths[other].sum() > lengths[group].sum() for other in others)
        assert int(lengths.argmax()) in group and len(group) == {1: 1, 10_000: len(lengths)}.get(tokens, len(group))
        assert tokens == 1 or lengths[group].sum() <= tokens
        assert all(not p.grad.any() and torch.equal(p, before[n]) for n, p in state.parameters.items())
        assert all(not torch.as_tensor(v).any() for s in state.optimizer.state.values() for v in s.values())


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_schedule_of_transformers_runs_and_is_kept_or_is_refused(name):
    parameters = {"a": torch.nn.Parameter(torch.ones(2))}
    config = RunConfig(lr_scheduler_type=name)
    optimizer = make_optimizer(config, parameters)
    if name in (
        "reduce_lr_on_plateau",
        "greedy",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ):
        with pytest.raises(UserError, match="lr_scheduler_type"):
            make_scheduler(config, optimizer, 20)
        return
    scheduler = make_scheduler(config, optimizer, 20)
    for _ in range(20):
        optimizer.step()
        scheduler.step()
    json.dumps(scheduler.state_dict())


def test_every_key_of_the_configuration_is_read_somewhere():
    from zephyr_lite.config.load import DatasetSpec, RunConfig

    read = {
        node.attr
        for path in Path(zephyr_lite.__file__).parent.rglob("*.py")
        if path.parts[-2:] not in (("config", "load.py"), ("config", "schema.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    keys = {*RunConfig.model_fields, *DatasetSpec.model_fields, *MemorySpec.model_fields}
    assert keys - read == {"loss_weights"}  # RunConfig.losses reads it
    assert {"losses", "loss_type"} <= read
