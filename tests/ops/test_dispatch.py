"""Which of an operation's implementations runs: the start-up checks, and that every kernel compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")

from tests.contract.test_kernels import DEVICE, DTYPES
from tests.train.test_train import words
from zephyr_lite.config.load import load_config
from zephyr_lite.ops import dispatch, rope
from zephyr_lite.ops.dispatch import Widths, check_kernels, runs_triton
from zephyr_lite.train import setup

pytestmark = pytest.mark.usefixtures("kernels")
# with a small vocabulary
GEMMA = Widths(2560, 10240, 2048, 12, 256, 448, "gelu_pytorch_tanh", norm_offset=True, head_norms=True)
OPS = {"nf4", "int8", "int8_weights", "rms_norm", "rope", "swiglu", "dropout", "dropout_products", "token_logps"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "widths",
    [Widths(1, 1, 1, 1, 2, 1, int8=True), Widths(1024, 2048, 1024, 3, 64, 33000, rotary=48), GEMMA],
)
def test_the_checks_pass_and_cover_every_operation(widths, dtype):
    assert set(dispatch.OPERATIONS) == OPS
    assert check_kernels(DEVICE, dtype, widths) == []
    assert all(runs_triton(op, torch.empty(1, device=DEVICE, dtype=dtype)) for op in OPS)


class _WritesNothing:
    """A kernel that leaves its results as they were."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        ("nf4", "_dequantize"),
        ("int8_weights", "_requantize"),
        ("int8", "_quantize"),
        ("int8", "_mm"),
        ("rms_norm", "_forward"),
        ("rms_norm", "_backward"),
        ("rope", "_rotate"),
        ("swiglu", "_forward"),
        ("swiglu", "_backward"),
        ("dropout", "_drop"),
        ("dropout_products", "_product"),
        ("dropout_products", "_input"),
        ("dropout_products", "_matrix"),
        ("token_logps", "_softmax"),
    ],
)
def test_a_kernel_that_fails_its_check_is_replaced(op, kernel, monkeypatch):
    module = import_module(f"zephyr_lite.ops.{op}")
    dtype, other, widths = torch.float16, torch.float32, Widths(64, 64, int8=True)
    monkeypatch.setattr(module, kernel, _WritesNothing())
    (note,) = check_kernels(DEVICE, dtype, widths)
    assert f"kernel {op} is not used in {dtype}" in note and "plain PyTorch" in note
    x = torch.empty(1, device=DEVICE, dtype=dtype)
    assert [o for o in OPS if not runs_triton(o, x)] == [op]
    assert runs_triton(op, x.to(other))  # another dtype has its own check


def test_a_second_check_says_it_again(monkeypatch):
    monkeypatch.setattr(dispatch, "OPERATIONS", ("rope",))
    with monkeypatch.context() as broken:
        broken.setattr(rope, "_rotate", _WritesNothing())
        first, second = (check_kernels(DEVICE, torch.float32) for _ in range(2))
    assert len(first) == 1 and first == second
    assert check_kernels(DEVICE, torch.float32) == [] and runs_triton("rope", torch.empty(1, device=DEVICE))


def test_a_processor_and_float64_run_the_twins(monkeypatch):
    assert check_kernels(DEVICE, torch.float64) == []
    assert not runs_triton("rope", torch.empty(1, dtype=torch.float64, device=DEVICE))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(rope, "_rotate", None)
    assert not runs_triton("rope", torch.empty(1))
    assert check_kernels(torch.device("cpu"), torch.float32) == []
    ones = torch.ones(2, 8)
    assert torch.equal(rope.rope_(torch.ones(2, 1, 8), ones, 0 * ones), torch.ones(2, 1, 8))


