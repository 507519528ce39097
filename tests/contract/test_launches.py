"""Kernel launches of one decoder layer on the CUDA path, as exact integers, counted without a card.

Meta tensors that claim to be on a CUDA device go through the layer; Triton's launches are recorded and not run. A call of a
PyTorch operation is one launch, unless it returns a view or only allocates. ``addmm`` into another tensor than the one that
it adds to is two: it copies first.
"""

import math
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from zephyr_lite.data.batch import Segment
from zephyr_lite.memory import speed
from zephyr_lite.model import layer as layer_file
from zephyr_lite.model.dequant_buffer import DequantBuffer
from zephyr_lite.model.execution import ForwardContext, Layer
from zephyr_lite.model.int8 import Int8Buffer
from zephyr_lite.ops import dispatch
from zephyr_lite.ops.dropout import DropoutKey
from zephyr_lite.ops.int8 import OutlierChannels
from zephyr_lite.ops.lora import Int8Site, LinearGroup, LoraPair
from zephyr_lite.ops.rms_norm import Norm
from zephyr_lite.ops.segments import SegmentTable, segment_starts

TOKENS, HIDDEN, INNER, HEADS, KV_HEADS, SIZE = 4096, 4096, 14336, 32, 8, 128
DTYPE = torch.bfloat16
CUDA = torch.device("meta")
SFT = [Segment(0, 100), Segment(100, TOKENS)]
DPO = [Segment(0, 100), Segment(100, 140, (0, 30)), Segment(140, 220), Segment(220, TOKENS, (140, 150))]


