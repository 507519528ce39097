"""From a file of conversations to packed rows: seconds, processor time, memory; the first time, and when it is cached.

    python -m bench.prepare DATA... [--rows 207865] [--small 20000] [--dir FOLDER] [--tokenizer FOLDER] [--out prepare.json]

DATA: files of conversations (JSONL with ``messages``, or folders of such), from which as many others of real lengths are
made: each turn as long as a real one, of sentences that somebody of its role wrote, drawn anew for every turn. One to three
real conversations give a row its turns, which makes UltraChat-200k's 1,375 tokens a row of the rows that are shorter.
Without --tokenizer: Mistral-7B-v0.1's, which mistral-common carries. Needs some 5 GB in --dir for the recipe's 207,865 rows.

Every measurement is a process of its own that calls ``data.prepare.prepare`` as a run does. ``cpu_seconds`` are those of all
its processes, which a busy machine changes little; ``anonymous_mib`` the most that they held together, less the files that
the kernel caches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.command import header, run, save, watched
from zephyr_lite.errors import UserError

_SENTENCE = re.compile(r"(?<=[.!?:\n])\s+")


def conversations(places: Sequence[Path]) -> list[list[dict[str, str]]]:
    """The conversations of the files, and of those in the folders.

    Raises:
        UserError: a place does not exist, or nothing lies there.
    """
    found = []
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such file or folder.")
        for file in sorted(place.glob("train*.jsonl")) if place.is_dir() else [place]:
            found += [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    if not found:
        raise UserError(f"{places[0]}: no conversations there.", "Give JSONL files with a column messages.")
    return found


def drawn(real: list[list[dict[str, str]]], count: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """``count`` conversations of the real ones' turns and sentences."""
    pool: dict[str, list[str]] = {}
    for messages in real:
        for turn in messages:
            pool.setdefault(turn["role"], []).extend(s for s in _SENTENCE.split(turn["content"]) if s)
    plain = [messages for messages in real if messages[0]["role"] != "system"] or real
    rng = random.Random(seed)
    for _ in range(count):
        turns = list(rng.choice(real))
        for _ in range(rng.randrange(3)):
            turns += rng.choice(plain)
        yield [
            {"role": turn["role"], "content": _text(rng, pool[turn["role"]], len(turn["content"]))} for turn in turns
        ]


def _text(rng: random.Random, sentences: list[str], length: int) -> str:
    parts: list[str] = []
    left = length
    while left > 0:
        parts.append(rng.choice(sentences))
        left -= len(parts[-1]) + 1
    return " ".join(parts)


def mistral_tokenizer(folder: Path) -> Path:
    """Mistral-7B-v0.1's tokenizer as a folder that AutoTokenizer loads quickly."""
    import importlib.util

    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("mistral-common is not installed.", "pip install mistral-common==1.13.1, or give --tokenizer.")
    source = folder / "sentencepiece"
    source.mkdir(parents=True)
    shutil.copy(Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1", source / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def child(data: str, tokenizer: str, max_length: int) -> None:
    """Prepare once; prints what it took as JSON. The process' own start and imports are not counted."""
    from transformers import AutoTokenizer

    from zephyr_lite.config.load import RunConfig
    from zephyr_lite.data import dataset as module
    from zephyr_lite.data.chat_template import resolve_template

    spent: dict[str, float] = {}

    def timed(name: str) -> None:
        call: Callable[..., Any] = getattr(module, name)

        def timing(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[name.lstrip("_")] = round(time.perf_counter() - begun, 2)

        setattr(module, name, timing)

    for name in ("load_rows", "best_fit", "_fingerprint"):
        timed(name)
    config = RunConfig.model_validate({"dataset": [{"path": data}], "max_length": max_length})
    before, begun = _cpu_seconds(), time.perf_counter()
    template = resolve_template("zephyr", AutoTokenizer.from_pretrained(tokenizer))
    prepared = module.prepare(config.dataset, "sft", config, template)
    wall = time.perf_counter() - begun
    print(
        json.dumps(
            {
                "seconds": round(wall, 2),
                "cpu_seconds": round(_cpu_seconds() - before, 2),
                "parts": {**spent, "tokenize and the rest": round(wall - sum(spent.values()), 2)},
                "conversations": prepared.report.kept,
                "tokens": prepared.report.tokens,
                "rows": prepared.report.rows,
                "fingerprint": prepared.fingerprint[:16],
            }
        )
    )


def _cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(data: Path, tokenizer: Path, cache: Path, max_length: int) -> dict[str, Any]:
    """One process that prepares; with the most memory that it and its workers held."""
    command = [sys.executable, "-m", "bench.prepare", "--child", str(data), str(tokenizer), str(max_length)]
    settings = {"HF_DATASETS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    output, peak = watched(command, {**os.environ, **settings})
    return {**json.loads(output.splitlines()[-1]), "anonymous_mib": round(peak)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=207_865, help="conversations; as many as UltraChat-200k trains on")
    parser.add_argument("--small", type=int, default=20_000, help="of a first measurement, to compare memory with")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    real = conversations(args.data)
    result: dict[str, Any] = {**header(), "sizes": []}
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        tokenizer = args.tokenizer or mistral_tokenizer(folder)
        for count in (args.small, args.rows):
            data = folder / f"train_{count}.jsonl"
            with data.open("w") as file:
                for messages in drawn(real, count):
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            row: dict[str, Any] = {"conversations": count, "megabytes": round(data.stat().st_size / 1e6)}
            for case in ("first", "cached"):
                row[case] = measure(data, tokenizer, folder / f"cache_{count}", args.max_length)
            row["load_after"] = os.getloadavg()
            result["sizes"].append(row)
            shutil.rmtree(folder / f"cache_{count}")
            data.unlink()
    save(args.out, result)
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        run(main)
