"""``--smoke``: twenty steps, a kill, a resume, a merge and an answer with the user's configuration, in minutes.

Everything is written to ``NAME-smoke`` next to the run, which is not touched. Every part is a command as a user types it,
in its own process, and the kill is a SIGKILL.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config.load import DatasetSpec, Loaded, Method, RunConfig, dump_config
from ..config.resolve import resolve_run
from ..data.sources import open_source
from ..errors import Interrupted, UserError
from ..io.atomic import LOCK_FILE, alone, refuse_others, remove_tree, write_json, write_text
from ..io.run_dir import StageDir
from ..io.text import duration
from ..merge.base_files import BaseFiles
from ..model.chain import chain_of_run
from ..model.files import fetch_base
from ..monitor.records import Columns, StageRecord
from ..train.losses import initial_loss
from ..train.steps import step_schedule
from . import QUESTIONS
from .child import child

logger = logging.getLogger(__name__)
MARK = "smoke.json"
STEPS = 20
KILLED_AFTER = 10  # the first checkpoint's step
MICRO_TOKENS = 8192  # about what a 24 GB card runs at once of a 7B model
HELD_OUT = 8
LOG_LINES = 6  # of a failed command's log that are shown
DISK_RESERVE = 2**30  # bytes that the trial merge leaves free


def run_smoke(
    method: Method, config: str | None, overrides: Sequence[str], *, run: Callable[..., int] = child
) -> list[dict[str, Any]]:
    """Run the smoke test of a stage: its parts, then the time and memory of the real run.

    Args:
        config, overrides: as the stage's command takes them.
        run: starts a command and waits for it.

    Returns:
        the parts: name, seconds, and the result in words (found).
    """
    loaded = resolve_run(method, config, list(overrides))
    for note in loaded.notes:
        logger.info(note)
    folder = smoke_folder(Path(loaded.config.output_dir))
    with alone(folder):
        claim(folder)
        logger.info("smoke test of %s in %s; %s is not touched", method, folder, loaded.config.output_dir)
        try:
            return _smoke(method, loaded, folder, run)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; the next --smoke replaces {folder}.") from None


def smoke_folder(run: Path) -> Path:
    """``NAME-smoke`` beside ``NAME``. Its stages are one level deeper than a run's, so that it is never the newest run."""
    run = run.expanduser()
    run = run if run.name not in ("", "..") else run.resolve()
    return run.with_name(f"{run.name}-smoke")


def claim(folder: Path) -> None:
    """Empty the folder of an earlier smoke test, and mark it as one."""
    hint = "Move it away, or give another output_dir: the smoke test writes to NAME-smoke in the same folder."
    refuse_others(folder, (folder / MARK).is_file(), "a smoke test", hint)
    for path in folder.iterdir():
        if path.name not in (LOCK_FILE, MARK):
            remove_tree(path)
    write_json(folder / MARK, {"status": "running"})
    (folder / "logs").mkdir()


def _smoke(method: Method, loaded: Loaded, folder: Path, run: Callable[..., int]) -> list[dict[str, Any]]:
    begun, out, parts = time.monotonic(), folder / "run", list[dict[str, Any]]()
    config = on_sft(loaded.config) if method == "dpo" else loaded.config
    stage, merged = StageDir(out / method), folder / "merged"

    def part(name: str, words: list[str], found: Callable[[], str], **how: Any) -> None:
        """Run a command, check how it ended, and add its result in words."""
        log = folder / "logs" / f"{len(parts) + 1}-{name.split(',')[0].replace(' ', '-')}.log"
        started = time.monotonic()
        try:
            code = run(words, log=log, **how)
            if code != (-signal.SIGKILL if "kill_when" in how else 0):
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
                raise UserError("\n  ".join([f"`zephyr-lite {words[0]}` ended with exit code {code}", *lines]))
            seconds, result = round(time.monotonic() - started, 1), found()
        except UserError as error:
            write_json(folder / MARK, {"status": "failed", "at": name, "why": error.message})
            message = f"the smoke test failed at: {name}. {error.message}"
            raise UserError(message, f"{error.hint} Its output is in {log}.".strip()) from None
        parts.append({"name": name, "seconds": seconds, "found": result})
        logger.info(f"  {name:<17}  {seconds:6.0f} s  {result}")

    write_text(folder / f"{method}.yaml", dump_config(small_stage(config, method, out)))
    train = [method, "--config", str(folder / f"{method}.yaml")]
    checkpoint = stage.path / f"checkpoint-{KILLED_AFTER}"
    part(f"train, {KILLED_AFTER} steps", train, lambda: "killed there (SIGKILL)", kill_when=checkpoint.is_dir)
    part(f"resume to step {STEPS}", train, lambda: _resumed(stage.path, method, config))
    files, free = base_files(config), shutil.disk_usage(folder).free
    size = files.nbytes  # of the merged model too
    said = f"{size / 1e9:.1f} GB, removed again"
    how = ["--onto", "nf4" if files.quantized else "base", "--rows", "2"]
    if free < size + DISK_RESERVE:
        said = f"the adapter only: {free / 1e9:.1f} GB are free for {merged}, and the model takes {size / 1e9:.1f} GB"
        how = ["--adapter-only"]
    words = ["merge", "--run", str(out), "--stage", method, "--out", str(merged), "--no-card", *how]
    part("merge", words, lambda: said)
    asked, answer = folder / "asked.txt", folder / "answer.txt"
    write_text(asked, QUESTIONS[0])
    words = ["chat", str(stage.path), "--temperature", "0", "--max-new-tokens", "48"]
    part("answer", words, lambda: _shown(answer), asked=asked, answer=answer)

    took = duration(time.monotonic() - begun)
    verdict = [f"smoke test passed in {took}: everything works", *outlook(config, StageRecord(stage.path))]
    write_json(folder / MARK, {"status": "passed", "method": method, "parts": parts, "verdict": verdict})
    for path in (merged, *stage.checkpoints()):
        remove_tree(path)
    for line in verdict:
        logger.info(line)
    return parts


