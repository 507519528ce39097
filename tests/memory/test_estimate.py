"""Predicted memory against real allocations on a CPU, and against predictions that a line-by-line count made (recorded.json)."""

from __future__ import annotations

import json
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import make_model, tiny_config
from tests.contract.test_counts import int8_decoder, kept
from tests.contract.test_layer import KEEPS
from tests.contract.test_more_families import FAMILIES, tiny
from tests.numeric import conversation, live_stack, loss_and_gradients, pair
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.memory.activations import kept_per_token, layer_bytes
from zephyr_lite.memory.estimate import base_bytes, estimate, slab_bytes
from zephyr_lite.memory.gpus import CPU, Device
from zephyr_lite.memory.workload import AdapterSpec, Workload, make_workload
from zephyr_lite.model import layer as layer_file
from zephyr_lite.model.base import load_base
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.model.execution import ExecutionConfig
from zephyr_lite.model.families import Shape
from zephyr_lite.model.weight_streaming import WeightStreamer
from zephyr_lite.ops.nf4 import stored_tensors

RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())
SHAPES = {
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 128, 32000),
    "qwen2-7b": Shape(3584, 18944, 28, 28, 4, 128, 152064, biases=("q_proj", "k_proj", "v_proj")),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 64, 49152, tied=True),
    "tiny": Shape(64, 128, 2, 4, 2, 16, 448),
}
# of when dropout copied its input on every card
DEVICES = {"flash": Device.of((8, 9)), "efficient": Device.of((7, 5)), "hopper": Device.of((9, 0)), "cpu": CPU}
DEVICES = {name: replace(device, fuses_dropout=False) for name, device in DEVICES.items()}


def recorded_job(shape, ranks, method, storage, optim, dtype, dropout, **changes) -> Workload:
    """``ranks``: "16+128" is a frozen adapter of rank 16 under a trained one of rank 128."""
    adapters = [AdapterSpec.fresh(SHAPES[shape], int(r)) for r in ranks.split("+")]
    adapters = (*(replace(a, trained=False) for a in adapters[:-1]), adapters[-1])
    rows = {"longest": 2048} if method == "sft" else {"longest": 2047, "keys": 4 / 3, "live_reference": True}
    dtype = getattr(torch, dtype)
    return Workload(SHAPES[shape], dtype, storage, adapters, optim, dropout, method, **rows, **changes)


def test_a_layer_takes_what_was_recorded():
    """Forward and backward, within 3 % of the line-by-line count."""
    for shape, ranks, method, dtype, dropout, device, tokens, tile, forward, backward in RECORDED["layers"]:
        job = recorded_job(shape, ranks, method, "nf4 nested", "adamw_8bit", dtype, dropout)
        _, taken, backwards = layer_bytes(job, tokens, tile, DEVICES[device])
        of = [taken[keep] for keep in (None, "input", "attention", "all")]
        of += [backwards[keep, owned] for owned in (False, True) for keep in ("input", "attention", "all")]
        assert of == pytest.approx([*forward, *backward], rel=0.03), (shape, ranks, method, dtype, device, tokens, tile)


