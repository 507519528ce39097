"""The planner's accounting against what really happens: bytes kept, gradients, optimizer states, and what a layer holds."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import make_model, tiny_config
from tests.test_decoder import conversation, live_stack, pair
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.model import layer as layer_file
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.model.job import AdapterSpec, Job, Shape
from zephyr_lite.model.phases import Run, backward_peak, forward_peak, sites_of
from zephyr_lite.model.plan import Plan


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and something still names."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # what was there before counts nothing
                self._see(tensor.untyped_storage(), 0)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return out

    def _see(self, storage, size):
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key):
        self.now -= self.known.pop(key)


@contextmanager
def peaks_of_layers(monkeypatch):
    """What each layer's passes took at most beyond what was alive when they began: (forward, backward), in order."""
    found = SimpleNamespace(forward=[], backward=[])
    alive = Alive()

    def watched(real, into):
        def run(*args):
            alive.peak = before = alive.now
            result = real(*args)
            into.append(alive.peak - before)
            return result

        return run

    # the interpreter copies arguments to the host by closures that hold each other, and so tensors, until Python tidies up;
    # here they are there already
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (list(args), kwargs))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda self, *args: None)
    for name, into in (("forward", found.forward), ("backward", found.backward)):
        real = getattr(layer_file._Layer, name)
        monkeypatch.setattr(layer_file._Layer, name, staticmethod(watched(real, into)))
    with alive:
        yield found


def tiny_job(dtype, dropout, **changes) -> Job:
    """Of ``live_stack``: a frozen adapter of rank 2 and scale 4, a trained one of rank 4 and scale 1."""
    shape = Shape.of(tiny_config())
    adapters = (
        AdapterSpec.fresh(shape, 2, 8, "all-linear").__class__(
            AdapterSpec.fresh(shape, 2, 8, "all-linear").ranks, 4.0, trained=False
        ),
        AdapterSpec.fresh(shape, 4, 4, "all-linear"),
    )
    settings = {"optim": "adamw_torch", "method": "sft", "longest": 40}
    return Job(shape, dtype, "dense", adapters, dropout=dropout, **settings | changes)


# (dtype, dropout, keep, tile, pairs): every policy with and without dropout and tiles; the interpreter is slow
CASES = [
    (torch.float32, False, "input", None, False),
    (torch.float32, False, "attention", 16, False),
    (torch.float32, True, "all", None, False),
    (torch.float32, True, "input", 7, True),
    (torch.bfloat16, True, "input", 16, False),
    (torch.bfloat16, False, "attention", None, True),
    (torch.bfloat16, True, "attention", 7, False),
    (torch.bfloat16, False, "all", 7, False),
    (torch.bfloat16, True, "all", None, True),
]


@pytest.mark.parametrize(("dtype", "dropout", "keep", "tile", "pairs"), CASES)
def test_what_a_layer_holds_at_most(monkeypatch, dtype, dropout, keep, tile, pairs):
    """To the byte, on the kernels' path (triton's interpreter) with the CPU's attention: forward and backward."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = make_model().to(dtype)
    decoder = Decoder(live_stack(model), dtype)
    decoder.follow(Plan(64, (keep,) * 2, tile=tile))
    batch = collate_pairs([pair(0, 12, 20, 8)]) if pairs else collate_conversations([conversation(0, 40)])
    keys = sum(s.keys for s in batch.segments)
    job = tiny_job(dtype, dropout)
    with peaks_of_layers(monkeypatch) as found:
        logps = decoder.token_logps(batch, keep=keep, dropout=Dropout(0.3, 1, 1) if dropout else None)
        logps.sum().backward()
    run = Run(job.shape, sites_of(job, 0), len(batch), keys, len(batch.segments), dtype.itemsize, tile, "cpu", False)
    kept = sum(run.kept(keep).values())
    forward, backward = (
        [forward_peak(run, keep)] * 2,
        [backward_peak(run, keep, False, x) - kept for x in (True, False)],
    )
    # of a pair the CPU's attention takes one response at a time, with a mask; the account has cards in mind, which do not
    share = 0.07 if pairs else 0.0
    assert found.forward == pytest.approx(forward, rel=share, abs=0)
    assert found.backward == pytest.approx(backward, rel=share, abs=0)
