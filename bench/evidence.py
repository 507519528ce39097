"""All that one GPU can tell of this project, in one command and a few minutes: tests, kernels, engines, memory, rates.

    python -m bench.evidence --out DIR --minutes 9
    python -m bench.evidence --out DIR --only gpu cap12      # again what was red

Every stage is a process of its own with a limit of its own; time that one does not use goes to those after it. DIR gets
STAGE.log of each, STAGE.json of the benches, and evidence.json, rewritten after every stage. A stage that fails does not
stop the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.command import ROOT, save

# The stages import what they need; this file works where torch does not.

LEAST = 5.0  # seconds: with less left a stage is not started
# Parts of GPU tests' names: attention, the decoder, step 0, NF4, keep policies, packing, streaming, out of memory, peaks.
TESTS = (
    "equals_float64 or decoder_on_the_gpu or step_0 or nf4_on_the_gpu or keep_policies or packed_equals or other_storages "
    "or (to_the_bit and LateCopies and input) or do_not_wait or redone_and_the_same or (a_twentieth and planned) "
    "or under_a_cap"
)
_PYTEST = "pytest -p no:cacheprovider -v --tb=short --durations=0"
_BENCH = "--out {out} --base {base}"
_GPU = f"bench.gpu {_BENCH} --engines fused,unsloth"
_TINY_GPU = f"{_GPU} --tiny --rounds 1 --per-device 1 --sft-rows 1 --dpo-pairs 1"


@dataclass(frozen=True)
class Stage:
    """A part of the evidence.

    Attributes:
        seconds: its share of ``--minutes``, out of the sum over all stages that are still to come.
        words: what ``python -m`` runs; ``{minutes}`` is its limit less the time to start and to end.
        tiny: the same with ``--tiny``.
    """

    name: str
    seconds: float
    words: str
    tiny: str


STAGES = (
    Stage("machine", 60, "bench.machine --out {out}", "bench.machine --out {out} --tiny"),
    Stage("base", 60, f"bench.mistral {_BENCH}", f"bench.mistral {_BENCH} --tiny"),
    Stage(
        "tests",
        100,
        f"{_PYTEST} -m gpu -k '{TESTS}' {'-n 4' if find_spec('xdist') else ''} tests/test_gpu.py tests/memory/test_gpu_memory.py",
        f"{_PYTEST} -k segments_of_like_length tests/ops/test_ops.py",
    ),
    Stage("ops", 60, "bench.ops --out {out} --rounds 15", "bench.ops --out {out} --tiny"),
    Stage("gpu", 190, f"{_GPU} --cap 24 --rounds 3 --minutes {{minutes}}", _TINY_GPU),
    Stage(
        "memory",
        85,
        f"bench.memory {_BENCH} --cards 24 8 --minutes {{minutes}}",
        f"bench.memory {_BENCH} --cards 24 --rows 1 --tiny",
    ),
    Stage("cap12", 60, f"{_GPU} --cap 12 --methods sft --rounds 3 --minutes {{minutes}}", f"{_TINY_GPU} --methods sft"),
)


def command(stage: Stage, args: argparse.Namespace, seconds: float) -> list[str]:
    """The stage's command after ``python -m``."""
    minutes = round(max(0.1, 0.9 * seconds / 60 - 0.1), 3)
    told = {"out": args.out / f"{stage.name}.json", "base": args.base, "minutes": minutes}
    return [word.format(**told) for word in shlex.split(stage.tiny if args.tiny else stage.words)]


def start(words: list[str], log: Any, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The process of a stage, leader of a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", *words],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def run_stage(words: list[str], log: Path, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a stage to its end or to its limit; what became of it."""
    begun = time.monotonic()
    with log.open("wb") as file:
        process = start(words, file, environment)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # engines' processes hold memory of the card that the next stage needs
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    record: dict[str, Any] = {"status": "ok" if code == 0 else "timed out" if code is None else "failed"}
    record |= {"seconds": round(time.monotonic() - begun, 1), "limit": round(seconds, 1), "command": words}
    if code != 0:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        record |= {"exit_code": code, "last_lines": lines[-15:]}
    return record


def table(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, stage in found["stages"].items():
        why = "" if stage["status"] == "ok" else f"  {(stage.get('last_lines') or [''])[-1][:100]}"
        lines.append(
            f"{name:10}{stage['status']:13}{stage.get('seconds', 0):6.0f} of {stage.get('limit', 0):4.0f} s{why}"
        )
    return lines


def main(words: Sequence[str] | None = None) -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder for everything")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--only", nargs="+", choices=names, help="these stages; others' results are kept")
    parser.add_argument("--base", type=Path, help="the model's folder, built if it does not exist; default: temporary")
    parser.add_argument("--commit", help="commit to record in a copy without git")
    parser.add_argument("--tiny", action="store_true", help="everything at a tiny size, on a CPU too: does it run?")
    args = parser.parse_args(words)
    deadline = time.monotonic() + 60 * args.minutes
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.gettempdir()) / "zephyr-lite-bench"
    args.base = (args.base or (args.out / "tiny-base" if args.tiny else scratch / "base")).resolve()
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1"}
    own |= {"UNSLOTH_COMPILE_LOCATION": str(scratch / "unsloth"), "TRITON_CACHE_DIR": str(scratch / "triton")}
    environment = {**own, **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    path = args.out / "evidence.json"
    before = json.loads(path.read_text(encoding="utf-8")) if args.only and path.is_file() else {}
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "minutes": args.minutes,
        "tiny": args.tiny,
        "commit": args.commit or before.get("commit"),
        "machine": before.get("machine"),
        "stages": before.get("stages", {}),
    }
    todo = [stage for stage in STAGES if stage.name in (args.only or names)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for place, stage in enumerate(todo):
            left = deadline - time.monotonic()
            seconds = left * stage.seconds / sum(s.seconds for s in todo[place:])
            result = args.out / f"{stage.name}.json"
            result.unlink(missing_ok=True)
            found["stages"] |= {each.name: {"status": "not run"} for each in todo[place:]}
            save(path, found)
            if seconds < LEAST:
                break
            print(f"{stage.name}: at most {seconds:.0f} s …", flush=True)
            record = run_stage(command(stage, args, seconds), args.out / f"{stage.name}.log", seconds, environment)
            found["stages"][stage.name] = record
            print(f"  {record['status']} after {record['seconds']:.0f} s", flush=True)
            if stage.name == "machine" and record["status"] == "ok":
                found["machine"] = json.loads(result.read_text(encoding="utf-8"))
                found["commit"] = found["machine"]["commit"] or args.commit
            save(path, found)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print("\n".join(table(found)), flush=True)
    return 0 if all(stage["status"] == "ok" for stage in found["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