def test_a_run_takes_what_was_recorded():
    """The transient bytes within 3 %, the rest exactly."""
    for (
        *job,
        device,
        tokens,
        keep,
        away,
        stream,
        tile,
        scratch,
        together,
        batches,
        peak,
        resident,
        host,
        managed,
        _,
    ) in RECORDED["breakdowns"]:
        job = recorded_job(*job, step_most=tokens if batches == 1 else None)
        layers, (first, last) = job.shape.layers, (keep.split("/") * 2)[:2]
        keeps = (first,) * (layers // 2) + (last,) * (layers - layers // 2)
        reference = "together" if together else "own"
        execution = ExecutionConfig(tokens, keeps, int(away * layers), stream, tile, scratch, reference)
        found = estimate(job, execution, DEVICES[device])
        assert (sum(found.resident.values()), sum(found.host.values()), found.managed) == (resident, host, managed)
        assert sum(found.transient.values()) == pytest.approx(peak - resident, rel=0.03), (job, execution)


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
def kernels_that_compute_nothing(monkeypatch):
    """The kernels' path, whose tensors are allocated and hold anything: triton's interpreter would take minutes."""
    from triton.runtime import interpreter

    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(interpreter.GridExecutor, "__call__", lambda self, *args, **kwargs: None)
        yield


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

    for name, into in (("forward", found.forward), ("backward", found.backward)):
        real = getattr(layer_file._Layer, name)
        monkeypatch.setattr(layer_file._Layer, name, staticmethod(watched(real, into)))
    with kernels_that_compute_nothing(monkeypatch), alive:
        yield found


def model_of(family, layers):
    """With no window that cuts: the CPU's attention takes a mask for one."""
    if family == "mistral":
        return make_model(num_hidden_layers=layers)
    changes = {"sliding_window": 1024, "num_hidden_layers": layers}
    if family == "smollm3":
        changes["no_rope_layers"] = [0, 1, 1, 1][:layers]
    if family == "gemma3_text":
        changes["layer_types"] = (["sliding_attention", "full_attention"] * 2)[:layers]
    return tiny(family, **changes)


def tiny_job(dtype, dropout, shape=None, **changes) -> Workload:
    """Of ``live_stack``: a frozen adapter of rank 2, a trained one of rank 4."""
    shape = shape or Shape.of(tiny_config())
    adapters = (AdapterSpec.fresh(shape, 2, trained=False), AdapterSpec.fresh(shape, 4))
    settings = {"storage": "dense", "optim": "adamw_torch", "method": "sft", "longest": 40}
    return Workload(shape, dtype, adapters=adapters, dropout=dropout, **settings | changes)


@pytest.mark.parametrize(
    ("dtype", "dropout", "keep", "tile"),
    [
        (torch.bfloat16, False, "all", None),
        (torch.bfloat16, True, "input", None),
        (torch.float32, False, "attention", 64),
        (torch.bfloat16, True, "attention", 64),
    ],
)
def test_what_a_layer_holds_in_int8(monkeypatch, tiny_base, dtype, dropout, keep, tile):
    """Forward and backward, on the kernels' path with the CPU's attention."""
    decoder, batch = int8_decoder(tiny_base, dtype), collate_conversations([conversation(0, 512)])
    loss_and_gradients(decoder, batch)  # its buffer is there from now on
    decoder.follow(ExecutionConfig(1024, (keep,) * 2, tile=tile))
    with peaks_of_layers(monkeypatch) as found:
        logps = decoder.token_logps(batch, keep=keep, dropout=Dropout(0.3, 1, 1) if dropout else None)
        logps.sum().backward()
    device = replace(CPU, fuses_dropout=dtype == torch.bfloat16)
    kept_by, forward, backward_by = layer_bytes(tiny_job(dtype, dropout, int8=True), len(batch), tile, device)
    share = 0.03
    assert found.forward == pytest.approx([forward[keep]] * 2, rel=share)
    first, second = found.backward
    backward = backward_by[keep, False] - kept_by[keep]
    assert first == pytest.approx(backward, rel=share)
    assert second <= backward * (1 + share)  # nothing wants the gradient of the embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_what_other_families_take(monkeypatch, family):
    """The base, and what a layer of each policy keeps, to the byte; its peaks, on the kernels' path with the CPU's attention."""
    model, dtype = model_of(family, 3).bfloat16(), torch.bfloat16
    job = tiny_job(dtype, False, Shape.of(model.config))
    assert sum(base_bytes(job).values()) == sum(p.nbytes for p in model.parameters())
    decoder, batch = Decoder(live_stack(model), dtype), collate_conversations([conversation(0, 256)])
    with kept() as found:
        decoder.token_logps(batch, keep=KEEPS)
    head = len(batch.target_ids) * (2 * 64 * 2 + 12)  # rows and slopes, their scale, the rows' numbers
    assert found.bytes - head == kept_per_token(job, KEEPS) * len(batch)
    assert sorted(p.numel() for p in decoder.stack.parameters().values()) == sorted(job.trained_tensors)
    with peaks_of_layers(monkeypatch) as found:
        decoder.token_logps(batch, keep=KEEPS).sum().backward()
    kept_by, forward, backward = layer_bytes(job, len(batch), None, CPU)
    assert found.forward == pytest.approx([forward[keep] for keep in KEEPS], rel=0.03)
    assert found.backward[::-1] == pytest.approx([backward[keep, False] - kept_by[keep] for keep in KEEPS], rel=0.03)


@pytest.mark.parametrize("nested", [True, False])
def test_the_base_as_bitsandbytes_stores_it(tiny_base, nested):
    config = RunConfig(model_name_or_path=str(tiny_base), bnb_4bit_use_double_quant=nested)
    base = load_base(config)
    layer = base.model.model.layers[1]
    stored = [
        t for name, m in layer.named_modules() if name.endswith("_proj") for t in stored_tensors(m.weight).values()
    ]
    job = make_workload(config, "sft", base.model.config, base.dtype, longest=64)
    counted = base_bytes(job)
    assert counted["decoder layers"] == 2 * sum(t.nbytes for t in stored)
    model = base.model
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert counted["norms"] == sum(p.nbytes for p in norms)
    assert counted["embedding"] == model.model.embed_tokens.weight.nbytes
    assert counted["output head"] == model.lm_head.weight.nbytes
    assert base_bytes(job, stream=True)["two layers' buffers"] == 2 * slab_bytes(job)
    assert [slab.numel() for slab in WeightStreamer(model, torch.device("cpu")).slabs] == [slab_bytes(job)] * 2


@pytest.mark.parametrize(
    ("family", "method", "keeps", "offload", "tile"),
    [
        ("mistral", "sft", ("all",) * 4, 0, None),
        ("mistral", "sft", ("input", "input", "all", "all"), 0, None),
        ("mistral", "sft", ("all",) * 4, 4, 16),
        ("mistral", "sft", ("input",) * 4, 2, None),
        ("mistral", "dpo", ("attention",) * 4, 0, None),
        ("mistral", "kto", ("all",) * 4, 0, None),
        ("mistral", "kto", ("input",) * 4, 0, None),
        *((family, "sft", ("input", "attention", "all", "all"), 2, 16) for family in FAMILIES),
        *((family, "dpo", ("input", "attention", "all", "all"), 0, None) for family in FAMILIES),
    ],
)
def test_the_peak_of_a_whole_micro_batch(monkeypatch, family, method, keeps, offload, tile):
    """The second micro-batch of a step, from the embedding to the last gradient: 2 % beside what is not counted on a CPU
    (ids that were there before) or is otherwise there (the head's plain softmax, a pair's masks)."""
    dtype = torch.bfloat16
    model = model_of(family, 4).to(dtype)
    decoder = Decoder(live_stack(model), dtype)
    decoder.follow(ExecutionConfig(64, keeps, offload=offload, tile=tile))
    pairs = {"dpo": [pair(0, 8, 10, 6)], "kto": [pair(0, 6, 10, 0), pair(1, 9, 0, 7)]}
    batch = collate_conversations([conversation(0, 32)]) if method == "sft" else collate_pairs(pairs[method])
    shape = Shape.of(model.config)
    adapters = (AdapterSpec.fresh(shape, 2, trained=False), AdapterSpec.fresh(shape, 4))
    share = len(batch.target_ids) / len(batch)
    job = Workload(
        shape,
        dtype,
        "dense",
        adapters,
        "adamw_torch",
        False,
        "sft" if method == "sft" else "dpo",
        len(batch),
        targets=share,
        keys=sum(s.keys for s in batch.segments) / len(batch),
        live_reference=method != "sft",
    )
    alive = Alive()

    def step():
        if method != "sft":
            policy, reference = decoder.policy_and_reference(batch, keep=keeps)
            (policy - reference).sum().backward()
        else:
            decoder.token_logps(batch, keep=keeps).sum().backward()

    with alive:
        step()  # as the twins have it, which takes no time: gradients and buffers are there from now on
        with kernels_that_compute_nothing(monkeypatch):
            alive.peak = alive.now
            step()
    counted = estimate(job, ExecutionConfig(len(batch), keeps, offload, tile=tile), CPU)
    ids = 3 * 8 * len(batch) + 16 * len(batch.target_ids)
    buffers = {} if decoder.offload is None else decoder.offload._buffers
    host = sum(buffer.numel() for buffer in buffers.values())  # here it is the same memory
    assert alive.peak - host - 4 * job.parameters == pytest.approx(
        sum(counted.transient.values()) - ids, rel=0.06 if method == "dpo" else 0.03
    )
