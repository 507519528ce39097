"""Engines side by side: every variant a process of its own, which loads, and then does one optimizer step when told to.

While one steps the others sleep; a round is one step of each, on the same rows, in an order that turns around. A machine
that slows down for a while slows all of them, and a quotient of two times of the same round cancels it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.process import begin
from zephyr_lite.config.load import Method
from zephyr_lite.errors import UserError
from zephyr_lite.model.adapters import AdapterStack
from zephyr_lite.model.allocator import set_allocator
from zephyr_lite.model.peft_io import LoraWeights, write_adapter

# Of a card's memory, what the CUDA context and loaded kernels take: PyTorch's allocator does not count it.
CONTEXT_BYTES = 700 * 2**20


@dataclass(frozen=True)
class Variant:
    """One way to run the steps.

    Attributes:
        method: sft or dpo.
        engine: fused, trl or unsloth.
        recompute: a baseline's gradient checkpointing; the fused engine's plan decides by itself.
        cached: the reference is computed before the first step.
        per_device: rows in one of a baseline's micro-batches.
        padded: TRL gets a packed row's conversations as a padded batch.
        liger: TRL with Liger's kernels.
        skip_layers: of a recomputing Unsloth, layers that keep their activations (``checkpoint_skip_layers``).
        micro_tokens: tokens that the fused engine runs at once; None: as its plan says.
    """

    method: Method
    engine: str
    recompute: bool = False
    cached: bool = False
    per_device: int = 1
    padded: bool = False
    liger: bool = False
    skip_layers: int = 0
    micro_tokens: int | None = None

    @property
    def side(self) -> str:
        """Whose settings compete for one place in the results; Unsloth's default is a side of its own."""
        words = [self.engine]
        if self.method == "dpo":
            words.append("cached" if self.cached else "live")
        if self.micro_tokens is not None:
            words.append(f"{self.micro_tokens} tokens at once")
        if self.engine == "unsloth" and self.recompute and not self.skip_layers:
            words.append("default")
        return " ".join(words)

    @property
    def name(self) -> str:
        if self.engine == "fused":
            return self.side
        words = [self.side.removesuffix(" default")]
        words += [f"{self.per_device} at once"] if self.per_device > 1 else []
        words += ["padded"] if self.padded else []
        words += ["liger"] if self.liger else []
        words += ["recompute"] if self.recompute else []
        words += [f"skip {self.skip_layers}"] if self.skip_layers else []
        return " ".join(words)


class Failed(UserError):
    """A variant could not be run; ``kind``: ``memory`` (it does not fit), ``refused`` (the engine says why), ``late``,
    ``died`` or ``error``."""

    def __init__(self, variant: Variant, kind: str, text: str) -> None:
        super().__init__(f"{variant.name}: {text}")
        self.kind, self.text = kind, text


class Runner:
    """A variant's process, or a thread of this one (a test of a bench, where memory means nothing). It starts at once;
    ``load`` waits until it is ready. All methods but ``kill`` raise ``Failed``.

    Args:
        values: the configuration; paths in it must be absolute where it is a process.
        cap: GiB of the card that the process sees; None: all.
    """

    def __init__(self, variant: Variant, values: dict[str, Any], *, threads: bool, cap: float | None = None) -> None:
        self.variant = variant
        self.steps: list[dict[str, Any]] = []
        self.ready: dict[str, Any] = {}
        self.pipe, far = multiprocessing.Pipe()
        self.process: Any = None
        values = {**values, "engine": variant.engine, "precompute_ref_log_probs": variant.cached}
        folder = None if threads else values["output_dir"]
        arguments = (far, variant.engine, folder, pickle.dumps((variant, values, cap)))
        if threads:
            threading.Thread(target=begin, args=arguments, daemon=True).start()
        else:
            self.process = multiprocessing.get_context("spawn").Process(target=begin, args=arguments, daemon=True)
            self.process.start()
            far.close()  # the only other end is the worker's: its death is an EOFError here

    def load(self, timeout: float | None = None) -> None:
        self.ready = self._receive(timeout)

    def step(self, timeout: float | None = None) -> dict[str, Any]:
        """One optimizer step; what ``Turns`` tells of it."""
        self._send("go")
        found = self._receive(timeout)
        took = f"{found['seconds']:.2f} s ({found['cpu_seconds']:.2f} s of CPU)"
        words = f"{self.variant.method} {self.variant.name}: {took}, {found['tokens']:,} tokens"
        print(words, file=sys.stderr, flush=True)
        return found

    def stop(self) -> None:
        self._send("stop")
        self._receive(60)
        self.kill()

    def kill(self) -> None:
        """End the process and give its memory back; a thread ends by itself."""
        if self.process is not None:
            self.process.kill()
            self.process.join()

    def _send(self, word: str) -> None:
        try:
            self.pipe.send(word)
        except OSError:
            raise Failed(self.variant, "died", "its process died (out of memory?).") from None

    def _receive(self, timeout: float | None) -> dict[str, Any]:
        try:
            if not self.pipe.poll(timeout):
                self.kill()
                raise Failed(self.variant, "late", f"no answer within {timeout:.0f} s.")
            found = self.pipe.recv()
        except (EOFError, OSError):
            raise Failed(self.variant, "died", "its process died (out of memory?).") from None
        if "error" in found:
            self.kill()
            raise Failed(self.variant, found["kind"], found["error"])
        return found


