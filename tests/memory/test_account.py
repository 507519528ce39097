"""The planner's accounting against what really happens: bytes kept, gradients, optimizer states, and what a layer holds."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import make_model, tiny_config
from tests.contract.test_counts import kept
from tests.contract.test_layer import KEEPS
from tests.numeric import conversation, live_stack, pair
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.memory.account import (
    CPU,
    Device,
    Setting,
    account,
    base_bytes,
    kept_per_token,
    optimizer_bytes,
    scratch_bytes,
    slab_bytes,
)
from zephyr_lite.memory.ledger import Run, sites_of
from zephyr_lite.memory.phases import backward_peak, forward_peak
from zephyr_lite.memory.plan import Plan
from zephyr_lite.memory.workload import PROJECTIONS, AdapterSpec, Shape, Workload, make_workload
from zephyr_lite.model import layer as layer_file
from zephyr_lite.model.base import load_base
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.model.weight_streaming import WeightStreamer
from zephyr_lite.ops.nf4 import stored_tensors
from zephyr_lite.train.optim import make_optimizer


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
def interpreter_in_place(monkeypatch):
    """The interpreter copies arguments to the host by closures that hold each other, and so the tensors, until Python
    tidies up; here they are there already."""
    from triton.runtime import interpreter

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (list(args), kwargs))
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda self, *args: None)
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
    with interpreter_in_place(monkeypatch), alive:
        yield found


def tiny_job(dtype, dropout, **changes) -> Workload:
    """Of ``live_stack``: a frozen adapter of rank 2 and scale 4, a trained one of rank 4 and scale 1."""
    shape = Shape.of(tiny_config())
    adapters = (
        AdapterSpec.fresh(shape, 2, 8, "all-linear").frozen(),
        AdapterSpec.fresh(shape, 4, 4, "all-linear"),
    )
    settings = {"optim": "adamw_torch", "method": "sft", "longest": 40}
    return Workload(shape, dtype, "dense", adapters, dropout=dropout, **settings | changes)


# (dtype, dropout, keep, tile, pairs): every policy with and without dropout and tiles; the interpreter is slow
CASES = [
    (torch.float32, False, "input", None, False),
    (torch.float32, False, "attention", 8, False),
    (torch.float32, True, "all", None, False),
    (torch.float32, True, "input", 5, True),
    (torch.bfloat16, True, "input", 8, False),
    (torch.bfloat16, False, "attention", None, True),
    (torch.bfloat16, True, "attention", 5, False),
    (torch.bfloat16, False, "all", 5, False),
    (torch.bfloat16, True, "all", None, True),
]


@pytest.mark.parametrize(("dtype", "dropout", "keep", "tile", "pairs"), CASES)
def test_what_a_layer_holds_at_most(monkeypatch, dtype, dropout, keep, tile, pairs):
    """To the byte, on the kernels' path (triton's interpreter) with the CPU's attention: forward and backward."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = make_model().to(dtype)
    decoder = Decoder(live_stack(model), dtype)
    decoder.follow(Plan(64, (keep,) * 2, tile=tile))
    batch = collate_pairs([pair(0, 5, 5, 3)]) if pairs else collate_conversations([conversation(0, 11)])
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


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("keeps", [*((k, k) for k in KEEPS), ("input", "all")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_activations_and_gradients(dtype, keeps, dropout):
    """What autograd keeps of the layers, and the gradients that a step leaves, to the byte; twins or kernels alike."""
    decoder = Decoder(live_stack(make_model().to(dtype)), dtype)
    batch = collate_conversations([conversation(0, 40), conversation(1, 24)])
    with kept() as found:
        logps = decoder.token_logps(batch, keep=keeps, dropout=Dropout(0.3, 1, 1) if dropout else None)
    job = tiny_job(dtype, dropout)
    size, targets = dtype.itemsize, len(batch.target_ids)
    head = targets * (64 * size + 4 + 64 * size + 8)  # rows with their scale, slopes, and the rows' numbers
    assert found.bytes - head == kept_per_token(job, keeps) * len(batch)
    logps.sum().backward()
    gradients = [p.grad for p in decoder.stack.parameters().values()]
    assert sum(g.nbytes for g in gradients) == 4 * job.parameters
    assert sorted(g.numel() for g in gradients) == sorted(job.trained_tensors)
    counted = account(job, Setting(len(batch), keeps), CPU)
    assert counted.passing["gradients"] == 4 * job.parameters
    assert counted.resident["adapters"] == sum(
        p.nbytes for name, p in decoder.stack.model.named_parameters() if "lora_" in name
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("r", [4, 96])
def test_optimizer_states(optim, r):
    """Of tensors on either side of what bitsandbytes keeps in 32 bits, after a step on the CPU (where nothing is paged)."""
    stack = live_stack(make_model(), r=r)
    parameters = stack.parameters()
    optimizer = make_optimizer(RunConfig(optim=optim), parameters)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, Tensor)
    }
    spec = AdapterSpec.fresh(Shape.of(tiny_config()), r, r, "all-linear")
    sizes = spec.tensors(Shape.of(tiny_config()))
    assert sorted(sizes) == sorted(p.numel() for p in parameters.values())
    found, managed = optimizer_bytes(optim, sizes, cuda=False)
    assert (found, managed) == (sum(tensors.values()), 0)


def test_paged_states_are_managed():
    """Each moment of a tensor from 100,000 numbers on; the scales stay on the device."""
    tensors = [99_999, 100_000]
    assert optimizer_bytes("paged_adamw_32bit", tensors) == (8 * 99_999, 8 * 100_000)
    codes, scales = 2 * 4 * 256, 8 * (391 + 391)
    assert optimizer_bytes("paged_adamw_8bit", tensors) == (2 * 99_999 + codes + scales, 2 * 100_000)


@pytest.mark.parametrize("nested", [True, False])
def test_the_base_as_bitsandbytes_stores_it(tiny_base, nested):
    config = RunConfig(model_name_or_path=str(tiny_base), bnb_4bit_use_double_quant=nested)
    base = load_base(config, say=lambda line: None)
    layer = base.model.model.layers[1]
    stored = [
        t for name, m in layer.named_modules() if name.endswith("_proj") for t in stored_tensors(m.weight).values()
    ]
    job = make_workload(config, "sft", base.model.config, base.dtype)
    counted = base_bytes(job)
    assert counted["decoder layers"] == 2 * sum(t.nbytes for t in stored)
    model = base.model
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert counted["norms"] == sum(p.nbytes for p in norms)
    assert counted["embedding"] == model.model.embed_tokens.weight.nbytes
    assert counted["output head"] == model.lm_head.weight.nbytes
    assert base_bytes(job, stream=True)["two layers' buffers"] == 2 * slab_bytes(job)
    assert [slab.numel() for slab in WeightStreamer(model, torch.device("cpu")).slabs] == [slab_bytes(job)] * 2


def test_a_tied_head_counts_once_and_biases_count():
    config = tiny_config("llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    job = make_workload(RunConfig(load_in_4bit=False), "sft", config, torch.float32)
    model = make_model("llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    assert sum(base_bytes(job).values()) == sum(p.nbytes for p in model.parameters())
    assert scratch_bytes(job, "layer") == 0


def test_what_lies_on_the_host():
    """Offloaded activations less two layers', a streamed base with its embedding and head."""
    job = tiny_job(torch.bfloat16, False).at(storage="nf4 nested")
    flash = Device.of((8, 9))
    here = account(job, Setting(64, ("all",) * 2), flash)
    away = account(job, Setting(64, ("all",) * 2, offload=2, stream=True), flash)
    assert here.host == {} and away.host["kept activations"] == 64 * kept_per_token(job, ("all",) * 2)
    assert away.host["streamed base"] == 2 * slab_bytes(job) + 448 * 64 * 2  # with the output head
    assert away.host["embedding"] == 448 * 64 * 2
    assert "decoder layers" not in away.resident and "embedding" not in away.resident


def test_a_resident_layer_costs_what_it_keeps_and_an_offloaded_one_nothing():
    """Ten more layers: of each what it keeps, or only its weights, norms and adapters."""

    def peak(layers, offload):
        shape = Shape.of(tiny_config(num_hidden_layers=layers))
        job = tiny_job(torch.bfloat16, False).at(shape=shape, adapters=(AdapterSpec.fresh(shape, 4, 4, "all-linear"),))
        found = account(job, Setting(512, ("all",) * layers, offload=layers if offload else 0), CPU)
        weights = sum(base_bytes(job).values()) + sum(optimizer_bytes("adamw_torch", job.trained_tensors))
        return found.peak - weights - 8 * job.parameters

    a_layer = (
        512
        * kept_per_token(
            tiny_job(torch.bfloat16, False).at(
                adapters=(AdapterSpec.fresh(Shape.of(tiny_config()), 4, 4, "all-linear"),)
            ),
            ("all",) * 2,
        )
        // 2
    )
    assert peak(14, False) - peak(4, False) == 10 * a_layer
    assert peak(14, True) == peak(4, True)


def test_the_references_turn_in_the_last_layer_counts():
    """Of a pair the peak is there: the reference's pass beside what the policy's has just left."""
    shape = Shape(4096, 14336, 8, 32, 8, 128, 32000)
    adapter = AdapterSpec.fresh(shape, 16, 16, "all-linear")
    job = Workload(shape, torch.bfloat16, "nf4", (adapter,), "adamw_8bit", False, "dpo", 2047, live_reference=True)
    flash, setting = Device.of((8, 9)), Setting(4096, ("all",) * 8)
    found = account(job, setting, flash)
    assert found.at == "reference's pass of layer 8"
    run = Run(shape, sites_of(job, 7), 4096, 4096, 2, 2, None, "flash")
    x = 4096 * 4096 * 2
    of_layers = found.passing["kept activations"] + found.passing["a layer at work"] + 2 * x
    assert of_layers == 4096 * kept_per_token(job, setting.keep) + 2 * x + forward_peak(run, None)
    assert found.passing["reference's hidden states"] == x
    assert found.peak > account(job, replace(setting, together=False), flash).peak


def test_the_account_has_every_projection():
    assert set(PROJECTIONS) == set(Shape.of(tiny_config()).matrices)
    assert sum(Shape.of(tiny_config()).matrices[name][0] for name in PROJECTIONS[:3]) == 64 + 2 * 32


@pytest.mark.parametrize(
    ("method", "keeps", "offload", "tile"),
    [
        ("sft", ("all",) * 4, 0, None),
        ("sft", ("input", "input", "all", "all"), 0, None),
        ("sft", ("all",) * 4, 4, 16),
        ("sft", ("input",) * 4, 2, None),
        ("dpo", ("attention",) * 4, 0, None),
    ],
)
def test_the_peak_of_a_whole_micro_batch(monkeypatch, method, keeps, offload, tile):
    """The second micro-batch of a step, from the embedding to the last gradient: 2 % beside what is not counted on a CPU
    (ids that were there before) or is otherwise there (the head's plain softmax, a pair's masks)."""
    dtype = torch.bfloat16
    decoder = Decoder(live_stack(make_model(num_hidden_layers=4).to(dtype)), dtype)
    decoder.follow(Plan(64, keeps, offload=offload, tile=tile))
    batch = collate_pairs([pair(0, 8, 10, 6)]) if method == "dpo" else collate_conversations([conversation(0, 20)])
    shape = Shape.of(tiny_config(num_hidden_layers=4))
    adapters = (AdapterSpec.fresh(shape, 2, 8, "all-linear").frozen(), AdapterSpec.fresh(shape, 4, 4, "all-linear"))
    share = len(batch.target_ids) / len(batch)
    job = Workload(
        shape,
        dtype,
        "dense",
        adapters,
        "adamw_torch",
        False,
        method,
        len(batch),
        targets=share,
        keys=sum(s.keys for s in batch.segments) / len(batch),
        live_reference=method == "dpo",
    )
    alive = Alive()

    def step():
        if method == "dpo":
            policy, reference = decoder.policy_and_reference(batch, keep=keeps)
            (policy - reference).sum().backward()
        else:
            decoder.token_logps(batch, keep=keeps).sum().backward()

    with alive:
        step()  # as the twins have it, which takes no time: gradients and buffers are there from now on
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with interpreter_in_place(monkeypatch):
            alive.peak = alive.now
            step()
    counted = account(job, Setting(len(batch), keeps, offload, tile=tile), CPU)
    ids = 3 * 8 * len(batch) + 16 * len(batch.target_ids)
    host = 0 if decoder.offload is None else decoder.offload.nbytes  # here it is the same memory
    assert alive.peak - host == pytest.approx(
        sum(counted.passing.values()) - ids, rel=0.02 if method == "sft" else 0.05
    )