class _Launches(TorchDispatchMode):
    """Counts by name what PyTorch and Triton launch."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view", "lift_fresh")):
            self.count[name] += 1
            if name == "addmm" and "out" in kwargs and kwargs["out"] is not args[0]:
                self.count["copy of addmm"] += 1
        return func(*args, **kwargs)


@pytest.fixture
def launches(monkeypatch):
    counter = _Launches()

    def launch(kernel, grid):
        return lambda *args, **options: counter.count.update(
            [kernel.fn.__module__.rsplit(".", 1)[-1] + kernel.fn.__name__]
        )

    monkeypatch.setattr("triton.runtime.jit.KernelInterface.__getitem__", launch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(dispatch, "_interpreted", lambda device: True)
    with torch.no_grad():
        yield counter


def nf4(out, width):
    """A weight in 4 bits with nested scales."""
    blocks = out * width // 64
    nested = bnb.QuantState(torch.empty(blocks // 256, device=CUDA), code=torch.empty(256, device=CUDA), blocksize=256)
    weight = torch.empty(out * width // 2, 1, dtype=torch.uint8, device=CUDA)
    weight.quant_state = bnb.QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, device=CUDA),
        shape=torch.Size((out, width)),
        code=torch.empty(16, device=CUDA),
        blocksize=64,
        quant_type="nf4",
        dtype=DTYPE,
        offset=torch.empty((), device=CUDA),
        state2=nested,
    )
    return weight


KEYS = KV_HEADS * SIZE
# the width of each site's input, and of its outputs
SITES = ((HIDDEN, HEADS * SIZE, KEYS, KEYS), (HEADS * SIZE, HIDDEN), (HIDDEN, INNER, INNER), (INNER, HIDDEN))


def adapter(rank, trained):
    """A and B of each projection, in one buffer, as ``AdapterStack`` lays them out: all A, then all B."""
    shapes = [(rank, width) for width, *outs in SITES for _ in outs]
    shapes += [(out, rank) for _, *outs in SITES for out in outs]
    buffer = torch.empty(sum(map(math.prod, shapes)), device=CUDA)
    parts = [part.view(shape) for part, shape in zip(buffer.split([*map(math.prod, shapes)]), shapes)]
    return zip(*([part.requires_grad_(trained) for part in half] for half in (parts[:7], parts[7:])))


def int8_site(width, outs):
    sizes = (width // 64, torch.int64), (width, torch.int16)
    channels = OutlierChannels(*(torch.empty(size, dtype=dtype, device=CUDA) for size, dtype in sizes))
    return Int8Site(channels, tuple((torch.empty(out, device=CUDA), torch.empty(width, device=CUDA)) for out in outs))


def mistral(rank, frozen_rank=0, dropout=0.0, int8=False):
    """A layer of Mistral-7B, with a trained adapter and a frozen one under it on all seven projections."""
    sites, adapters = [], [(adapter(r, trained), trained) for r, trained in ((frozen_rank, False), (rank, True)) if r]
    token = torch.empty(TOKENS, dtype=torch.int64, device=CUDA)
    key = DropoutKey(dropout, 42, 1, token, token) if dropout else None
    for index, (width, *outs) in enumerate(SITES):
        pairs = []
        for projection in range(len(outs)):
            for matrices, trained in adapters:
                pairs.append(LoraPair(projection, *next(matrices), 1.0, dropout=trained))
        weights = tuple(nf4(out, width) for out in outs)
        fields = weights, (None,) * len(outs), tuple(outs), tuple(pairs), key.at(0, index) if key else None
        sites.append(LinearGroup(*fields, int8=int8_site(width, outs) if int8 else None))
    norms = (Norm(torch.empty(HIDDEN, dtype=DTYPE, device=CUDA), 1e-5),) * 2
    return Layer(tuple(sites), norms, (), (), HEADS, KV_HEADS, SIZE, SIZE**-0.5, "silu")


@pytest.mark.parametrize(
    ("keep", "options", "segments", "forward", "backward"),
    [
        ("all", {"rank": 16}, SFT, 23, 37),
        ("attention", {"rank": 16}, SFT, 23, 51),
        ("input", {"rank": 16}, SFT, 23, 55),
        # a sum over the tokens is four, which a launch adds up: one for each site
        ("all", {"rank": 16, "dropout": 0.05}, SFT, 23, 41),
        ("all", {"rank": 128, "frozen_rank": 16}, DPO, 37, 57),
        ("all", {"rank": 16, "int8": True}, SFT, 23, 43),
        ("attention", {"rank": 16, "int8": True}, SFT, 23, 58),
        ("input", {"rank": 16, "int8": True}, SFT, 23, 62),
        ("all", {"rank": 16, "dropout": 0.05, "int8": True}, SFT, 23, 51),
        ("all", {"rank": 128, "frozen_rank": 16, "int8": True}, DPO, 37, 63),
    ],
)
def test_launches_of_a_layer(launches, keep, options, segments, forward, backward):
    layer, buffer = mistral(**options), Int8Buffer if "int8" in options else DequantBuffer
    cos = torch.empty(TOKENS, SIZE, dtype=DTYPE, device=CUDA)
    context = ForwardContext(SegmentTable.build(segments, 4096, segment_starts(segments).to(CUDA)), cos, cos)
    x = torch.empty(TOKENS, HIDDEN, dtype=DTYPE, device=CUDA)
    # a table of addresses is copied once for each layer
    layer_file._forward(x, layer, context, buffer(), keep)
    launches.count.clear()
    with launches:
        _, acts = layer_file._forward(x, layer, context, buffer(), keep)
        first = launches.count
        launches.count = Counter()
        if keep == "input":
            acts = layer_file._Activations(x)
        scratch = buffer()  # as if other layers came in between
        cast = layer.cast(DTYPE)
        layer_file._recompute(acts, cast, context, scratch)
        layer_file._backward(torch.empty_like(x), acts, cast, context, scratch, owned=False, need_x=True)
        second = launches.count
    assert (first.total(), second.total()) == (forward, backward), f"{first}\n{second}"
    job = SimpleNamespace(
        adapters=["sft", "dpo"][: 1 + ("frozen_rank" in options)], dropout="dropout" in options, int8="int8" in options
    )
    assert speed.launches(job, keep) == (forward, backward), "the cost model counts others"
