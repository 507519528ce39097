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
import time
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import is_flash_attn_2_available

from bench.process import begin
from zephyr_lite.config.load import Loaded, Method, RunConfig
from zephyr_lite.errors import UserError
from zephyr_lite.io.logging import messages_to
from zephyr_lite.model.allocator import set_allocator
from zephyr_lite.train.callbacks import Callbacks
from zephyr_lite.train.loop import TrainState, train
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.stage import Stage
from zephyr_lite.train.steps import rows_of_step

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
    def kind(self) -> tuple[int, ...]:
        """What settings that differ by the size of their micro-batches have in common."""
        return self.recompute, self.padded, self.liger, self.skip_layers

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


class Stop(Exception):
    """The parent has seen enough."""


class Turns(TrainerCallback):
    """Every engine's steps, one at a time, when the parent says so."""

    def __init__(self, pipe: Connection, stage: Stage) -> None:
        self.pipe, self.stage = pipe, stage
        self.optimizer: Any = None  # of the fused engine
        self.begun = self.cpu_begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.pipe.recv() == "stop":
            raise Stop
        self._wait()
        self.begun, self.cpu_begun = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait()
        seconds, cpu = time.perf_counter() - self.begun, time.process_time() - self.cpu_begun
        data = self.stage.data
        rows = rows_of_step(self.stage.config, len(data.rows), state.global_step - 1)
        examples = [i for row in rows for i in data.rows[row]]
        told = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "pairs": len(rows),
            "tokens": int(sum(data.lengths[i] for i in examples)),
            "plan": self.stage.plan.as_dict(),
            "managed_bytes": managed_bytes(self.optimizer),
        }
        self.pipe.send(told | memory())

    def _wait(self) -> None:
        if self.stage.base.device.type == "cuda":
            torch.cuda.synchronize(self.stage.base.device)


def memory() -> dict[str, int]:
    """In bytes, now and at most: on a GPU what PyTorch's allocator handed out and what it took from the card, else the
    process's resident set."""
    if torch.cuda.is_available():
        return {
            "peak_bytes": torch.cuda.max_memory_reserved(),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "now_bytes": torch.cuda.memory_allocated(),
        }
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return {"peak_bytes": found["VmHWM"], "now_bytes": found["VmRSS"]}


def managed_bytes(optimizer: Any) -> int:
    """Of a paged optimizer's state, which CUDA moves between card and host by itself; no part of the allocator's."""
    values = [] if optimizer is None else [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if getattr(value, "is_paged", False))


def imitate_card(gib: float) -> None:
    """From now on this process sees a card of so many GiB: its allocator stops CONTEXT_BYTES below, and what asks how much
    is free is told so (the fused engine's planner does)."""
    if not torch.cuda.is_available():
        return
    limit = int(gib * 2**30) - CONTEXT_BYTES
    real = torch.cuda.mem_get_info

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        free, total = real(device)
        return max(0, min(free, limit - torch.cuda.memory_reserved(device))), min(total, int(gib * 2**30))

    _, total = real()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    torch.cuda.mem_get_info = torch.cuda.memory.mem_get_info = mem_get_info


def worker(pipe: Connection, variant: Variant, values: dict[str, Any], cap: float | None) -> None:
    """Load, tell the parent, and step when told.

    Args:
        cap: GiB of the card to imitate, or None.
    """
    try:
        if cap is not None:
            imitate_card(cap)
        config = RunConfig.model_validate(values)
        said: list[str] = []
        with messages_to(lambda record: said.append(record.getMessage())):
            stage = setup_stage(variant.method, Loaded(config, set(values), [], None))
        turns = Turns(pipe, stage)
        run = fused(stage, turns) if variant.engine == "fused" else baseline(stage, turns, variant)
        replaced = [line for line in said if line.startswith("The Triton kernel")]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # what loading took is no part of a step
        pipe.send(
            {
                "ready": True,
                "threads": torch.get_num_threads(),
                "plan": stage.plan.as_dict(),
                "kernels_replaced": replaced,
                "attention": attention(stage, variant.engine),
                **memory(),
            }
        )
        try:
            run()
        except Stop:
            pipe.send({"stopped": True})
    except BaseException as error:
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "cublas_status_alloc_failed" in text:
            pipe.send({"kind": "memory", "error": str(error)})
        elif isinstance(error, UserError):
            pipe.send({"kind": "refused", "error": str(error)})
        else:
            pipe.send({"kind": "error", "error": "\n" + traceback.format_exc()})


def attention(stage: Stage, engine: str) -> str:
    """Which attention a baseline runs, and whether the FlashAttention package is the real one."""
    if engine == "fused":
        return engine
    package = f"flash_attn {metadata.version('flash_attn')}" if find_spec("flash_attn") else "no flash_attn"
    return f"{stage.base.model.config._attn_implementation}, {package}"


def fused(stage: Stage, turns: Turns) -> Any:
    from zephyr_lite.train.dpo import DpoObjective
    from zephyr_lite.train.sft import SftObjective

    task: Any = SftObjective(stage) if stage.method == "sft" else DpoObjective(stage)
    state = TrainState(stage, task, observers=[Callbacks([turns])])
    turns.optimizer = state.optimizer
    return partial(train, state)


def baseline(stage: Stage, turns: Turns, variant: Variant) -> Any:
    from zephyr_lite.engines import trl as baselines

    half = stage.base.device.type == "cuda" and stage.base.dtype in (torch.bfloat16, torch.float16)
    if (
        variant.engine == "trl"
        and half
        and is_flash_attn_2_available()
        and torch.cuda.get_device_capability() >= (8, 0)
    ):
        stage.base.model.set_attn_implementation("flash_attention_2")
    if variant.skip_layers:
        from unsloth import FastLanguageModel

        made = partial(FastLanguageModel.get_peft_model, checkpoint_skip_layers=variant.skip_layers)
        FastLanguageModel.get_peft_model = staticmethod(made)
    stage.info["trl"] = {
        "arguments": {
            "per_device_train_batch_size": variant.per_device,
            "gradient_accumulation_steps": stage.config.batch_size // variant.per_device,
            "gradient_checkpointing": variant.recompute,
            **({"use_liger_kernel": True} if variant.liger else {}),
        }
    }
    trainer, _ = baselines.make_trainer(stage)
    if variant.engine == "unsloth" and "unsloth" not in sys.modules:
        raise UserError("engine unsloth: its trainer was made without importing unsloth, so it is another's.")
    if variant.padded:
        trainer.data_collator = baselines.Rows([stage.data], trainer.data_collator.pad_token_id, packed=False)
    trainer.add_callback(turns)
    return trainer.train


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
    from transformers import AutoConfig, AutoModelForCausalLM

    from zephyr_lite.model.adapters import AdapterStack
    from zephyr_lite.model.peft_io import LoraWeights, write_adapter

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
