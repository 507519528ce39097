"""Stop runs at random instants, start them again, and compare what they end with to an undisturbed run, bit for bit.

    python -m tests.kill --stops 100 --seed 0 [--scenario sft ...] [--real]

Every run is a process of its own. By default it is forked from this one, which has imported everything, so that most
instants fall into the work and not into the imports; ``--real`` starts the command line as a user does. Of the stops six
in ten are SIGKILL, the others SIGTERM and SIGINT, after which a process has to end with exit code 130 by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zephyr_lite.io.run_dir import StageDir

os.environ.setdefault("OMP_NUM_THREADS", "1")  # and no pool of threads that a fork would lose

# what a clock says, and no run repeats
CLOCK = {"seconds", "tokens_per_second", "pairs_per_second", "created", "finished", "peak_memory_bytes", "at"}
CLOCK |= {"peak_memory_gib"}
# what only the way to the end decides, and the memory that was free then: how a stage was gone on with, its id, its plan
WAY = {"resumed", "id", "plan"}
FEW = 6  # stops of a scenario, for which one undisturbed run has to do
LONGEST = 120.0  # seconds that a stopped process may take to finish its step


@dataclass(frozen=True)
class Ground:
    """What scenarios train on."""

    base: Path
    chats: Path
    pairs: Path


@dataclass(frozen=True)
class Scenario:
    """Commands that make one run.

    Attributes:
        name: for the command line.
        words: of each command, for a run's folder.
    """

    name: str
    words: Callable[[Ground, Path], list[list[str]]]


def _keys(ground: Ground, out: Path, rows: Path, **changes: Any) -> list[str]:
    settings = {
        "model_name_or_path": ground.base,
        "output_dir": out,
        "dataset.path": rows,
        "eval_dataset.path": rows,
        "max_length": 128,
        "batch_size": 3,
        "lora_r": 4,
        "lora_alpha": 8,
        "learning_rate": 5e-3,
        "save_steps": 2,
        "eval_steps": 3,
        "num_train_epochs": 3,
        "sample_tokens": 3,
        **changes,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def _sft(ground: Ground, out: Path, **changes: Any) -> list[str]:
    return ["sft", *_keys(ground, out, ground.chats, **{"batch_size": 1, "lora_dropout": 0.1, **changes})]


def _dpo(ground: Ground, out: Path, **changes: Any) -> list[str]:
    return ["dpo", *_keys(ground, out, ground.pairs, **{"max_prompt_length": 64, "beta": 0.1, **changes})]


def _merge(out: Path) -> list[str]:
    return ["merge", "--run", str(out), "--out", str(out / "merged")]


SCENARIOS = [
    Scenario("sft", lambda g, out: [_sft(g, out, optim="adamw_torch")]),
    Scenario("8bit", lambda g, out: [_sft(g, out, optim="adamw_8bit", load_best_model_at_end=True)]),
    Scenario("paged", lambda g, out: [_sft(g, out, optim="paged_adamw_8bit", max_steps=6)]),
    Scenario(
        "whole",
        lambda g, out: [
            _sft(g, out, optim="adamw_torch", max_steps=4),
            _dpo(g, out, optim="paged_adamw_8bit", precompute_ref_log_probs="true"),
            _merge(out),
        ],
    ),
    Scenario("live", lambda g, out: [_sft(g, out, max_steps=2), _dpo(g, out, lora_dropout=0.1, save_steps=1)]),
    Scenario("demo", lambda g, out: [["demo", str(g.base), str(out)]]),
]


def ground(folder: Path) -> Ground:
    """A tiny base and rows, as the tests have them."""
    from tests.conftest import CONVERSATIONS, _messages, make_model, make_tokenizer

    base = folder / "base"
    make_model().save_pretrained(base)
    make_tokenizer(base)
    chats = [{"messages": _messages(*pair)} for pair in CONVERSATIONS]
    pairs = [
        {"prompt": q, "chosen": _messages(q, a), "rejected": _messages(q, "It depends on many, many things.")}
        for q, a in CONVERSATIONS
    ]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Ground(base, folder / "chats.jsonl", folder / "pairs.jsonl")


def command(words: Sequence[str]) -> int:
    """A command in this process; its exit code. The demo's base is not one of its options."""
    from zephyr_lite.__main__ import main

    if words[0] == "demo":
        from zephyr_lite.demo import run as demo

        plain, base = demo.run_demo, Path(words[1])

        def on_tiny(out: Path, **options: Any) -> Any:
            few = ["max_steps=4", "save_steps=1", "eval_steps=2"]
            return plain(out, **{**options, "base": base, "overrides": few})

        demo.run_demo = on_tiny
        words = ["demo", "--out", words[2]]
    try:
        main(list(words))
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def forked(words: Sequence[str], log: Path) -> int:
    """Start a process that runs the command; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = command(words)
    except KeyboardInterrupt:
        code = 130  # before the command line had begun
    finally:
        sys.stdout.flush()
        os._exit(code)


def started(words: Sequence[str], log: Path) -> int:
    """As a user starts it."""
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "zephyr_lite", *words], stdout=file, stderr=file).pid


def ended(pid: int, seconds: float) -> int | None:
    """The exit code (negative: a signal's number), or None where it still runs after so long."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {k: without(v, keys) for k, v in value.items() if k not in keys}
    return [without(v, keys) for v in value] if isinstance(value, list) else value


def standing(out: Path) -> dict[str, str]:
    """File → what must be equal in it: bytes, or of JSON all but what a clock says. Of checkpoints the newest: which others
    are left depends on the extra ones that interrupts write."""
    found = {}
    older = {path for info in out.glob("*/stage.json") for path in StageDir(info.parent).checkpoints()[:-1]}
    for path in sorted(out.rglob("*")):
        if older & {path, *path.parents}:
            continue
        name = path.relative_to(out).as_posix()
        if path.is_dir() or name == ".lock":
            continue
        if path.name in ("manifest.json", "report.html"):
            continue  # hashes, or pictures, of files that are compared here, a clock's among them
        text = path.read_bytes()
        if path.suffix == ".json":
            text = json.dumps(without(json.loads(text), CLOCK | WAY), sort_keys=True).encode()
        elif path.suffix == ".jsonl" and path.name in ("metrics.jsonl", "left_out.jsonl"):
            text = json.dumps([without(json.loads(line), CLOCK) for line in text.splitlines()]).encode()
        found[name] = hashlib.sha256(text.replace(str(out).encode(), b"OUT")).hexdigest()
    return found


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def faults(out: Path) -> Iterator[str]:
    """What no finished run may show: a metrics file with a gap or a double, something left aside."""
    for path in out.rglob("metrics.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [r["step"] for r in records if "loss" in r]
        if steps != list(range(1, len(steps) + 1)):
            yield f"{path}: steps {steps}"
        held_out = [r["step"] for r in records if "eval_loss" in r]
        if held_out != sorted(set(held_out)):
            yield f"{path}: evaluations {held_out}"
    for path in out.rglob(".*"):
        if path.name != ".lock":
            yield f"{path}: left behind"


@dataclass
class Count:
    """What happened to a scenario's runs."""

    stops: Counter[str] = field(default_factory=Counter)
    ends: int = 0
    wrong: list[str] = field(default_factory=list)


def trial(scenario: Scenario, on: Ground, folder: Path, stops: int, seed: int, *, real: bool = False) -> Count:
    """Stop runs of a scenario so many times, and let the last one end."""
    start = started if real else forked
    draw, count, log = random.Random(f"{scenario.name} {seed}"), Count(), folder / f"{scenario.name}.log"
    out = folder / scenario.name / "run"  # the same name for every run of it: it is in the files
    commands = scenario.words(on, out)
    seconds: list[float] = []
    right: dict[str, str] = {}
    for _ in range(1 if stops < FEW else 2):  # the first one also fills caches, which later ones find
        shutil.rmtree(out, ignore_errors=True)
        seconds.clear()
        for words in commands:
            begun = time.monotonic()
            if (code := ended(start(words, log), 20 * LONGEST)) != 0:
                count.wrong.append(f"the undisturbed {words[0]} ended with {code}; see {log}")
                return count
            seconds.append(time.monotonic() - begun)
        count.wrong += faults(out)
        before, right = right, standing(out)
    if before:
        count.wrong += [f"{name} is not the same in two undisturbed runs" for name in differing(before, right)]
    shutil.rmtree(out)
    stopped = place = 0
    while (stopped < stops or out.exists() or not count.ends) and not count.wrong:
        child = start(commands[place], log)
        code = ended(child, draw.uniform(0, seconds[place]) if stopped < stops else 20 * LONGEST)
        if code is None:
            kind = draw.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], [6, 2, 2])[0]
            os.kill(child, kind)
            stopped += 1
            count.stops[kind.name] += 1
            code = ended(child, LONGEST)
            fine = {-kind, 0} if kind == signal.SIGKILL else {130, -kind, 0}
            if code not in fine:
                count.wrong.append(f"after {kind.name} {commands[place][0]} ended with {code}; see {log}")
        elif code != 0:
            count.wrong.append(f"{commands[place][0]} ended with {code}; see {log}")
        if code != 0:
            continue
        place = (place + 1) % len(commands)
        if place == 0:
            count.wrong += [*faults(out)]
            found = standing(out)
            count.wrong += [f"{name} differs" for name in differing(right, found)]
            count.ends += 1
            if not count.wrong:
                shutil.rmtree(out)
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=100, help="in all, over the scenarios")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", action="append", choices=names)
    parser.add_argument("--real", action="store_true", help="start python -m zephyr_lite each time")
    parser.add_argument("--keep", type=Path, help="a folder to work in, which is left there")
    asked = parser.parse_args(arguments)
    folder = Path(asked.keep or tempfile.mkdtemp(prefix="kill-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(XDG_CACHE_HOME=str(folder / "cache"), HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    os.environ.pop("ZEPHYR_LITE_CACHE", None)
    on = ground(folder)
    if not asked.real:
        # what commands import when they run
        import zephyr_lite.demo.run
        import zephyr_lite.memory.forecast
        import zephyr_lite.merge.command
        import zephyr_lite.train.dpo
        import zephyr_lite.train.sft  # noqa: F401
    chosen = [s for s in SCENARIOS if s.name in (asked.scenario or names) and not (asked.real and s.name == "demo")]
    wrong = 0
    for place, scenario in enumerate(chosen):
        stops = asked.stops * (place + 1) // len(chosen) - asked.stops * place // len(chosen)
        count = trial(scenario, on, folder, stops, asked.seed, real=asked.real)
        wrong += len(count.wrong)
        kinds = ", ".join(f"{name} {n}" for name, n in sorted(count.stops.items()))
        print(
            f"{scenario.name}: {kinds or 'no stops'}; {count.ends} runs ended, all equal to the undisturbed one"
            if not count.wrong
            else f"{scenario.name}: {kinds}; WRONG: " + "; ".join(count.wrong),
            flush=True,
        )
    if asked.keep is None and not wrong:
        shutil.rmtree(folder)
    elif wrong:
        print(f"left in {folder}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
