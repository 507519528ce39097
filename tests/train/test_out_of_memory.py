"""Never out of memory: whichever allocation of a step fails, the step is redone and equals the undisturbed one."""

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.conftest import make_model, make_tokenizer
from tests.messages import messages_to
from tests.numeric import apart
from tests.train.test_train import dpo_words, killed_at, metrics, words
from zephyr_lite.config.load import load_config
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.memory.plan import Plan
from zephyr_lite.train.dpo import DpoObjective
from zephyr_lite.train.loop import TrainState, accumulate_gradients, update
from zephyr_lite.train.oom import WORDS, is_out_of_memory
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import SftObjective, run_sft

STEP = 3


class Fails(TorchDispatchMode):
    """Counts operations whose result has memory of its own, and refuses it to some of them.

    Args:
        at: which allocation fails, from 1; 0: none.
        times: how often; the count begins anew after each.
    """

    def __init__(self, at=0, times=1):
        super().__init__()
        self.at, self.times, self.count, self.failed = at, times, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if allocates(func) and (not self.at or self.failed < self.times):
            self.count += 1
            if self.count == self.at:
                self.count, self.failed = 0, self.failed + 1
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate for {func} (a test)")
        return result


@cache
def allocates(func):
    """Whether its result has memory of its own: it is a tensor that its schema does not call a view or an argument."""
    returns = func._schema.returns
    fresh = [r for r in returns if "Tensor" in str(r.type) and r.alias_info is None]
    return bool(fresh) and func is not torch.ops.aten._unsafe_view.default


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model(intermediate_size=64).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture
def opened(base, chat_rows, pair_rows, tmp_path):
    """(method, tokens at once, what layers keep, settings) → the state of a run whose adapter's B is not zero."""

    def make(method, tokens, keep, **changes):
        settings = {
            "lora_r": 2,
            "lora_target_modules": "[q_proj, down_proj]",
            "max_length": 80,
            "batch_size": 2,
            "adapters": "none",
            "load_in_4bit": "false",
            "warmup_ratio": 0,
            "lora_dropout": 0,
            "learning_rate": 5e-4,  # Adam's first step is lr · sign(g): a g that rounds to the other side of 0 moves it twice
            **changes,
        }
        named = words if method == "sft" else dpo_words
        rows = chat_rows if method == "sft" else pair_rows
        stage = setup_stage(method, load_config(method, None, named(base, tmp_path / "r", rows, **settings)))
        generator = torch.Generator().manual_seed(3)
        for parameter in stage.stack.parameters().values():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        task = SftObjective(stage) if method == "sft" else DpoObjective(stage)
        plan = Plan(tokens, keep, threads=torch.get_num_threads())
        task.oom.follow(plan)
        return TrainState(stage, task)

    return make


@pytest.fixture
def at_once(monkeypatch):
    """Collecting cycles takes a quarter of a second with all these libraries; that there are none is a test of its own."""
    monkeypatch.setattr("zephyr_lite.train.oom.gc.collect", lambda: 0)


class Again:
    """Runs a step over and over, each time from the same beginning."""

    def __init__(self, state):
        self.state, self.plan = state, state.stage.plan
        self.adapter = {n: p.detach().clone() for n, p in state.parameters.items()}
        self.moments = [{k: torch.as_tensor(v).clone() for k, v in s.items()} for s in state.optimizer.state.values()]
        self.schedule = state.scheduler.state_dict().copy()
        self.rates = [group["lr"] for group in state.optimizer.param_groups]

    def reset(self):
        with torch.no_grad():
            for name, parameter in self.state.parameters.items():
                parameter.copy_(self.adapter[name])
                parameter.grad = None
            for state, then in zip(self.state.optimizer.state.values(), self.moments):
                for key, value in then.items():
                    state[key] = value.clone() if isinstance(state[key], torch.Tensor) else value.item()
        self.state.scheduler.load_state_dict(self.schedule.copy())
        for group, rate in zip(self.state.optimizer.param_groups, self.rates):
            group["lr"] = rate
        self.state.objective.oom.follow(self.plan)

    def run(self, fails=None, steps=1):
        """(metrics, gradients as the update gets them, adapter) after so many steps; the first of them under ``fails``."""
        self.reset()
        grads = {}
        for step in range(STEP, STEP + steps):
            with fails or Fails() if step == STEP else nullcontext():
                found = accumulate_gradients(self.state, step)
                with _disable_current_modes():  # these copies are the test's own
                    grads.update({(step, n): p.grad.clone() for n, p in self.state.parameters.items()})
                update(self.state, found)
        return found, grads, {n: p.detach().clone() for n, p in self.state.parameters.items()}


