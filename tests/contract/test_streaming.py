"""Claim 3, streaming and offload: layers that come from the host, and kept activations that go there, change no bit."""

import pytest
import torch

from tests.conftest import make_model
from tests.contract.test_layer import KEEPS
from tests.numeric import conversation, live_stack, pair
from tests.train.test_train import killed_at, metrics, words
from zephyr_lite.config.load import RunConfig, load_config
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.memory.plan import Plan
from zephyr_lite.model import activation_offload as offload_file
from zephyr_lite.model import weight_streaming as stream_file
from zephyr_lite.model.base import load_base
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.model.weight_streaming import WeightStreamer
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

CPU = torch.device("cpu")


LAYERS = 4


class LateStream:
    """A side stream as slow as it may be: a copy is made when somebody waits for it, or for a later one."""

    def __init__(self, device):
        self.waiting = []

    def copy(self, pairs):
        for target, _ in pairs:
            target.view(-1).view(torch.uint8).fill_(255)
        job = list(pairs)
        self.waiting.append(job)
        return job

    def wait(self, done):
        while any(job is done for job in self.waiting):
            with torch.no_grad():
                for target, source in self.waiting.pop(0):
                    target.copy_(source)

    def finish(self):
        if self.waiting:
            self.wait(self.waiting[-1])


@pytest.fixture(params=["at once", "late"])
def copies(request, monkeypatch):
    if request.param == "late":
        monkeypatch.setattr(offload_file, "SideStream", LateStream)
        monkeypatch.setattr(stream_file, "SideStream", LateStream)


@pytest.fixture(scope="session")
def deep_base(tmp_path_factory):
    from tests.conftest import make_tokenizer

    folder = tmp_path_factory.mktemp("deep")
    make_model(num_hidden_layers=LAYERS, sliding_window=24).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def quantized(folder, **settings):
    return load_base(RunConfig(model_name_or_path=str(folder), **settings)).model


def decoder_over(model, *, stream=False, plan=None, scratch="layer"):
    streamed = WeightStreamer(model, CPU) if stream else None
    decoder = Decoder(live_stack(model), torch.float32, scratch=scratch, stream=streamed)
    if plan is not None:
        decoder.follow(plan)
    return decoder


def plan_of(**changes):
    return Plan(**{"micro_tokens": 1000, "keep": ("input",) * LAYERS, **changes})


def sft_steps(decoder, keep, dropout, steps=2):
    """Everything that comes out of some passes, a held-out one between them."""
    found = []
    for step in range(steps):
        batch = collate_conversations([conversation(step, 33), conversation(7, 12)])
        for p in decoder.stack.parameters().values():
            p.grad = None
        logps, stats = decoder.token_stats(batch, keep=keep, dropout=dropout)
        logps.sum().backward()
        found += [logps.detach(), stats.entropy, *(p.grad for p in decoder.stack.parameters().values())]
        with torch.no_grad():
            found.append(decoder.token_logps(batch))
    return found


def dpo_steps(decoder, keep, dropout, steps=2):
    found = []
    for step in range(steps):
        batch = collate_pairs([pair(step, 9, 12, 5), pair(step + 5, 6, 4, 11)])
        for p in decoder.stack.parameters().values():
            p.grad = None
        policy, reference = decoder.policy_and_reference(batch, keep=keep, dropout=dropout)
        (policy - reference).sum().backward()
        found += [policy.detach(), reference, *(p.grad for p in decoder.stack.parameters().values())]
        found.append(decoder.token_logps(batch, reference=True, dropout=dropout))
    return found


def assert_bits(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("steps", [sft_steps, dpo_steps])
def test_streamed_and_offloaded_equal_resident_to_the_bit(copies, deep_base, steps, keep):
    dropout = Dropout(0.3, seed=1, step=4)
    want = steps(decoder_over(quantized(deep_base)), keep, dropout)
    for offload in (0, 2, LAYERS):
        for stream in (False, True) if offload else (True,):
            plan = plan_of(offload=offload)
            assert_bits(steps(decoder_over(quantized(deep_base), stream=stream, plan=plan), keep, dropout), want)


@pytest.mark.parametrize("scratch", ["layer", "small"])
@pytest.mark.parametrize(
    "storage",
    [{"bnb_4bit_use_double_quant": True}, {"bnb_4bit_use_double_quant": False}, {"load_in_4bit": False}],
    ids=["nested", "plain", "dense"],
)
def test_every_storage_streams(copies, deep_base, storage, scratch):
    want = sft_steps(decoder_over(quantized(deep_base, **storage), scratch=scratch), "input", None)
    plan = plan_of(offload=LAYERS, scratch=scratch)
    got = decoder_over(quantized(deep_base, **storage), stream=True, plan=plan, scratch=scratch)
    assert_bits(sft_steps(got, "input", None), want)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(
    "changes", [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}], ids=["biases", "tied head"]
)
def test_llamas_of_few_layers_stream(copies, layers, changes):
    def model():
        return make_model("llama", num_hidden_layers=layers, **changes)

    want = dpo_steps(decoder_over(model()), "attention", None)
    assert_bits(dpo_steps(decoder_over(model(), stream=True), "attention", None), want)


def test_mixed_policies_and_a_tile_stream_too(copies, deep_base):
    mixed = ("input", "attention", "all", "all")
    plan = plan_of(keep=mixed, offload=3, tile=10)
    want = sft_steps(decoder_over(quantized(deep_base), plan=plan_of(tile=10)), mixed, None)
    assert_bits(sft_steps(decoder_over(quantized(deep_base), stream=True, plan=plan), mixed, None), want)


@pytest.mark.parametrize("interrupted", [False, True])
def test_both_stages_streamed_and_offloaded_end_with_the_same_adapters(
    deep_base, chat_rows, pair_rows, tmp_path, interrupted
):
    """SFT, DPO, evaluation, checkpoints, resume: to the bit what the resident run leaves."""
    host = {"memory.stream": True, "memory.offload": True}
    for name, memory in (("resident", {}), ("streamed", host)):
        settings = {"memory.keep": "attention", "memory.micro_tokens": 90, "lora_dropout": 0.1, **memory}
        for run, rows, more in (
            (run_sft, chat_rows, {}),
            (run_dpo, pair_rows, {"max_prompt_length": 64, "beta": 0.1, "learning_rate": 1e-3}),
        ):
            method = "sft" if run is run_sft else "dpo"
            loaded = load_config(method, None, words(deep_base, tmp_path / name, rows, **settings, **more))
            if interrupted and memory:
                with killed_at(3):
                    run(loaded)
            run(loaded)
            plan = StageDir(tmp_path / name / method).info()["plan"]
            assert (plan["stream"], plan["offload"]) == ((True, LAYERS) if memory else (False, 0))
    for method in ("sft", "dpo"):
        a, b = (metrics(tmp_path / name / method) for name in ("resident", "streamed"))
        assert a == b
        a, b = (metrics(tmp_path / name / method, "eval_loss") for name in ("resident", "streamed"))
        assert a == b
        a, b = (read_adapter(tmp_path / name / method / "adapter") for name in ("resident", "streamed"))
        assert a.sha256 == b.sha256
