"""The quantized base in the user's cache, from processes of their own: killed half-way, two at once, how much memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

from bench.merge_memory import rss_anon
from tests.model.test_quantized import assert_same, config, entries, make_base, recipe, reference
from zephyr_lite.model import quantized
from zephyr_lite.model.base import load_base


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zephyr-lite" / "quantized"


CHILD = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from zephyr_lite.config.load import RunConfig
from zephyr_lite.model import quantized_files
from zephyr_lite.model.base import load_base
write = quantized_files._write_shard
def slowly(*words):
    write(*words)
    print("a shard", flush=True)
    time.sleep({pause})
quantized_files._write_shard, quantized_files.SHARD_BYTES = slowly, 40_000
print("ready", flush=True)
load_base(RunConfig(model_name_or_path={base!r}))
print("loaded", flush=True)
"""


def start(base: Path, pause: float) -> subprocess.Popen:
    code = CHILD.format(root=str(Path(__file__).parents[2]), base=str(base), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, word: str) -> None:
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(process.stderr.read())


def test_a_killed_process_leaves_nothing_that_counts_and_two_at_once_agree(tmp_path, cache):
    base = make_base(tmp_path / "base")
    killed, other = start(base, 60), start(make_base(tmp_path / "other", seed=1), 60)
    wait_for(killed, "a shard")
    wait_for(other, "a shard")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = entries(cache)
    assert len(left) == 2 and all(path.name.startswith(".") and list(path.glob("*.safetensors")) for path in left)

    two = [start(base, 0.1) for _ in range(2)]
    told = [process.communicate() for process in two]
    assert [process.returncode for process in two] == [0, 0], told
    assert all("loaded" in out for out, _ in told)
    assert sum("quantizing the base once" in out for out, _ in told) == 1
    found = entries(cache)
    (kept,) = (path for path in found if not path.name.startswith("."))
    assert len(found) == 2  # and what another process is at work on
    other.kill()
    other.communicate()
    assert quantized.fault(kept, recipe(base)) is None
    assert_same(load_base(config(base)).model, reference(base, torch.float32, True))
    load_base(config(base, dtype="bfloat16"))
    assert not [path for path in entries(cache) if path.name.startswith(".")]  # nobody is any more


MEMORY = """
import sys
sys.path.insert(0, {root!r})
import torch
from pathlib import Path
from transformers import AutoConfig, BitsAndBytesConfig
from zephyr_lite.model.quantized import Recipe, quantized_folder
from zephyr_lite.ops.nf4 import quantize_parts
quantize_parts(torch.randn(64, 64), double_quant=True, dtype=torch.float32, device=torch.device("cpu"))
settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
base = Path({base!r})
config = AutoConfig.from_pretrained(base)
print("ready", flush=True)
sys.stdin.readline()
print(quantized_folder(base, config, Recipe("m", "f" * 64, settings, torch.float32), torch.device("cpu"), print))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded(tmp_path, cache):
    """470 MB of weights, cast to float32 and quantized; the largest tensor takes 131 MB as float32."""
    sizes = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    folder = tmp_path / "base"
    sizes |= {"num_key_value_heads": 8, "num_hidden_layers": 10}
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(**sizes)).to(torch.bfloat16)
    model.config.save_pretrained(folder)
    tensors = {name: torch.full(t.shape, 0.5, dtype=t.dtype) for name, t in model.state_dict().items()}
    total = sum(t.nbytes for t in tensors.values())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    del tensors
    code = MEMORY.format(root=str(Path(__file__).parents[2]), base=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, text=True)
    wait_for(process, "ready")
    before = peak = rss_anon(process.pid)
    process.stdin.write("\n")
    process.stdin.flush()
    while process.poll() is None:
        peak = max(peak, rss_anon(process.pid))
        time.sleep(0.003)
    out, err = process.communicate()
    assert process.returncode == 0 and "nf4-double-float32" in out, err
    assert total > 460e6
    assert peak - before < 131e6 + 300e6, f"{(peak - before) / 1e6:.0f} MB"
