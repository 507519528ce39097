"""The cases of ``bench.memory``, and its table: runs on imitated cards, each in a process of its own.

A case opens a stage as a user's run does and runs a few steps. In its own process, one that runs out of memory does not spoil
the next, and peaks are its own. Its result is plain numbers, or why there are none.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bench import mistral, rows
from bench.card import describe_card
from bench.command import header, save
from bench.contest import alone
from bench.turns import Stop, frozen_adapter, imitate_card
from zephyr_lite.config.load import Loaded, Method, RunConfig
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.errors import UserError
from zephyr_lite.io.logging import messages_to
from zephyr_lite.memory.plan import Plan
from zephyr_lite.model.base import compute_device, compute_dtype, load_tokenizer

GIB = 2**30
# Of a card's memory, what the CUDA context and loaded kernels take, which PyTorch's allocator does not count
CONTEXT_BYTES = 3 * 2**28
CARDS = (24.0, 16.0, 12.0, 8.0, 6.0)
SFT_RANK, DPO_RANK = 16, 128
SPEED_TOKENS = (1024, 2048, 4096, 8192)


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
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> dict[str, int | None]:
    """Bytes at most since ``reset_peak``: on a GPU what the allocator reserved and what it handed out of that; on a CPU
    the process's resident set, which is all that a CPU can say."""
    if torch.cuda.is_available():
        return {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
    return {"reserved": _status("VmHWM"), "allocated": None}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


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

    def on_step_begin(self, *words: Any, **settings: Any) -> None:
        wait()
        self.begun = time.perf_counter()

    def on_step_end(self, *words: Any, **settings: Any) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self.begun)
        if len(self.seconds) == self.steps:
            raise Stop


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def opened(case: Case, said: list[str], *callbacks: TrainerCallback) -> tuple[Any, Any]:
    """A stage and the state of its run."""
    from zephyr_lite.train.callbacks import Callbacks
    from zephyr_lite.train.dpo import DpoObjective
    from zephyr_lite.train.loop import TrainState
    from zephyr_lite.train.setup import setup_stage
    from zephyr_lite.train.sft import SftObjective

    config = RunConfig.model_validate(case.values)
    with messages_to(lambda record: said.append(record.getMessage())):
        stage = setup_stage(case.method, Loaded(config, set(case.values), [], None))
        task = (SftObjective if case.method == "sft" else DpoObjective)(stage)
        return stage, TrainState(stage, task, observers=[Callbacks(callbacks)])


