"""Samples change nothing of training and come from the policy; trackers get our metrics."""

import json

import pytest
import torch

from tests.train.test_train import metrics, words
from zephyr_lite.chat import load_chat
from zephyr_lite.cli.app import run
from zephyr_lite.config.load import load_config
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train import samples
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import run_sft
from zephyr_lite.train.stage import Observer

SHORT = {"sample_tokens": 6, "max_steps": 2, "lora_dropout": 0.1, "learning_rate": 0.02}


class Seen(Observer):
    def __init__(self):
        self.samples = []

    def on_sample(self, step, samples):
        self.samples += samples


def drawn(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sampled(tiny_base, chat_rows, tmp_path_factory):
    """A run with two samples at each evaluation, what an observer saw of it, and the same run without any."""
    out, seen = tmp_path_factory.mktemp("runs"), Seen()
    for name, number in (("with", 2), ("without", 0)):
        given = words(tiny_base, out / name, chat_rows, samples=number, **SHORT)
        run_sft(load_config("sft", None, given), observers=[seen])
    return out, seen


def test_training_is_the_same_bit_for_bit_with_samples(sampled):
    out, seen = sampled
    assert metrics(out / "with" / "sft") == metrics(out / "without" / "sft")
    one, other = (read_adapter(out / name / "sft" / "adapter").modules for name in ("with", "without"))
    assert all(torch.equal(one[m].a, other[m].a) and torch.equal(one[m].b, other[m].b) for m in one)
    assert not (out / "without" / "sft" / "samples.jsonl").exists()
    assert [vars(s) for s in seen.samples] == drawn(out / "with" / "sft")


def test_a_sample_is_what_chat_answers(sampled):
    out, _ = sampled
    found = drawn(out / "with" / "sft")
    assert [s["step"] for s in found] == [0, 0, 2, 2]
    last = found[2]
    assert last["prompt"].endswith("<|user|>\nWhat is a good soup for a rainy evening?</s>\n<|assistant|>\n")
    assert last["reference"] == "Tomato soup. Roast the tomatoes first, then blend them with garlic."
    (answer,) = load_chat(out / "with").ask(["What is a good soup for a rainy evening?"], max_new_tokens=6)
    assert last["answer"] == answer


# -- trackers ----------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_every_metric(tiny_base, chat_rows, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = words(tiny_base, tmp_path / "r", chat_rows, max_steps=2, report_to="[tensorboard]")
    run_sft(load_config("sft", None, given))
    (file,) = (tmp_path / "r").rglob("events.out.tfevents.*")
    found = events.EventAccumulator(str(file.parent))
    found.Reload()
    assert [e.value for e in found.Scalars("train/loss")] == pytest.approx(metrics(tmp_path / "r" / "sft"), rel=1e-6)
    assert found.Scalars("eval/loss")[-1].step == 2


def test_the_command_line_keeps_json_clean(tmp_path, capsys):
    """The error that ends a command is an event, too; standard output holds only events."""
    code = run(["sft", "--json", f"output_dir={tmp_path / 'r'}", f"dataset.path={tmp_path / 'none.jsonl'}"])
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert code == 2 and events[-1]["event"] == "error" and events[-1]["message"] in captured.err


def test_the_state_of_training_is_left_alone(tiny_base, chat_rows, tmp_path, monkeypatch, said):
    given = words(tiny_base, tmp_path / "r", chat_rows, samples=1, loss_on="all", sample_tokens=3)
    stage = setup_stage("sft", load_config("sft", None, given))
    model = stage.stack.model
    model.train()
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    (sample,) = samples.draw_samples(stage, 3)
    assert sample.prompt.endswith("<|assistant|>\n") and sample.reference.startswith("Tomato")  # loss_on all: no mask
    assert model.training and torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1])

    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(samples, "_answers", full)
    said.clear()
    assert samples.draw_samples(stage, 4) == [] and samples.draw_samples(stage, 5) == []
    assert said == ["no samples are drawn: the card's memory does not suffice for them. Training is not affected."]