def assert_equal(found, wanted):
    for name, value in wanted[0].items():
        assert found[0][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    for mine, whole in zip(found[1:], wanted[1:]):
        assert mine.keys() == whole.keys()
        for name, value in whole.items():
            assert value.norm() > 0 and apart(mine[name], value) < 1e-5, name


@pytest.mark.parametrize(
    ("method", "tokens", "keep", "targets"),
    [("sft", 60, ("input", "all"), "[q_proj, down_proj]"), ("dpo", 150, ("all", "attention"), "[v_proj]")],
)
def test_whichever_allocation_of_a_step_fails_the_step_is_the_same(opened, at_once, method, tokens, keep, targets):
    """Forward, backward, norm, clipping, update: every ninth of them, and the last."""
    again = Again(opened(method, tokens, keep, lora_target_modules=targets))
    count = Fails()
    wanted, after_two = again.run(count), again.run(steps=2)
    assert 150 < count.count < 600
    for n in [*range(2, count.count, 9), count.count]:
        fails = Fails(n)
        assert_equal(again.run(fails), wanted)
        assert fails.failed and again.state.stage.plan != again.plan, n
        if n % 90 == 2:
            assert_equal(again.run(Fails(n), steps=2), after_two)
    unhurt = Fails(count.count + 1)
    again.run(unhurt)
    assert not unhurt.failed and again.state.stage.plan == again.plan


@pytest.mark.parametrize(("load_in_4bit", "plan"), [("false", {"offload": 2, "tile": 16}), ("true", {"stream": True})])
def test_transfers_from_and_to_the_host_are_redone_too(opened, at_once, load_in_4bit, plan):
    """A pass that failed leaves layers' tensors on their way, and weights in half of a buffer; the next must not meet them."""
    asked = {f"memory.{name}": True for name in plan if name != "tile"}
    state = opened("sft", 160, ("all", "all"), load_in_4bit=load_in_4bit, **asked)
    state.objective.oom.follow(replace(state.stage.plan, **plan))
    again = Again(state)
    count = Fails()
    wanted = again.run(count)
    for n in range(3, count.count * 3 // 4, count.count // 8):
        fails = Fails(n)
        assert_equal(again.run(fails), wanted)
        kept = {name: value for name, value in plan.items() if name != "tile"}
        assert fails.failed and all(getattr(state.stage.plan, name) == value for name, value in kept.items())


def test_a_run_continues_under_the_smaller_plan_and_so_does_a_resumed_one(base, chat_rows, tmp_path, monkeypatch):
    settings = {"load_in_4bit": "false", "save_steps": 1, "num_train_epochs": 2, "lora_dropout": 0.1}
    run_sft(load_config("sft", None, words(base, tmp_path / "whole", chat_rows, **settings)))
    plain, said = SftObjective.loss, []
    most = 200

    def cramped(self, examples, step, total):
        tokens = sum(int(self.data.lengths[i]) for i in examples)
        found = plain(self, examples, step, total)
        if step >= 1 and tokens > most:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} KiB.")
        return found

    monkeypatch.setattr(SftObjective, "loss", cramped)
    loaded = load_config("sft", None, words(base, tmp_path / "r", chat_rows, **settings))
    with killed_at(3), messages_to(said.append):
        run_sft(loaded)
    first = next(line for line in said if "memory ran out" in line)
    assert "the plan is now:" in first and "tokens at once" in first and "Tried to allocate" in first
    plan = StageDir(tmp_path / "r" / "sft").info()["plan"]
    assert plan["micro_tokens"] <= most
    said.clear()
    with messages_to(said.append):
        run_sft(loaded)
    assert not any("memory ran out" in line for line in said)
    info = StageDir(tmp_path / "r" / "sft").info()
    assert info["status"] == "complete" and info["plan"] == plan
    for key in ("loss", "eval_loss"):
        found, whole = (metrics(tmp_path / name / "sft", key) for name in ("r", "whole"))
        assert found == pytest.approx(whole, rel=1e-4)


def test_an_example_that_fits_under_no_plan_is_named_and_nothing_is_changed(base, chat_rows, tmp_path, monkeypatch):
    plain, tried = SftObjective.loss, []

    def cramped(self, examples, step, total):
        found = plain(self, examples, step, total)
        if step == 1:
            tried.append((list(examples), self.stage.plan))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 KiB.")
        return found

    monkeypatch.setattr(SftObjective, "loss", cramped)
    settings = {"save_steps": 1, "lora_r": 2}
    loaded = load_config("sft", None, words(base, tmp_path / "r", chat_rows, **settings))
    with pytest.raises(UserError) as error:
        run_sft(loaded)
    last, plan = tried[-1]
    assert len(last) == 1 and plan.keep == ("input", "input") and plan.scratch == "small" and not plan.offload
    assert {len(examples) for examples, _ in tried} > {1}
    stage = setup_stage("sft", loaded, claim=False)
    example = stage.data.examples[last[0]]
    assert error.value.message.startswith(f"{example.where}: its {len(example.ids)} tokens do not fit")
    assert "chat.jsonl" in example.where and "max_length (it is 128)" in error.value.hint
    checkpoints = StageDir(tmp_path / "r" / "sft").checkpoints()
    assert [p.name for p in checkpoints] == ["checkpoint-1"]
    assert stage.plan == plan  # the next start begins with it


@pytest.mark.parametrize("held", [False, True])
def test_the_failed_graph_is_gone_before_the_next_attempt(opened, held):
    """An error's traceback holds its frames, and those the graph: then the second attempt has less room than the first.
    Even where other code holds the error (a debugger, a logger)."""
    state = opened("sft", 150, ("all", "all"))
    with Fails() as count:
        accumulate_gradients(state, STEP)
    alive, errors = [], []
    loss, backward = state.objective.loss, torch.Tensor.backward

    def watched_loss(*args):
        found = loss(*args)
        alive.append(weakref.ref(found[0]))
        return found

    def watched_backward(tensor):
        try:
            return backward(tensor)
        except torch.OutOfMemoryError as error:
            errors.extend([error] if held else [])
            raise

    state.objective.loss = watched_loss
    left = []
    gc.disable()  # nothing may be left to chance here
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", watched_backward)
            patch.setattr(gc, "collect", lambda *a: left.append(sum(ref() is not None for ref in alive)))
            with Fails(int(count.count * 0.8)):
                accumulate_gradients(state, STEP)
    finally:
        gc.enable()
    assert left == [0] and len(alive) > 1 and len(errors) <= int(held)


def test_an_evaluation_that_does_not_fit_is_split_and_what_is_done_stays(opened, at_once):
    state = opened("dpo", 150, ("all", "all"))
    stage, task, plan = state.stage, state.objective, state.stage.plan
    with Fails() as count:
        wanted = task.evaluate()
    batches = []
    plain = task._batch
    task._batch = lambda data, examples: batches.append(list(examples)) or plain(data, examples)
    for n in [*range(1, count.count, count.count // 8), count.count]:
        task.oom.follow(plan)
        batches.clear()
        with Fails(n) as fails:
            found = task.evaluate()
        assert fails.failed and stage.plan != plan
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5), n
        tried = sorted(i for group in batches for i in group)
        assert len(tried) - len(stage.eval_data.lengths) <= 3  # one group, and no other, ran twice
    task.oom.follow(replace(plan, reference="own"))
    assert task.evaluate() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value) and is_out_of_memory(torch.OutOfMemoryError("x"))
    for text in WORDS:
        assert is_out_of_memory(RuntimeError(f"{text}, and more")) and not is_out_of_memory(ValueError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_what_fails_again_gets_ever_smaller_and_drops_the_same(opened, at_once):
    """Dropout is a function of the step's number; NF4's scratch is emptied on the way."""
    settings = {"lora_dropout": 0.2, "load_in_4bit": "true", "batch_size": 3, "lora_target_modules": "[v_proj]"}
    again = Again(opened("dpo", 250, ("all", "all"), **settings))
    count = Fails()
    wanted = again.run(count)
    other = accumulate_gradients(again.state, STEP + 1)["loss"]
    assert other != pytest.approx(wanted[0]["loss"], rel=1e-3)
    for n in range(5, count.count, count.count // 5):
        fails = Fails(n, times=4)
        assert_equal(again.run(fails), wanted)
        assert fails.failed == 4, n
