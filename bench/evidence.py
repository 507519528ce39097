"""All that one GPU can tell of this project, in one command and a few minutes: tests, kernels, engines, memory, rates.

    python -m bench.evidence --out DIR --minutes 9
    python -m bench.evidence --out DIR --only gpu cap12      # again what was red

Every stage is a process of its own with a limit of its own; time that one does not use goes to those after it. DIR gets
STAGE.log and STAGE.json of each, and evidence.json, rewritten after every stage: a run that is cut short has told what it
had measured. A stage that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.command import ROOT, save

# The stages import what they need; this file works where torch does not.

LEAST = 5.0  # seconds: with less left a stage is not started
GRACE = 3.0  # seconds between a stage's interrupt and its end


@dataclass(frozen=True)
class Stage:
    """A part of the evidence.

    Attributes:
        seconds: its share of ``--minutes``, out of the sum over all stages that are still to come.
        module: what ``python -m`` runs, with its arguments; ``{minutes}`` is its limit less the time to start and to end.
        tiny: arguments instead of those, with ``--tiny``.
    """

    name: str
    seconds: float
    module: str
    arguments: str = ""
    tiny: str = ""


_GPU = "--engines fused,unsloth --rounds 3 --minutes {minutes}"
_TINY_GPU = "--engines fused,unsloth --rounds 1 --per-device 1 --sft-rows 1 --dpo-pairs 1"
STAGES = (
    Stage("machine", 60, "bench.stages", "machine", "machine"),
    Stage("base", 60, "bench.stages", "base", "base"),
    Stage("tests", 100, "bench.stages", "tests", "tests"),
    Stage("ops", 60, "bench.ops", "--rounds 15"),
    Stage("gpu", 190, "bench.gpu", f"--cap 24 {_GPU}", _TINY_GPU),
    Stage(
        "memory",
        85,
        "bench.memory",
        "--cards 24 8 --minutes {minutes}",
        "--cards 24 --rows 1",
    ),
    Stage("cap12", 60, "bench.gpu", f"--cap 12 --methods sft {_GPU}", f"--methods sft {_TINY_GPU}"),
)


def words_of(stage: Stage, args: argparse.Namespace, seconds: float) -> list[str]:
    """The stage's command after ``python -m``."""
    given = stage.tiny if args.tiny else stage.arguments.format(minutes=round(max(0.1, 0.9 * seconds / 60 - 0.1), 3))
    words = [stage.module, *given.split(), "--out", str(args.out / f"{stage.name}.json")]
    words += ["--base", str(args.base)] if args.base is not None and stage.name != "ops" else []
    return [*words, "--tiny"] if args.tiny else words


def start(words: list[str], log: Any, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The process of a stage, leader of a group of its own."""
    command = [sys.executable, "-u", "-m", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


def end_group(process: Any, *, grace: float = GRACE) -> None:
    """End a stage with all that it started: engines' processes hold memory of the card that the next stage needs."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):  # all of them have ended
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)


def run_stage(words: list[str], log: Path, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a stage to its end or to its limit; what became of it."""
    begun = time.monotonic()
    with log.open("wb") as file:
        process = start(words, file, environment)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        except KeyboardInterrupt:
            end_group(process)
            raise
        end_group(process, grace=GRACE if code is None else 0.0)
    told: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 1), "limit": round(seconds, 1), "command": words}
    if code == 0:
        return {"status": "ok", **told}
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    status = "timed out" if code is None else "failed"
    return {"status": status, **told, "exit_code": code, "last_lines": lines[-15:]}


def earlier(path: Path) -> dict[str, Any]:
    """What an earlier command found, or nothing. A stage that it was killed in was interrupted."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    stages = found["stages"].items()
    return found | {"stages": {k: {"status": "interrupted"} if v["status"] == "running" else v for k, v in stages}}


def environment_of(out: Path) -> dict[str, str]:
    """The stages'. Where the user's cache cannot be written, the base is kept among temporary files."""
    found = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1", **os.environ}
    found.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / "zephyr-lite-bench-unsloth"))
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    cache = Path(found.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError:
        cache = Path(tempfile.gettempdir()) / "zephyr-lite-evidence"
        found["XDG_CACHE_HOME"] = str(cache)
    found.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))  # the tests' too, which have a HOME of their own
    return found


def table(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, stage in found["stages"].items():
        why = "" if stage["status"] == "ok" else f"  {stage.get('why') or (stage.get('last_lines') or [''])[-1][:100]}"
        lines.append(
            f"{name:10}{stage['status']:13}{stage.get('seconds', 0):6.0f} of {stage.get('limit', 0):4.0f} s{why}"
        )
    return lines


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder for everything")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument(
        "--only", nargs="+", choices=[s.name for s in STAGES], help="these stages; others' results are kept"
    )
    parser.add_argument("--base", type=Path, help="the model's folder, built if it does not exist; default: a cache")
    parser.add_argument("--commit", help="commit to record in a copy without git")
    parser.add_argument("--tiny", action="store_true", help="everything at a tiny size, on a CPU too: does it run?")
    args = parser.parse_args(words)
    deadline = time.monotonic() + 60 * args.minutes
    args.out = args.out.resolve()
    path, environment = args.out / "evidence.json", environment_of(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.base is not None or args.tiny:
        args.base = (args.base or args.out / "tiny-base" / "base").resolve()
    before = earlier(path) if args.only else {}
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "minutes": args.minutes,
        "tiny": args.tiny,
        "commit": args.commit or before.get("commit"),
        "machine": before.get("machine"),
        "stages": before.get("stages", {}),
    }
    todo = [stage for stage in STAGES if args.only is None or stage.name in args.only]
    handlers = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        for place, stage in enumerate(todo):
            left = deadline - time.monotonic()
            seconds = left * stage.seconds / sum(s.seconds for s in todo[place:])
            told = args.out / f"{stage.name}.json"
            told.unlink(missing_ok=True)
            if seconds < LEAST:
                found["stages"][stage.name] = {
                    "status": "skipped",
                    "why": f"{left:.0f} s were left for what was to come",
                }
            else:
                found["stages"][stage.name] = {"status": "running", "limit": round(seconds, 1)}
                save(path, found)
                print(f"{stage.name}: at most {seconds:.0f} s …", flush=True)
                commands = words_of(stage, args, seconds)
                try:
                    record = run_stage(commands, args.out / f"{stage.name}.log", seconds, environment)
                except KeyboardInterrupt:
                    skipped = {s.name: {"status": "skipped", "why": "interrupted"} for s in todo[place + 1 :]}
                    found["stages"] |= {stage.name: {"status": "interrupted"}, **skipped}
                    raise
                found["stages"][stage.name] = record
                print(f"  {record['status']} after {record['seconds']:.0f} s", flush=True)
            if stage.name == "machine" and told.is_file():
                with suppress(ValueError):  # cut off while it was written
                    found["machine"] = json.loads(told.read_text(encoding="utf-8"))
                    found["commit"] = found["machine"].get("commit") or args.commit
            save(path, found)
    except KeyboardInterrupt:
        save(path, found)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print("\n".join(table(found)), flush=True)
    return 0 if all(stage["status"] == "ok" for stage in found["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
