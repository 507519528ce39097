"""``bench.evidence``: a tiny run of every stage on a CPU, and what becomes of stages that fail, hang or are interrupted."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import evidence, stages

ROOT = Path(__file__).parents[2]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")


class Forked:
    """A stage's process that is forked from this one, which has imported everything: most of a tiny stage is imports."""

    def __init__(self, words, log, environment):
        sys.stdout.flush()
        if pid := os.fork():
            self.pid, self.code = pid, None
            return
        code = 1
        try:
            os.setsid()
            os.chdir(ROOT)
            os.environ.update(environment)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False, buffering=1) for n in (1, 2))
            sys.argv = words
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code)
            code = int(end.code) if end.code is None or isinstance(end.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait(self, seconds):
        until = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                raise subprocess.TimeoutExpired("forked", seconds)
            else:
                time.sleep(0.02)
        return self.code


@NO_CUDA
def test_the_whole_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    for name in ("contest", "memory_parts", "cases"):
        importlib.import_module(f"bench.{name}")
    importlib.import_module("zephyr_lite.engines.trl")
    monkeypatch.setattr(evidence, "start", Forked)
    code = evidence.main(["--out", str(tmp_path), "--tiny", "--minutes", "30"])
    found = json.loads((tmp_path / "evidence.json").read_text())
    red = {n: s.get("last_lines") for n, s in found["stages"].items() if s["status"] != "ok"}
    assert not red and code == 0
    assert list(found["stages"]) == [stage.name for stage in evidence.STAGES]
    told = {stage.name: json.loads((tmp_path / f"{stage.name}.json").read_text()) for stage in evidence.STAGES}
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["imports"]["trl"].startswith("in ")
    assert told["base"]["base"]["built_now"] and not told["gpu"]["base"]["built_now"]
    assert told["tests"]["passed"] >= 1 and told["tests"]["failed"] == 0
    assert told["ops"]["operations"] and told["memory"]["cases"]["sft at 24 GB"]["measured"]
    assert [m["method"] for m in told["gpu"]["matches"]] == ["sft", "dpo"]
    assert "unsloth" in told["cap12"]["matches"][0]["not_run"]
    assert "cap12     ok" in capsys.readouterr().out


# -- stages that fail, hang, or are cut short --------------------------------------------------------------------------

STUB = """
import os, subprocess, sys, time, signal
words, out = sys.argv[1:], sys.argv[sys.argv.index("--out") + 1]
open(out, "w").write('{"told": 1}')
if words[0] == "fails":
    sys.exit("no such thing")
if words[0] == "hangs":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(out + ".child", "w").write(str(child.pid))
    open(out + ".ready", "w").close()
    time.sleep(600)
"""


def stub(words, log, environment):
    command = [sys.executable, "-c", STUB, *words]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def table_of(*modules):
    return tuple(evidence.Stage(module, 1, module) for module in modules)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def stubs(monkeypatch):
    monkeypatch.setattr(evidence, "start", stub)
    monkeypatch.setattr(evidence, "GRACE", 0.2)
    monkeypatch.setattr(evidence, "LEAST", 0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_stage_that_fails_or_hangs_stops_no_other(stubs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evidence, "STAGES", table_of("fails", "hangs", "works"))
    assert evidence.main(["--out", str(tmp_path), "--minutes", "0.15"]) == 1
    found = json.loads((tmp_path / "evidence.json").read_text())["stages"]
    assert {n: s["status"] for n, s in found.items()} == {"fails": "failed", "hangs": "timed out", "works": "ok"}
    assert found["fails"]["exit_code"] == 1 and found["fails"]["last_lines"] == ["no such thing"]
    assert not runs(int((tmp_path / "hangs.json.child").read_text()))
    assert json.loads((tmp_path / "works.json").read_text()) == {"told": 1}
    # what the first did not use is the others'
    assert found["hangs"]["limit"] > found["fails"]["limit"]
    printed = capsys.readouterr().out
    assert "timed out" in printed and "no such thing" in printed


def test_what_was_red_is_run_again_alone(stubs, monkeypatch, tmp_path):
    stages = table_of("works", "fails")
    monkeypatch.setattr(evidence, "STAGES", stages)
    assert evidence.main(["--out", str(tmp_path), "--minutes", "1"]) == 1
    first = json.loads((tmp_path / "evidence.json").read_text())["stages"]
    monkeypatch.setattr(evidence, "STAGES", (stages[0], evidence.Stage("fails", 1, "works")))
    assert evidence.main(["--out", str(tmp_path), "--minutes", "1", "--only", "fails"]) == 0
    again = json.loads((tmp_path / "evidence.json").read_text())["stages"]
    assert again["works"] == first["works"] and again["fails"]["status"] == "ok"
    with pytest.raises(SystemExit):
        evidence.main(["--out", str(tmp_path), "--only", "nothing"])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_its_stage_and_tells(tmp_path, number):
    code = (
        f"import subprocess, sys\nfrom bench import evidence\nSTUB = {STUB!r}\n{inspect.getsource(stub)}\n"
        "evidence.start, evidence.GRACE = stub, 0.2\n"
        "evidence.STAGES = tuple(evidence.Stage(name, 1, name) for name in ('works', 'hangs', 'fails'))\n"
        "sys.exit(evidence.main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "--out", str(tmp_path), "--minutes", "60"]
    # as in a shell's background, where SIGINT is ignored
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    while not (tmp_path / "hangs.json.ready").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 1
    found = json.loads((tmp_path / "evidence.json").read_text())["stages"]
    assert {n: s["status"] for n, s in found.items()} == {"works": "ok", "hangs": "interrupted", "fails": "skipped"}
    assert not runs(int((tmp_path / "hangs.json.child").read_text()))


def test_the_commands_are_ones_that_the_benches_take(tmp_path):
    from bench import gpu, memory

    parsers = {"bench.gpu": gpu.arguments, "bench.memory": memory.arguments}
    args = evidence.argparse.Namespace(tiny=False, out=tmp_path, base=None)
    for stage in evidence.STAGES:
        module, *words = evidence.words_of(stage, args, 100)
        if module in parsers:
            parsers[module](words)


@NO_CUDA
def test_the_selection_reaches_every_topic(tmp_path):
    """Names of GPU tests may change: what is to be run must still be found. (Collecting needs no card.)"""
    words = ["pytest", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu", "-k", stages.selection(stages.TESTS)]
    with (tmp_path / "log").open("wb") as log:
        assert Forked([*words, "tests/test_gpu.py", "tests/memory/test_gpu_memory.py"], log, {}).wait(600) == 0
    found = (tmp_path / "log").read_text()
    topics = (
        "attention_kernel decoder_on step_0 nf4 keep_policies streamed_and_offloaded redone a_twentieth under_a_cap"
    )
    assert [topic for topic in topics.split() if topic not in found] == []
    assert found.count("::test_") < 90


# -- FlashAttention's interface over PyTorch's kernels -----------------------------------------------------------------


def reference(q, k, v, cu_q, cu_k, left, right, scale):
    """Softmax attention of every sequence, causal from the bottom right."""
    found = []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k)):
        shared = q.shape[1] // k.shape[1]
        scores = scale * torch.einsum("ihd,jhd->hij", q[a:b], k[c:d].repeat_interleave(shared, 1))
        ahead = torch.arange(d - c)[None] - torch.arange(b - a)[:, None] - (d - c - b + a)
        hidden = (ahead > right if right >= 0 else ahead > d) | (-ahead > left if left >= 0 else ahead > d)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        found.append(torch.einsum("hij,jhd->ihd", weights, v[c:d].repeat_interleave(shared, 1)))
    return torch.cat(found)


@pytest.fixture
def kernels(monkeypatch):
    """PyTorch's two operators, with their schemas, as a reference computes them."""
    calls = []

    def forward(
        q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left, window_size_right
    ):
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max())) and not debug and dropout == 0
        assert causal == (window_size_left < 0 and window_size_right == 0)
        calls.append((window_size_left, window_size_right))
        out = reference(q, k, v, cu_q.tolist(), cu_k.tolist(), window_size_left, window_size_right, scale)
        return out, torch.zeros(1), torch.zeros(2), torch.zeros(0), torch.zeros(0)

    def backward(grad, q, k, v, out, lse, cu_q, cu_k, *rest, scale, window_size_left, window_size_right):
        max_q, max_k, dropout, causal, state, unused = rest
        assert (max_q, max_k, dropout) == (int(cu_q.diff().max()), int(cu_k.diff().max()), 0.0)
        assert isinstance(causal, bool) and len(state) == 2 and len(unused) == 0
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            again = reference(*leaves, cu_q.tolist(), cu_k.tolist(), window_size_left, window_size_right, scale)
        return torch.autograd.grad(again, leaves, grad)

    from bench import flash_attn_shim

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    return flash_attn_shim, calls


