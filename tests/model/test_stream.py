"""Weight streaming and activation offload beyond tests/contract/test_streaming.py: memory, failed passes, locked memory."""

import gc
from dataclasses import replace

import pytest
import torch

from tests.conftest import make_model
from tests.contract import test_streaming
from tests.contract.test_counts import kept
from tests.contract.test_streaming import (
    LAYERS,
    assert_bits,
    decoder_over,
    plan_of,
    quantized,
    sft_steps,
)
from tests.numeric import apart, conversation
from zephyr_lite.data.batch import collate_conversations
from zephyr_lite.data.chat_template import Example
from zephyr_lite.model import activation_offload as offload_file
from zephyr_lite.model.activation_offload import ActivationOffload

copies, deep_base = test_streaming.copies, test_streaming.deep_base  # fixtures


def test_what_is_offloaded_is_not_kept_on_the_device(deep_base):
    decoder = decoder_over(quantized(deep_base), plan=plan_of(offload=LAYERS))
    batch = collate_conversations([conversation(0, 40)])
    with kept() as found:
        decoder.token_logps(batch, keep="all")
    # a target's hidden state and slope, the norm's number, and which row it is
    assert found.bytes == len(batch.target_ids) * (2 * 4 * 64 + 4 + 8)


def test_after_a_pass_that_failed_the_next_is_right(copies, deep_base, monkeypatch):
    want = sft_steps(decoder_over(quantized(deep_base)), "all", None)
    plan = plan_of(offload=LAYERS)
    decoder = decoder_over(quantized(deep_base), stream=True, plan=plan)
    logps = decoder.token_logps(collate_conversations([conversation(3, 50)]), keep="all")
    get, calls = ActivationOffload.get, []

    def failing(self, layer, host):
        calls.append(layer)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return get(self, layer, host)

    monkeypatch.setattr(ActivationOffload, "get", failing)
    with pytest.raises(torch.OutOfMemoryError):
        logps.sum().backward()
    monkeypatch.setattr(ActivationOffload, "get", get)
    decoder.follow(plan)
    assert_bits(sft_steps(decoder, "all", None), want)


class Runtime:
    """CUDA's runtime on a system that locks so many bytes."""

    def __init__(self, budget):
        self.budget, self.locked, self.pending = budget, {}, []

    def cudaHostRegister(self, start, count, flags):
        if count + sum(self.locked.values()) > self.budget:
            self.pending.append(2)  # its last error, which the next launch would report
            return 2
        self.locked[start] = count
        return 0

    def cudaHostUnregister(self, start):
        del self.locked[start]

    def cudaGetLastError(self):
        return self.pending.pop() if self.pending else 0


@pytest.fixture
def runtime(monkeypatch):
    """A card that is not there, on a system that locks anything; its budget may be set."""
    runtime = Runtime(2**40)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(offload_file.ctypes, "CDLL", {None: runtime}.__getitem__)
    monkeypatch.setattr(offload_file, "PROBE", 1000)
    yield runtime
    gc.collect()


CUDA = torch.device("cuda")


def test_host_memory_is_locked_and_let_go_with_its_last_view(runtime):
    place = offload_file.host_bytes(1000, CUDA)
    assert runtime.locked == {place.data_ptr(): 1000} and place.data_ptr() % offload_file.PAGE == 0
    view = place[40:80].view(torch.float32)
    del place
    gc.collect()
    assert len(runtime.locked) == 1 and view.fill_(1).sum() == 10
    del view
    gc.collect()
    assert not runtime.locked
    runtime.budget = 0
    assert offload_file.host_bytes(1000, CUDA).numel() == 1000  # pageable
    assert not runtime.locked and not runtime.pending


@pytest.mark.parametrize(("budget", "expected"), [(0, 0), (3500, 2000)])
def test_what_can_be_locked_is_found_out_and_released(runtime, budget, expected):
    runtime.budget = budget
    assert offload_file.lockable(5500, CUDA) == expected
    gc.collect()
    assert not runtime.locked and not runtime.pending


def test_a_row_of_16k_tokens_trains_and_its_window_is_honoured():
    """Streamed, offloaded, the MLP in tiles: the last tokens' figures are those of the last tokens alone."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_model(num_hidden_layers=2, sliding_window=64, max_position_embeddings=2**14, **shape)
    decoder = decoder_over(model, stream=True, plan=plan_of(offload=2, tile=4096))
    count, tail = 2**14, 300
    example = conversation(0, count)
    example.mask[:-100] = False
    batch = collate_conversations([example])
    logps = decoder.token_logps(batch, keep="input")
    logps.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in decoder.stack.parameters().values())
    short = collate_conversations([Example(example.ids[-tail:], example.mask[-tail:], "", 0)])
    short = replace(short, positions=batch.positions[-tail:], streams=batch.streams[-tail:])
    with torch.no_grad():
        assert apart(logps.detach(), decoder.token_logps(short)) < 1e-5
