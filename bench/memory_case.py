"""One case of ``bench.memory``: a stage is opened as a user's is, on a card that is imitated, and runs a few steps.

Each runs in a process of its own, so that one that runs out of memory does not spoil the next, and so that peaks are
its own. What a case tells is plain numbers, or why there are none.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bench.turns import Stop, imitate_card
from zephyr_lite.config.load import Loaded, Method, RunConfig
from zephyr_lite.errors import UserError
from zephyr_lite.io.logging import messages_to
from zephyr_lite.memory.plan import Plan

# Of a card's memory, what the CUDA context and loaded kernels take, which PyTorch's allocator does not count
CONTEXT_BYTES = 3 * 2**28


@dataclass(frozen=True)
class Case:
    """What to run.

    Attributes:
        name: by which results are found.
        run: what does it: a function of a module, of the case and the time at which its process was started.
        method: sft or dpo.
        values: the stage's configuration.
        card: GiB of the card imitated; None: all there is.
        options: of ``run``.
    """

    name: str
    run: Callable[[Case, float], dict[str, Any]]
    method: Method
    values: dict[str, Any]
    card: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


# -- processes ---------------------------------------------------------------------------------------------------------


def play(case: Case, seconds: float, *, here: bool = False) -> dict[str, Any]:
    """Run a case and return what it tells; ``error`` and ``kind`` (memory, refused, late, died or error) where it fails.

    Args:
        seconds: after so many it is ended.
        here: in this process (a test of the bench, where memory means nothing).
    """
    begun = time.time()
    if here:
        return _tell(case, begun)
    near, far = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_child, args=(far, pickle.dumps((case, begun))), daemon=True
    )
    process.start()
    far.close()  # the only other end is the child's: its death is an EOFError here
    try:
        if not near.poll(max(1.0, seconds)):
            process.kill()
            return {"kind": "late", "error": f"not done within {seconds:.0f} s"}
        return near.recv()
    except (EOFError, OSError):
        process.join(5)
        return {"kind": "died", "error": f"its process died with exit code {process.exitcode} (main memory full?)"}
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _child(pipe: Connection, packed: bytes) -> None:
    case, begun = pickle.loads(packed)
    pipe.send(_tell(case, begun))


def _tell(case: Case, begun: float) -> dict[str, Any]:
    from zephyr_lite.train.oom import is_out_of_memory

    try:
        if case.card is not None:
            imitate_card(case.card, CONTEXT_BYTES)
        return case.run(case, begun)
    except UserError as error:
        return {"kind": "refused", "error": str(error)}
    except Exception as error:
        if is_out_of_memory(error):
            return {"kind": "memory", "error": str(error).splitlines()[0]}
        return {"kind": "error", "error": traceback.format_exc()}


# -- peaks -------------------------------------------------------------------------------------------------------------


def reset_peak() -> None:
    """From now on peaks are new ones. (Linux resets a process's peak when 5 is written to clear_refs: proc(5).)"""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # the peak since the start, then
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> dict[str, int | None]:
    """Bytes at most since ``reset_peak``: on a GPU what the allocator reserved and what it handed out of that; on a CPU
    the process's resident set, which is all that a CPU can say."""
    if torch.cuda.is_available():
        return {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
    return {"reserved": _status("VmHWM"), "allocated": None}


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None  # not Linux
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)


def managed_bytes(optimizer: Any) -> int:
    """Of a paged optimizer's state, which CUDA moves between card and host by itself; no part of the allocator's."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if getattr(value, "is_paged", False))


# -- a stage -----------------------------------------------------------------------------------------------------------


class Until(TrainerCallback):
    """Ends a run after so many steps, with the seconds that each took."""

    def __init__(self, steps: int) -> None:
        self.steps, self.begun = steps, 0.0
        self.seconds: list[float] = []
        self.done_at = 0.0

    def on_step_begin(self, *words: Any, **settings: Any) -> None:
        wait()
        self.begun = time.perf_counter()

    def on_step_end(self, *words: Any, **settings: Any) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self.begun)
        self.done_at = time.time()
        if len(self.seconds) == self.steps:
            raise Stop


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def opened(case: Case, said: list[str], *callbacks: TrainerCallback) -> tuple[Any, Any]:
    """A stage and the state of its run."""
    from zephyr_lite.train.dpo import DpoObjective
    from zephyr_lite.train.loop import TrainState
    from zephyr_lite.train.setup import setup_stage
    from zephyr_lite.train.sft import SftObjective

    config = RunConfig.model_validate(case.values)
    with messages_to(lambda record: said.append(record.getMessage())):
        stage = setup_stage(case.method, Loaded(config, set(case.values), [], None))
    task = (SftObjective if case.method == "sft" else DpoObjective)(stage)
    with messages_to(lambda record: said.append(record.getMessage())):
        return stage, TrainState(stage, task, callbacks=callbacks)


def predicted(plan: Plan) -> dict[str, Any]:
    """What the plan counts, in bytes, less the CUDA context, which no allocator sees.

    The allocator's slack is a part of what is reserved, not of what is handed out.
    """
    parts = {name: size for name, size in plan.account.items() if name not in ("peak", "CUDA context")}
    reserved = sum(parts.values())
    return {
        "reserved": reserved,
        "allocated": reserved - parts.get("allocator's slack", 0),
        "managed": plan.managed,
        "host": sum(plan.host.values()),
        "at": plan.at,
        "parts": parts,
    }


def measure_peak(case: Case, begun: float) -> dict[str, Any]:
    """A few steps; the largest micro-batch comes first (``loop.warmup_largest_batch``).

    Options:
        steps: how many.
    """
    said: list[str] = []
    until = Until(case.options["steps"])
    from zephyr_lite.train.loop import train

    stage, state = opened(case, said, until)
    plan = stage.plan
    loaded = torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")
    found = {"plan": plan.as_dict(), "predicted": predicted(plan), "loaded": loaded}
    reset_peak()
    with suppress(Stop):  # which ``Until`` raises
        train(state)
    measured = {**peak(), "managed": managed_bytes(state.optimizer), "resident_set": _status("VmHWM")}
    return {
        **found,
        "measured": measured,
        "seconds": until.seconds,
        "adapted": stage.plan != plan,
        "plan_at_the_end": stage.plan.as_dict(),
        "said": said,
    }


def measure_start(case: Case, begun: float) -> dict[str, Any]:
    """Seconds from the start of the process to the end of the first step, and where they went. What the operating system
    kept of the base's files is dropped first, where it lets us."""
    dropped = drop_from_cache(Path(case.values["model_name_or_path"]))
    imported = time.time()
    until = Until(1)
    from zephyr_lite.train.loop import train

    _, state = opened(case, [], until)
    wait()
    ready = time.time()
    with suppress(Stop):  # which ``Until`` raises
        train(state)
    return {
        "seconds": until.done_at - begun,
        "imports": imported - begun,
        "opening": ready - imported,
        "first_step": until.done_at - ready,
        "files_dropped_from_cache": dropped,
        "base_bytes": sum(p.stat().st_size for p in Path(case.values["model_name_or_path"]).glob("*.safetensors")),
    }


def drop_from_cache(folder: Path) -> bool:
    """Tell the system to forget pages of files, so that they are read from the disk again."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def measure_speed(case: Case, begun: float) -> dict[str, Any]:
    """Tokens/s of a step's forward and backward passes with so many tokens at once.

    Options:
        tokens: numbers of tokens, each tried.
        rounds: timed steps of each; the fastest counts.
    """
    from zephyr_lite.train.loop import accumulate_gradients

    stage, state = opened(case, [])
    found: dict[str, Any] = {"plan": stage.plan.as_dict(), "tokens_per_second": {}}
    for tokens in case.options["tokens"]:
        state.objective.oom.follow(replace(stage.plan, micro_tokens=tokens))
        seconds = []
        for _ in range(1 + case.options["rounds"]):
            wait()
            start = time.perf_counter()
            metrics = accumulate_gradients(state, 0)
            wait()
            seconds.append(time.perf_counter() - start)
            state.optimizer.zero_grad(set_to_none=True)
        if stage.plan.micro_tokens != tokens:  # it did not fit, and the plan adapted
            found["tokens_per_second"][tokens] = None
            continue
        found["tokens_per_second"][tokens] = metrics["num_tokens"] / min(seconds[1:])
    return found


def measure_reference(case: Case, begun: float) -> dict[str, Any]:
    """What a live reference adds to the peak of a pass: the peak of preference optimization's forward and backward pass on
    the largest micro-batch, less that of the policy's alone on the same batch, as supervised fine-tuning would run it."""
    from zephyr_lite.model.decoder import Dropout
    from zephyr_lite.train.steps import largest_micro_batches

    stage, state = opened(case, [])
    task, config = state.objective, stage.config
    group = largest_micro_batches(stage.data.lengths, stage.plan.micro_tokens)[-1]
    batch = task._batch(stage.data, group)

    def both() -> None:
        loss, _ = task.loss(group, 1, len(group))
        loss.backward()

    def alone() -> None:
        dropout = Dropout(config.lora_dropout, config.seed, 1)
        (-stage.decoder.token_logps(batch, keep=stage.plan.keep, dropout=dropout).mean()).backward()

    def of(run: Callable[[], None]) -> int:
        run()  # what is made once: scratch, kernels
        state.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        reset_peak()
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS") or 0
        run()
        state.optimizer.zero_grad(set_to_none=True)
        at_most = peak()
        return int(at_most["allocated"] or at_most["reserved"] or 0) - before

    shape = stage.base.model.config
    found: dict[str, Any] = {"tokens": len(batch), "pairs": len(group), "modes": {}}
    hidden = shape.hidden_size * stage.base.dtype.itemsize
    found["a_hidden_state"] = len(batch) * hidden
    found["kept_by_a_pass"] = len(batch) * stage.plan.bytes_per_token
    for mode in ("together", "own"):
        task.oom.follow(replace(stage.plan, reference=mode))
        policy = of(alone)
        found["modes"][mode] = {"policy": policy, "with_reference": (live := of(both)), "cost": live - policy}
    return found
