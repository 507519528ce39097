"""Weight streaming and activation offload beyond tests/contract/test_streaming.py: memory, failed passes, locked memory."""

import gc

import pytest
import torch

from tests.contract import test_streaming
from tests.contract.test_counts import kept
from tests.contract.test_streaming import (
    CPU,
    LAYERS,
    assert_bits,
    decoder_over,
    plan_of,
    quantized,
    sft_steps,
)
from tests.numeric import conversation
from zephyr_lite.data.batch import collate_conversations
from zephyr_lite.model import activation_offload as offload_file
from zephyr_lite.model.activation_offload import ActivationOffload
from zephyr_lite.model.weight_streaming import WeightStreamer
from zephyr_lite.ops.nf4 import stored_tensors

copies, deep_base = test_streaming.copies, test_streaming.deep_base  # fixtures


def test_a_streamed_layer_is_once_on_the_host_and_nowhere_else(deep_base):
    model = quantized(deep_base)
    stream = WeightStreamer(model, CPU)
    assert stream.buffers == []  # a card that was full has room once all has moved
    stream.on_device(model.model.layers[0].mlp.up_proj.weight)
    assert [b.numel() for b in stream.buffers] == [max(s.numel() for s in stream.slabs)] * 2
    for slab, layer in zip(stream.slabs, model.model.layers):
        for name, module in layer.named_modules():
            if name.endswith("_proj"):
                for tensor in stored_tensors(module.weight).values():
                    assert slab.data_ptr() <= tensor.data_ptr() < slab.data_ptr() + slab.numel()


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


@pytest.mark.parametrize(("budget", "expected"), [(0, 0), (999, 0), (3500, 2000), (10**6, 5500)])
def test_what_can_be_locked_is_found_out_and_released(runtime, budget, expected):
    runtime.budget = budget
    assert offload_file.lockable(5500, CUDA) == expected
    gc.collect()
    assert not runtime.locked and not runtime.pending
