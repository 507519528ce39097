"""`zephyr-lite data chat`, measured: how well capitals are restored, how fast the whole command is, how much memory it takes.

    python -m bench.chat_data DATA... [--turns 200000] [--processes 2] [--out chat_data.json]

DATA: folders of well-cased conversations (`ultrachat_200k`, `ultrafeedback_binarized`). Truecasing: `bench.truecasing`. Speed and
memory: a raw UltraChat (train_0.jsonl …) is made of the same rows, each time with other names and numbers and some words
exchanged, so that copies are no duplicates; one in twenty with the fault of UltraChat. The command runs in a process of its
own, its cache empty; the time is that of the process from start to end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.command import header, run, save, watched
from bench.truecasing import dialogues, fault, measure
from zephyr_lite.errors import UserError

# of the words of a copy so many are drawn anew from the corpus
EXCHANGED = 0.3
BROKEN, DUPLICATES = 0.05, 0.03
LEAST = 30
_WORD = re.compile(r"(?<=[a-z] )[a-z]{4,}(?= [a-z])")


def corpus(rows: list[list[str]], turns: int, folder: Path) -> tuple[int, int, int]:
    """Write a raw UltraChat of at least so many turns, in two files.

    Returns:
        (rows, turns, characters).
    """
    vocabulary = sorted({word for row in rows for text in row for word in _WORD.findall(text)})
    draw = random.Random(42)
    counts = [0, 0, 0]
    files = [(folder / f"train_{n}.jsonl").open("w", encoding="utf-8") for n in range(2)]
    last = rows[0]
    while counts[1] < turns:
        row = rows[draw.randrange(len(rows))]
        if draw.random() < DUPLICATES:
            data = last
        else:
            data = [_varied(text, draw, vocabulary) for text in row]
            if draw.random() < BROKEN:
                data = [fault(text) for text in data]
        last = data
        file = files[counts[1] * 2 // turns if counts[1] < turns else 1]
        file.write(json.dumps({"id": str(counts[0]), "data": data}, ensure_ascii=False) + "\n")
        counts = [counts[0] + 1, counts[1] + len(data), counts[2] + sum(map(len, data))]
    for file in files:
        file.close()
    return counts[0], counts[1], counts[2]


def _varied(text: str, draw: random.Random, vocabulary: list[str]) -> str:
    return _WORD.sub(lambda m: draw.choice(vocabulary) if draw.random() < EXCHANGED else m.group(), text)


def play(folder: Path, out: Path, processes: int) -> dict[str, Any]:
    """Run the command once; seconds, and the peak memory of all its processes together."""
    cache = out.with_name(out.name + "-cache")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = ["data", "chat", str(folder), "--out", str(out), "--num-proc", str(processes)]
    started = time.monotonic()
    _, peak = watched([sys.executable, "-m", "zephyr_lite", *words], environment)
    seconds = time.monotonic() - started
    shutil.rmtree(cache, ignore_errors=True)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {
        "seconds": round(seconds, 2),
        "anonymous_mib": peak,
        **{k: report[k] for k in ("rows", "kept", "dropped", "cut", "broken_capitals")},
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="folders of well-cased conversations (JSONL)")
    parser.add_argument("--turns", type=int, default=200_000, help="of the corpus whose speed is measured; 0: none")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--growth", type=int, default=10, help="memory: a corpus so many times smaller is measured too")
    parser.add_argument("--dir", type=Path, help="where to work (a temporary folder by default)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    for folder in options.data:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder.")
    rows = [turns for folder in options.data for turns in dialogues(folder)]
    if not rows:
        raise UserError("no conversations in these folders.", "Name folders with JSONL files of messages.")
    score, counted = measure(rows)
    result: dict[str, Any] = {**header("numpy", "pyarrow"), "truecasing": {**score.table(), **counted}}
    texts = [[turn["content"] for turn in turns if turn["role"] != "system"] for turns in rows]
    # short ones cannot be varied enough to be no duplicates
    texts = [row for row in texts if len(row) > 1 and sum(len(_WORD.findall(text)) for text in row) >= LEAST] or texts
    sizes = [options.turns // options.growth, options.turns] if options.turns else []
    with tempfile.TemporaryDirectory(dir=options.dir) as work:
        for number, turns in enumerate(sizes):
            source = Path(work) / f"raw{number}"
            source.mkdir()
            made = corpus(texts, turns, source)
            found = play(source, Path(work) / f"out{number}", options.processes)
            found.update(turns=made[1], characters=made[2], turns_per_second=round(made[1] / found["seconds"]))
            result.setdefault("speed", []).append(found)
            shutil.rmtree(source)
    if len(sizes) == 2:
        small, large = result["speed"]
        result["marginal_turns_per_second"] = round(
            (large["turns"] - small["turns"]) / max(large["seconds"] - small["seconds"], 1e-9)
        )
    print(json.dumps(result, indent=1, ensure_ascii=False))
    save(options.out, result)
    return result


if __name__ == "__main__":
    run(main)