def describe(runner: Runner, unit: str) -> dict[str, Any]:
    """What a runner's measured steps were, for JSON; ``unit`` is tokens or pairs."""
    allocated = [s["peak_allocated_bytes"] for s in runner.steps if "peak_allocated_bytes" in s]
    return {
        **asdict(runner.variant),
        f"{unit}_per_second": median(s[unit] / s["seconds"] for s in runner.steps),
        "seconds": [s["seconds"] for s in runner.steps],
        "cpu_seconds": [s["cpu_seconds"] for s in runner.steps],
        "pairs": [s["pairs"] for s in runner.steps],
        "tokens": [s["tokens"] for s in runner.steps],
        "loaded_bytes": runner.ready.get("now_bytes"),
        "peak_bytes": max((s.get("peak_bytes", 0) for s in runner.steps), default=0),
        **({"peak_allocated_bytes": max(allocated)} if allocated else {}),
        "threads": runner.ready["threads"],
        "plan": runner.ready["plan"] if runner.variant.engine == "fused" else None,
        "kernels_replaced": runner.ready["kernels_replaced"],
        "attention": runner.ready.get("attention"),
    }


def times_faster(ours: Runner, theirs: Runner) -> float:
    """The median over rounds of their time over ours."""
    return median(b["seconds"] / a["seconds"] for a, b in zip(ours.steps, theirs.steps))


def set_environment() -> None:
    """For the engines' processes, before they start: no downloads, no telemetry, and the allocator as the commands set it."""
    for name, value in (
        ("HF_HUB_OFFLINE", "1"),
        ("UNSLOTH_DISABLE_STATISTICS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    set_allocator()


def common_values(base: str | Path, *, rank: int, steps: int) -> dict[str, Any]:
    """The configuration that the benches share."""
    return {
        "model_name_or_path": str(base),
        "load_in_4bit": True,
        "lora_r": rank,
        "lora_alpha": rank,
        "chat_template": "auto",
        "eval_dataset": None,
        "eval_steps": None,
        "save_steps": None,
        "max_steps": steps + 1,  # the last step would write what a run leaves behind
        "learning_rate": 1e-4,
    }


def frozen_adapter(values: dict[str, Any], folder: Path) -> Path:
    """An SFT adapter for DPO to stand on: of the same rank, with a small B. What it has learned costs no time."""
    config = AutoConfig.from_pretrained(values["model_name_or_path"])
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):  # the model's shapes are all that is needed
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    r = values["lora_r"]
    stack = AdapterStack(model)
    stack.add_trainable("sft", r=r, alpha=r, targets="all-linear", seed=0)
    for module, layer in stack.lora_layers():
        a = torch.randn(r, layer.in_features, generator=generator) / layer.in_features**0.5
        b = torch.randn(layer.out_features, r, generator=generator) * 1e-3
        weights[module] = LoraWeights(a, b, 1.0)
    write_adapter(folder / "sft-adapter", weights, base_model_name=str(values["model_name_or_path"]))
    return folder / "sft-adapter"