COMPILE = """
import os, re, subprocess, sys
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from zephyr_lite.ops import dispatch, rope
dispatch.truncates = lambda *args: False  # the interpreter's widening of bfloat16
from zephyr_lite.model.families import Shape
from zephyr_lite.memory.expected import MISTRAL_SHAPE
from zephyr_lite.ops import dropout, dropout_products, int8, int8_weights, nf4, rms_norm, rope, swiglu, token_logps

class Card:
    def get_current_target(self): return GPUTarget("cuda", capability, 32)
    def get_current_device(self): return capability
    def get_current_stream(self, device): return 0

# every launch of the checks becomes a compilation, for the very arguments and options of the launch; on cards of which
# another one is compiled for fully, the first launch of each kernel
FULLY = (75, 90)
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program may take
INT8 = {80: "IMMA", 90: "IGMMA", 120: "IMMA"}  # the products' instruction (86 and 89 get the code of 80)
names, once = set(), set()
cubin = os.path.join(os.environ["TRITON_CACHE_DIR"], "cubin")
def check(kernel):
    with open(cubin, "wb") as file: file.write(kernel.asm["cubin"])
    assert kernel.metadata.shared <= SHARED[capability] * 1024, (capability, kernel.name, kernel.metadata.shared)
    usage = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", cubin], text=True)
    # registers that are spilled are on the stack; the softmax of an evaluation, with a row in registers, spills some
    assert "STACK:0 " in usage or kernel.name == "_softmax", (capability, usage)
    if kernel.name == "_mm":
        code = subprocess.check_output([knobs.nvidia.nvdisasm.path, "-c", cubin], text=True)
        assert re.search(rf"\\b{INT8[capability]}\\.", code), capability
def launch(kernel, grid):
    def run(*args, **options):
        names.add(kernel.__name__)
        if capability in FULLY or (capability, id(kernel)) not in once:
            once.add((capability, id(kernel)))
            check(kernel.warmup(*args, grid=grid, **options))
    return run
JITFunction.__getitem__ = launch
os.environ["TRITON_INTERPRET"] = "1"  # only now: the kernels above are the compiler's
driver.set_active(Card())
int8._major = lambda device: capability // 10
mistral = Shape.of(MISTRAL_SHAPE).widths
cpu = torch.device("cpu")
gemma = dispatch.Widths(2560, 10240, 2048, 12, 256, 262144, "gelu_pytorch_tanh", True, True)
for capability in SHARED:
    dtype = torch.float16 if capability < 80 else torch.bfloat16
    for op in (dropout, nf4, rms_norm, rope, swiglu, token_logps, *[dropout_products] * (capability >= 80)):
        op.sample(dispatch.Draw(cpu, dtype), mistral)
    once.clear()
    for op in (rms_norm, rope, swiglu):
        op.sample(dispatch.Draw(cpu, dtype), gemma)
FULLY = ()
for capability in INT8:
    for op in (int8, int8_weights):
        op.sample(dispatch.Draw(cpu, torch.bfloat16), dispatch.Widths(64, 4096, int8=True))
print(*sorted(names))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card compiles them in every other test")
def test_the_kernels_compile_for_cards_that_are_not_there(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first = ["_backward", "_dequantize", "_drop", "_forward", "_input", "_matrix", "_mm", "_product", "_quantize"]
    assert done.stdout.split() == [*first, "_requantize", "_rotate", "_softmax"]


def test_a_stage_checks_the_kernels_at_its_models_widths(tiny_base, chat_rows, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(setup, "check_kernels", lambda device, dtype, widths: given.append(widths) or [])
    loaded = load_config("sft", None, words(tiny_base, tmp_path / "run", chat_rows))
    shape = setup.setup_stage("sft", loaded).stack.base.config
    rotated = shape.num_attention_heads + shape.num_key_value_heads
    queries = shape.num_attention_heads * shape.head_dim
    assert given == [
        Widths(
            shape.hidden_size,
            shape.intermediate_size,
            queries,
            rotated,
            shape.head_dim,
            shape.vocab_size,
            rotary=shape.head_dim,
        )
    ]
