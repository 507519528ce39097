"""What the commands take to start: help, and a run to the end of its first step.

    python -m bench.start [--base FOLDER] [--checkout FOLDER] [--repeats 3] [--out start.json]

--base: a model to train on (default: a tiny one of random weights, which is made here: what remains is the start itself).
--checkout: another checkout of this project, for before and after. Each start is a process of its own, with caches of its
own. The first of a run quantizes the base and tokenizes the rows; ``again`` is another run, with both cached.

``cpu_seconds`` are those of the process and of what it waited for, read when the first step's metrics are written; a busy
machine changes them little. The median of the repetitions counts, of help the least.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.command import ROOT, header, run, save
from zephyr_lite.errors import UserError

HELP = (["--help"], ["--version"], ["sft", "--help"], ["plan", "--help"])
SURVEY = ["env"]
_TICKS = os.sysconf("SC_CLK_TCK")
_PATIENCE = 600.0


def command_seconds(words: list[str], checkout: Path, settings: dict[str, str]) -> tuple[float, float]:
    """Seconds on the clock and on the processor, of a command that ends by itself.

    Raises:
        UserError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "zephyr_lite", *words], cwd=checkout, env=settings, capture_output=True, check=False
    )
    wall = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"zephyr-lite {' '.join(words)} ended with {done.returncode}: {done.stderr.decode()[-500:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step_seconds(words: list[str], out: Path, checkout: Path, settings: dict[str, str]) -> tuple[float, float]:
    """The same, of ``sft`` to its first line of metrics.

    Raises:
        UserError: the run failed, or wrote none for ten minutes.
    """
    metrics = out / "sft" / "metrics.jsonl"
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "zephyr_lite", "sft", *words, f"output_dir={out}"],
            cwd=checkout,
            env=settings,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            while not (metrics.is_file() and metrics.stat().st_size):
                if process.poll() is not None or time.perf_counter() - begun > _PATIENCE:
                    said.seek(0)
                    raise UserError(f"no first step: {said.read().decode()[-500:]}")
                time.sleep(0.01)
            wall, used = time.perf_counter() - begun, _processor_seconds(process.pid)
            process.wait()
        finally:
            process.kill()
            process.wait()
    return wall, used


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(int(value) for value in fields[11:15]) / _TICKS  # its own, and of the children that it waited for


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    from bench.mistral import tiny_base

    checkout = args.checkout.resolve()
    result: dict[str, Any] = {**header(checkout=checkout), "base": args.base.name if args.base else "a tiny one"}
    measured: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = args.base.resolve() if args.base else tiny_base(folder / "base")
        rows = folder / "rows.jsonl"
        turns = [
            {"role": "user", "content": "Name a river."},
            {"role": "assistant", "content": "The Rhine, or the Nile."},
        ]
        rows.write_text((json.dumps({"messages": turns}) + "\n") * 32)
        words = [
            f"model_name_or_path={base}",
            f"dataset={rows}",
            "eval_dataset=[]",
            "max_steps=1",
            "batch_size=1",
            "max_length=128",
            "logging_steps=1",
            "chat_template=zephyr",
        ]
        for number in range(args.repeats):
            cache = folder / f"cache{number}"
            own = {"XDG_CACHE_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "rows"), "HF_HUB_OFFLINE": "1"}
            settings = {**os.environ, **own, "PYTHONPATH": str(checkout)}
            settings.pop("ZEPHYR_LITE_CACHE", None)
            for command in (*HELP, SURVEY):
                measured.setdefault(" ".join(command), []).append(command_seconds(command, checkout, settings))
            for case in ("sft to the first step", "sft to the first step, again"):
                out = folder / f"run{number}-{'again' in case}"
                measured.setdefault(case, []).append(first_step_seconds(words, out, checkout, settings))
    for case, pairs in measured.items():
        middle = min if "help" in case or "version" in case else statistics.median
        wall, used = (round(middle(values), 2) for values in zip(*pairs))
        result[case] = {"seconds": wall, "cpu_seconds": used}
    result["load_after"] = os.getloadavg()
    save(args.out, result)
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    run(main)