@pytest.mark.parametrize(
    ("causal", "window", "used"),
    [(True, (-1, -1), (-1, 0)), (True, (2, 2), (2, 0)), (False, (-1, -1), (-1, -1)), (False, (1, 2), (1, 2))],
)
def test_packed_sequences_through_pytorchs_kernel(kernels, causal, window, used):
    shim, calls = kernels
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, h, 8, dtype=torch.double, requires_grad=True) for h in (4, 2, 2))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    out = shim.flash_attn_varlen_func(q, k, v, cu, cu, 5, torch.tensor(5), causal=causal, window_size=window)
    want = reference(q, k, v, [0, 4, 9], [0, 4, 9], *used, 8**-0.5)
    assert torch.allclose(out, want) and calls == [used]
    grad = torch.randn_like(out)
    for got, wanted in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad)):
        assert torch.allclose(got, wanted)


def test_a_batch_through_the_same_kernel(kernels):
    shim, _ = kernels
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, h, 8, dtype=torch.double) for h in (4, 2, 2))
    out = shim.flash_attn_func(q, k, v, causal=True, softmax_scale=0.3)
    for row in range(2):
        assert torch.allclose(out[row], reference(q[row], k[row], v[row], [0, 5], [0, 5], -1, 0, 0.3))
    with pytest.raises(NotImplementedError, match="dropout_p"):
        shim.flash_attn_func(q, k, v, dropout_p=0.1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    rows, places, cu, longest, _ = shim.unpad_input(q, mask)
    assert (
        cu.tolist() == [0, 3, 8]
        and longest == 5
        and torch.equal(shim.pad_input(rows, places, 2, 5), q * mask[..., None, None])
    )


def test_transformers_takes_it_for_flash_attention(tmp_path):
    """In a process of its own: what is installed is looked up once."""
    code = (
        "import sys\nfrom bench.process import install_flash_attn\ninstall_flash_attn(sys.argv[1])\n"
        "assert 'torch' not in sys.modules\nimport transformers.utils.import_utils as utils\n"
        "utils.is_torch_cuda_available = lambda: True\nassert utils.is_flash_attn_2_available()\n"
        "from transformers.modeling_flash_attention_utils import _lazy_imports, _lazy_define_process_function\n"
        "found = _lazy_imports('flash_attention_2')\nprint(*[f.__module__ for f in found])\n"
        "kept = _lazy_define_process_function(found[1])\n"
        "print(sorted(kept(query_length=9, key_length=9, is_causal=True, sliding_window=4, max_seqlen_q=9, max_seqlen_k=9)))\n"
        "from flash_attn.flash_attn_interface import flash_attn_gpu\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    modules, keywords = told.stdout.strip().splitlines()
    assert modules.split() == ["bench.flash_attn_shim"] * 5
    assert "window_size" in keywords and "max_seqlen_q" in keywords