def _resumed(folder: Path, method: Method, config: RunConfig) -> str:
    """Check that the second process continued from the checkpoint of the first."""
    record = StageRecord(folder)
    steps, losses = record.columns["loss"]
    began = [start["step"] for start in record.info["resumed"]]
    assert record.complete and began and began[-1] >= KILLED_AFTER, (record.info["status"], began)
    if bad := sorted({*range(1, STEPS + 1)} - {step for step, loss in zip(steps, losses) if math.isfinite(loss)}):
        raise UserError(
            f"the loss is not finite at steps {bad}.",
            "Look at the rows (zephyr-lite data show), or lower learning_rate.",
        )
    known = initial_loss(config) if method == "dpo" and config.engine == "fused" else None
    if known is not None:
        allowed = 5e-2 if config.precompute_ref_log_probs is True else 1e-3  # a cached reference rounds in another way
        assert abs(losses[0] - known[0]) < allowed * max(1, known[0]), f"first DPO loss {losses[0]}, not {known[1]}"
    held_out = record.values("eval_loss")
    told = f"held out {held_out[-1]:.3f}" if held_out else "nothing is held out"
    return f"from checkpoint-{began[-1]}, loss {losses[0]:.3f}, at the end {losses[-1]:.3f}, {told}"


def _shown(answer: Path) -> str:
    said = " ".join(answer.read_text(encoding="utf-8", errors="replace").split())
    return f"“{said[:60]}{'…' if len(said) > 60 else ''}”" if said else "empty: the first token was the end token"


def small_stage(config: RunConfig, method: Method, run: Path) -> RunConfig:
    """The same stage on few rows, for few steps, in another run, without copies or trackers.

    Base, lengths, adapters and optimizer, which decide the memory, stay. A step has as many rows as may run at once.
    """

    def few(specs: Sequence[DatasetSpec], rows: int) -> list[DatasetSpec]:
        return [spec.model_copy(update={"limit": min(rows, spec.limit or rows)}) for spec in specs]

    longest = config.max_length * (1 if method == "sft" else 2)
    batch = min(config.batch_size, max(1, math.ceil(MICRO_TOKENS / longest)))
    # conversations are shorter than the rows they are packed into
    rows = STEPS * batch * (2 if method == "sft" else 1)
    return config.model_copy(
        update={
            "output_dir": str(run),
            "stage": method,
            "dataset": few(config.dataset, rows),
            "eval_dataset": few(config.eval_dataset, HELD_OUT),
            "batch_size": batch,
            "max_steps": STEPS,
            "eval_steps": STEPS,
            "save_steps": KILLED_AFTER,
            "logging_steps": 1,
            "save_total_limit": 2,
            "load_best_model_at_end": False,
            "early_stopping_patience": None,
            "samples": min(config.samples, 1),
            "report_to": [],
            "push_to_hub": None,
            "sync": None,
        }
    )


def on_sft(config: RunConfig) -> RunConfig:
    """A DPO stage's configuration on the run's SFT adapter; on the bare base if there is none yet."""
    if config.adapters:
        return config
    if not StageDir(Path(config.output_dir) / "sft").complete():
        return config.model_copy(update={"adapters": "none"})
    chain = chain_of_run(config.output_dir, stage="sft")
    return config.model_copy(update={"adapters": [str(adapter.path) for adapter in chain.adapters]})


def base_files(config: RunConfig) -> BaseFiles:
    """The base's weights on the disk."""
    return BaseFiles(fetch_base(config.model_name_or_path, config.model_revision))


def outlook(config: RunConfig, small: StageRecord) -> list[str]:
    """Memory, and the time of the real run at the measured speed.

    Args:
        config: the real stage's; small: the small stage.
    """
    rate, unit = speed(small.columns, [0, *(start["step"] for start in small.info["resumed"])])
    data, read = small.info["data"], 0.0
    for spec in config.dataset:
        total = len(open_source(spec))
        read += min(total, spec.limit or total) * spec.weight
    rows = read * data["rows"] / data["read"]
    _, steps = step_schedule(config, math.ceil(rows))
    done = steps * config.batch_size if config.max_steps else rows * config.num_train_epochs
    seconds = done * (data["tokens"] / data["rows"] if unit == "tokens" else 1.0) / rate
    return [
        f"memory: {max(small.values('peak_memory_gib')):.1f} GiB at most",
        f"speed: {rate:,.{0 if unit == 'tokens' else 2}f} {unit}/s measured, so the real {config.stage} of about {steps:,} "
        f"steps takes about {duration(seconds)}, evaluations not counted",
    ]


def speed(columns: Columns, began: Sequence[int] = ()) -> tuple[float, str]:
    """(rate, ``tokens`` or ``pairs``) per second over the steps.

    Args:
        columns: of ``metrics.jsonl``.
        began: steps after which a process began; the first step of a process is slow and not counted.
    """
    unit = "pairs" if "num_pairs" in columns else "tokens"
    done = dict(zip(*columns[f"num_{unit}"]))
    seconds = {step: value for step, value in zip(*columns["seconds"]) if step - 1 not in began}
    return sum(done[step] for step in seconds) / sum(seconds.values()), unit