def predicted(plan: Plan) -> dict[str, Any]:
    """What the plan counts, in bytes, less the CUDA context, which no allocator sees.

    The allocator's slack counts as reserved memory, not as allocated memory.
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


class Bench:
    """What the parts share.

    Attributes:
        args: the command's.
        base: the model's folder.
        folder: for rows and runs.
        deadline: when to have ended, of ``time.monotonic``.
        at_once: cases that may share the card where only memory is measured.
    """

    def __init__(self, args: argparse.Namespace, found: dict[str, Any], folder: Path, deadline: float) -> None:
        self.args, self.folder, self.deadline = args, folder, deadline
        self.base = Path(found["base"]["folder"])
        room = found["card"].get("free_bytes", 0)
        self.at_once = 1 if args.tiny else max(1, min(3, int(room / GIB // (max(args.cards) + 2))))
        self.scale = 0.1 if args.tiny else 1.0
        self.runs = 0
        template = resolve_template("auto", load_tokenizer(self.base))
        length = int(2048 * self.scale)
        tokens = 2 * args.rows * length
        rows.write_conversations(folder / "sft.jsonl", template, tokens, scale=self.scale)
        rows.write_pairs(folder / "dpo.jsonl", template, 4 * args.rows, scale=self.scale)
        adapter = {"model_name_or_path": str(self.base), "lora_r": SFT_RANK}
        self.frozen = frozen_adapter(adapter, folder)

    def values(self, method: str, memory: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """A stage's configuration: the recipe's, with an 8-bit optimizer."""
        self.runs += 1
        common: dict[str, Any] = {
            "model_name_or_path": str(self.base),
            "load_in_4bit": True,
            "optim": "adamw_8bit",
            "stage": method,
            "chat_template": "auto",
            "eval_dataset": [],
            "eval_steps": None,
            "save_steps": None,
            "max_steps": 100,
            "learning_rate": 1e-5,
            "output_dir": str(self.folder / f"run-{self.runs}"),
            "memory": memory or {},
            "dataset": [{"path": str(self.folder / f"{method}.jsonl")}],
            "batch_size": self.args.rows,
        }
        if method == "sft":
            own: dict[str, Any] = {"lora_r": SFT_RANK, "lora_alpha": SFT_RANK, "max_length": int(2048 * self.scale)}
        else:
            own = {
                "lora_r": DPO_RANK,
                "lora_alpha": DPO_RANK,
                "max_length": int(1024 * self.scale),
                "beta": 0.01,
                "max_prompt_length": int(512 * self.scale),
                "adapters": [str(self.frozen)],
                "lora_dropout": 0.0,
            }
        return common | own | changes

    def card(self, gib: float) -> float | None:
        return None if self.args.tiny else gib

    def play(self, cases: list[Case], *, at_once: int = 1, at_most: float = 240) -> dict[str, dict[str, Any]]:
        """Run cases, several at once where they say nothing of time. One that there is no time for is told as late."""

        def one(case: Case) -> dict[str, Any]:
            left = self.deadline - time.monotonic()
            if left < 5:
                return {"kind": "late", "error": "no time was left; give more --minutes, or fewer --parts"}
            print(f"{case.name} …", flush=True)
            return play(case, min(left, at_most), here=self.args.tiny)

        with ThreadPoolExecutor(at_once) as pool:
            return dict(zip([case.name for case in cases], pool.map(one, cases)))


# -- the parts ---------------------------------------------------------------------------------------------------------


def cards(bench: Bench) -> dict[str, Any]:
    """Peaks against the plan that the planner makes by itself, on each card."""
    cases = [
        Case(f"{method} at {card:g} GB", measure_peak, method, bench.values(method), bench.card(card), {"steps": 2})
        for card in bench.args.cards
        for method in ("sft", "dpo")
    ]
    return bench.play(cases, at_once=bench.at_once)


def speed(bench: Bench) -> dict[str, Any]:
    """A streamed base and a resident one, with the same tokens at once; what layers keep is their inputs, on the card."""
    tokens = [int(n * bench.scale) for n in bench.args.tokens]
    options = {"tokens": tokens, "rounds": 2}
    found: dict[str, Any] = {}
    for name, stream in (("resident", False), ("streamed", True)):
        memory = {"keep": "input", "offload": False, "stream": stream, "micro_tokens": max(tokens)}
        values = bench.values("sft", memory, max_length=min(tokens), batch_size=max(tokens) // min(tokens))
        found |= bench.play([Case(name, measure_speed, "sft", values, None, options)])
    return found


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {"cards": cards, "speed": speed}


def table(results: dict[str, Any]) -> list[str]:
    lines = [f"{results['card']['name']}, {results['dtype']}; sizes in GiB, without the CUDA context"]
    if not results["on_a_card"]:
        lines.append("A CPU: peaks are the resident set of the whole process, and say nothing of a plan.")
    for part, cases in results["parts"].items():
        lines += ["", f"{part}: {(PARTS[part].__doc__ or '').splitlines()[0]}"]
        if any("measured" in case for case in cases.values()):
            lines.append(f"  {'':34}{'predicted':>10}{'reserved':>10}{'allocated':>10}{'managed':>9}{'host':>7}  plan")
        lines += [f"  {name:34}{_row(case)}" for name, case in cases.items()]
    return lines


def _row(case: dict[str, Any]) -> str:
    if "error" in case:
        return f"NO RESULT ({case['kind']}): {' '.join(case['error'].split())[-300:]}"
    if "measured" in case:
        told, found = case["predicted"], case["measured"]
        sizes = (told["reserved"], found["reserved"], found["allocated"])
        shown = "".join(f"{size / GIB:10.2f}" if size is not None else f"{'-':>10}" for size in sizes)
        words = _plan(case["plan"]) + ("; DID NOT FIT, and adapted" if case["adapted"] else "")
        return f"{shown}{found['managed'] / GIB:9.2f}{told['host'] / GIB:7.1f}  {words}"
    speeds = case["tokens_per_second"].items()
    return "  ".join(f"{n:,}: {speed:,.0f} tokens/s" if speed else f"{n:,}: did not fit" for n, speed in speeds)


def _plan(plan: dict[str, Any]) -> str:
    keep = plan["keep"]
    kept = ", ".join(f"{keep.count(word)} {word}" for word in dict.fromkeys(keep))
    words = [f"{plan['micro_tokens']:,} at once", f"keeps {kept}"]
    words += [f"{plan['offload']} offloaded"] if plan["offload"] else []
    words += ["streamed"] if plan["stream"] else []
    words += [f"tile {plan['tile']:,}"] if plan["tile"] else []
    return "; ".join([*words, f"scratch {plan['scratch']}", f"reference {plan['reference']}"])


# -- the whole ---------------------------------------------------------------------------------------------------------


def prepare(base: Path | None, shape: dict[str, Any]) -> dict[str, Any]:
    """Build the model if it does not exist; in a process of its own, which gives the card's memory back."""
    device = compute_device()
    dtype = compute_dtype("auto", device)
    begun = time.monotonic()
    path, built = mistral.ensure_base(base or mistral.default_folder(shape, dtype), shape, device, dtype)
    seconds = round(time.monotonic() - begun, 1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "base": {"folder": str(path.resolve()), "built_now": built, "seconds": seconds, "shape": shape},
        "card": describe_card(device),
        "on_a_card": device.type == "cuda",
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole bench; see ``memory.arguments``.

    Raises:
        UserError: there is no card, or ``--base`` holds something else.
    """
    if not args.tiny and not torch.cuda.is_available():
        raise UserError("bench.memory measures an NVIDIA card, and PyTorch finds none here.", "--tiny runs on a CPU.")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if args.tiny:
            found = prepare(args.base or folder / "base", mistral.TINY)
        else:
            found = alone(prepare, args.base, mistral.MISTRAL_7B | {"num_hidden_layers": args.layers})
        results: dict[str, Any] = {
            **header("accelerate"),
            "settings": vars(args) | {"out": None, "base": None},
            "context_bytes": CONTEXT_BYTES,
            **found,
            "parts": {},
        }
        bench = Bench(args, found, folder, begun + 60 * args.minutes)
        for part in args.parts:
            results["parts"][part] = PARTS[part](bench)
            save(args.out, results)  # an interrupt keeps the results so far
    results["minutes"] = round((time.monotonic() - begun) / 60, 2)
    save(args.out, results)
    return results
