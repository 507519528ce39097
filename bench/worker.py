"""An engine's process: it loads, and then does one optimizer step when told to."""

from __future__ import annotations

import sys
import time
import traceback
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import is_flash_attn_2_available

from bench.turns import CONTEXT_BYTES, Variant
from zephyr_lite.config.load import Loaded, RunConfig
from zephyr_lite.errors import UserError
from zephyr_lite.io.logging import messages_to
from zephyr_lite.train.callbacks import Callbacks
from zephyr_lite.train.dpo import DpoObjective
from zephyr_lite.train.loop import TrainState, train
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import SftObjective
from zephyr_lite.train.stage import Stage
from zephyr_lite.train.steps import rows_of_step


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
    task: Any = SftObjective(stage) if stage.method == "sft" else DpoObjective(stage)
    state = TrainState(stage, task, observers=[Callbacks([turns])])
    turns.optimizer = state.optimizer
    return partial(train, state)


def baseline(stage: Stage, turns: Turns, variant: Variant) -> Any:
    from zephyr_lite.engines import trl as baselines

    half = stage.base.dtype in (torch.bfloat16, torch.float16)
    # which needs CUDA
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
