"""What counts as out of memory, and which plan comes after one that did not fit."""

import numpy as np
import pytest
import torch

from zephyr_lite.errors import UserError
from zephyr_lite.memory.plan import Plan
from zephyr_lite.train.oom import Running, changes, is_out_of_memory, smaller
from zephyr_lite.train.steps import micro_batches


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value) and is_out_of_memory(torch.OutOfMemoryError("x"))
    for text in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "Triton Error [CUDA]: out of memory",
    ):
        assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(ValueError(text))
    for text in ("CUDA error: an illegal memory access was encountered", "main memory could not be locked"):
        assert not is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError(NO_HANDLE))  # there is no card
    assert not is_out_of_memory(UserError("CUDA out of memory")) and not is_out_of_memory(MemoryError())


NO_HANDLE = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(("free", "expected"), [(100 * 2**20, True), (2**32, False)])
def test_cublas_without_a_handle_is_out_of_memory_on_a_nearly_full_card(free, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**34))
    assert is_out_of_memory(RuntimeError(NO_HANDLE)) is expected


class Rows:
    def __init__(self, *lengths):
        self.lengths = np.array(lengths)


def ladder(plan, lengths, *, training=True, together=False, quantized=False, host=False):
    """Every plan until none is left, if whatever runs always fails: the largest group of each plan."""
    data, plans = Rows(*lengths), []
    while plan is not None:
        group = max(micro_batches(list(range(len(lengths))), data.lengths, plan.micro_tokens), key=len)
        running = Running(data, group, training, together)
        new = smaller(plan, running, quantized=quantized, may_offload=host, may_stream=host)
        if new is not None:
            plans.append(changes(plan, new))
            assert new != plan and plans[-1] and len(plans) < 40
        plan = new
    return plans, running


def test_the_order_of_smaller_plans():
    start = Plan(16384, ("all", "input", "all"), threads=1)
    everything = {"together": True, "quantized": True, "host": True}
    found, running = ladder(start, [6000], **everything)
    assert found == [
        "the MLP takes 2,048 tokens at a time",
        "the reference has a pass of its own",
        "weights are dequantized into the small scratch",
        "a layer keeps its input and the attention's output at most",
        "a layer keeps its input at most",
        "the MLP takes 512 tokens at a time",
        "what layers keep lies in main memory between the passes",
        "the base lies in main memory and comes to the card one layer ahead",
    ]
    assert ladder(start, [6000], training=False, **everything)[0] == [*found[:3], found[5], found[7]]
    assert ladder(start, [300])[0] == found[3:5]  # neither scratch, nor reference, nor host, nor enough tokens to tile
    several, running = ladder(start, [3000, 100, 1200, 3000, 1000], **everything)
    assert several[:2] == ["4,150 tokens at once instead of 16,384", "3,000 tokens at once instead of 4,150"]
    assert several[2:10] == found and len(running.examples) == 1
    assert all("tokens at once" in line for line in several[10:]) and len(several) > 10


def test_a_failed_group_is_always_split():
    """Half of what failed, not of what was allowed: the rows at hand may be far fewer than the plan's tokens."""
    for lengths in ([5, 5], [1, 1, 1], [7, 3, 3], [100, 1]):
        data = Rows(*lengths)
        running = Running(data, range(len(lengths)), True, False)
        plan = smaller(Plan(16384, ("input",)), running, quantized=False, may_offload=False, may_stream=False)
        assert len(micro_batches(list(range(len(lengths))), data.lengths, plan.micro_tokens)) > 1
