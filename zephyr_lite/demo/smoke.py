"""``--smoke``: twenty steps, a kill, a resume, a merge and an answer with the user's configuration, in minutes.

Everything is written to ``NAME-smoke`` next to the run, which is not touched. Every part is a command as a user types it,
in its own process, and the kill is a SIGKILL.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config.load import DatasetSpec, Loaded, Method, RunConfig, dump_config
from ..config.resolve import INHERITED, resolve_run
from ..data.load import load_rows, open_source
from ..errors import Interrupted, UserError
from ..evaluate.rows import stage_config
from ..io.atomic import file_aside, make_folder, remove_tree, write_json, write_text
from ..io.lock import LOCK_FILE, alone
from ..io.run_dir import StageDir
from ..io.text import duration
from ..merge.base_files import BaseFiles
from ..model.chain import chain_of_run
from ..model.files import fetch_base
from .child import Ended, child

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]
MARK = "smoke.json"
LN2 = math.log(2)
STEPS = 20
KILLED_AFTER = 10  # the first checkpoint's step
BELOW_STEPS = 5  # of the SFT stage that a DPO stage needs
MICRO_TOKENS = 8192  # about what a 24 GB card runs at once of a 7B model
HELD_OUT = 8
LOG_LINES = 6  # of a failed command's log that are shown
DISK_RESERVE = 2**30  # bytes that the trial merge leaves free


@dataclass(frozen=True)
class Part:
    """One part of the smoke test.

    Attributes:
        name: ``train, 10 steps``.
        seconds: how long it took.
        found: its result in words.
    """

    name: str
    seconds: float
    found: str


def run_smoke(
    method: Method, config: str | None, overrides: Sequence[str], *, run: Callable[..., Ended] = child
) -> list[Part]:
    """Run the smoke test of a stage.

    Args:
        config, overrides: as the stage's command takes them.
        run: starts a command and waits for it.

    Raises:
        UserError: a part failed; or as the stage itself.
        Interrupted: by a signal.
    """
    loaded = resolve_run(method, config, list(overrides))
    for note in loaded.notes:
        logger.info(note)
    folder = rehearsal_folder(Path(loaded.config.output_dir))
    with alone(folder):
        claim(folder)
        logger.info(f"smoke test of {method} in {folder}; {loaded.config.output_dir} is not touched")
        try:
            return SmokeTest(method, loaded, folder, run).perform()
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; the next --smoke replaces {folder}.") from None


def rehearsal_folder(run: Path) -> Path:
    """``NAME-smoke`` beside ``NAME``. Its stages are one level deeper than a run's, so that it is never the newest run."""
    run = run.expanduser()
    run = run if run.name not in ("", "..") else run.resolve()
    return run.with_name(f"{run.name}-smoke")


def claim(folder: Path) -> None:
    """Empty the folder of an earlier smoke test, and mark it as one.

    Raises:
        UserError: the folder holds something else.
    """
    inside = [path for path in folder.iterdir() if path.name != LOCK_FILE]
    if inside and not (folder / MARK).is_file():
        raise UserError(
            f"{folder} exists and is not a smoke test (it holds {', '.join(sorted(p.name for p in inside)[:3])}).",
            "Move it away, or give another output_dir: the smoke test writes to NAME-smoke beside it.",
        )
    for path in sorted(inside, key=lambda path: path.name == MARK):  # the mark last
        remove_tree(path)
    write_json(folder / MARK, {"status": "running"})
    make_folder(folder / "logs")


class SmokeTest:
    """The smoke test of one stage.

    Args:
        folder: claimed.
        run: starts a command and waits for it.
    """

    def __init__(self, method: Method, loaded: Loaded, folder: Path, run: Callable[..., Ended]) -> None:
        self.method, self.loaded, self.folder, self.start = method, loaded, folder, run
        self.run = folder / "run"
        self.stage = StageDir(self.run / method)
        self.parts: list[Part] = []

    def perform(self) -> list[Part]:
        """All parts, then the time and memory of the real run."""
        begun = time.monotonic()
        config, needs_sft = (self.loaded.config, False) if self.method == "sft" else on_what(self.loaded)
        if needs_sft:
            self._part("an SFT stage below", lambda log: self._train_below(log, config))
        words = self._training(self.method, small_stage(config, self.method, self.run))
        self._part(f"train, {KILLED_AFTER} steps", lambda log: self._train_and_kill(log, words))
        self._part(f"resume to step {STEPS}", lambda log: self._resume(log, words))
        self._part("merge", lambda log: self._merge(log, config))
        self._part("answer", lambda log: self._answer(log, config))
        took = duration(time.monotonic() - begun)
        verdict = [f"smoke test passed in {took}: everything works", *self._outlook(config)]
        parts = [asdict(part) for part in self.parts]
        write_json(self.folder / MARK, {"status": "passed", "method": self.method, "parts": parts, "verdict": verdict})
        for path in (self.folder / "merged", *self.stage.checkpoints()):
            remove_tree(path)
        for line in [*table(self.parts), *verdict]:
            logger.info(line)
        return self.parts

    def _part(self, name: str, work: Callable[[Path], str]) -> None:
        """Run one part.

        Args:
            work: gets the path of the part's log, and returns its result in words.

        Raises:
            UserError: the part's error, with the part's name.
        """
        log = self.folder / "logs" / f"{len(self.parts) + 1}-{name.split(',')[0].replace(' ', '-')}.log"
        logger.info(f"{name} …")
        begun = time.monotonic()
        try:
            found = work(log)
        except UserError as error:
            for line in table(self.parts):
                logger.info(line)
            write_json(self.folder / MARK, {"status": "failed", "at": name, "why": error.message})
            where = f"Its output is in {log}." if log.is_file() else ""
            raise UserError(
                f"the smoke test failed at: {name}. {error.message}", f"{error.hint} {where}".strip()
            ) from None
        self.parts.append(Part(name, round(time.monotonic() - begun, 1), found))

    def _training(self, method: Method, config: RunConfig) -> list[str]:
        file = self.folder / f"{method}.yaml"
        write_text(file, dump_config(config))
        return [method, "--config", str(file)]

    def _command(self, log: Path, *words: str, **options: Any) -> Ended:
        """Run a command, which has to succeed, or to be killed by ``kill_when``."""
        ended = self.start(words, log=log, **options)
        if ended.killed if "kill_when" in options else ended.code == 0:
            return ended
        code = f"exit code {ended.code}" if ended.code >= 0 else f"signal {-ended.code}"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        shown = "".join(f"\n  {line}" for line in lines[-LOG_LINES:])
        raise UserError(f"`zephyr-lite {words[0]}` ended with {code}{shown}")

    def _train_below(self, log: Path, config: RunConfig) -> str:
        below = stage_below(config, self.run, self.folder / "chosen.jsonl")
        self._command(log, *self._training("sft", below))
        return "on chosen answers; the run has none yet"

    def _train_and_kill(self, log: Path, words: list[str]) -> str:
        checkpoint = self.stage.path / f"checkpoint-{KILLED_AFTER}"
        self._command(log, *words, kill_when=checkpoint.is_dir)
        return "killed there (SIGKILL), as by a power cut"

    def _resume(self, log: Path, words: list[str]) -> str:
        """Resume, and check that the second process continued from the checkpoint of the first."""
        self._command(log, *words)
        info, records = self.stage.info() or {}, self._metrics()
        steps = [record["step"] for record in records if "loss" in record]
        losses = [record["loss"] for record in records if "loss" in record]
        began = [start["step"] for start in info.get("resumed", [])]
        assert info.get("status") == "complete" and steps == list(range(1, STEPS + 1)), (info.get("status"), steps)
        assert began and began[-1] >= KILLED_AFTER, began
        if bad := [step for step, loss in zip(steps, losses) if not math.isfinite(loss)]:
            raise UserError(
                f"the loss is not finite at steps {bad}.",
                "Look at the rows (zephyr-lite data show), or lower learning_rate.",
            )
        config = self.loaded.config
        if self.method == "dpo" and config.loss_type == "sigmoid" and not config.label_smoothing:
            assert config.engine != "fused" or abs(losses[0] - LN2) < 1e-3, f"first DPO loss {losses[0]}, not ln 2"
        held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
        told = f"held out {held_out[-1]:.3f}" if held_out else "nothing is held out"
        return f"from checkpoint-{began[-1]}, loss {losses[0]:.3f}, at the end {losses[-1]:.3f}, {told}"

    def _merge(self, log: Path, config: RunConfig) -> str:
        out = self.folder / "merged"
        words = ["merge", "--run", str(self.run), "--stage", self.method, "--out", str(out), "--no-card"]
        size, free = merged_bytes(config), shutil.disk_usage(self.folder).free
        if free < size + DISK_RESERVE:
            self._command(log, *words, "--adapter-only")
            return f"the adapter only: {free / 1e9:.1f} GB are free for {out}, and the model takes {size / 1e9:.1f} GB"
        self._command(log, *words, "--rows", "2")
        return f"{size / 1e9:.1f} GB, removed again"

    def _answer(self, log: Path, config: RunConfig) -> str:
        asked, answer = self.folder / "asked.txt", self.folder / "answer.txt"
        write_text(asked, first_prompt(config, self.method)[:2000])
        words = ["chat", str(self.stage.path), "--temperature", "0", "--max-new-tokens", "48"]
        self._command(log, *words, asked=asked, answer=answer)
        said = " ".join(answer.read_text(encoding="utf-8", errors="replace").split())
        return f"“{said[:60]}{'…' if len(said) > 60 else ''}”" if said else "empty: the first token was the end token"

    def _metrics(self) -> list[Metrics]:
        return [json.loads(line) for line in self.stage.metrics.read_text(encoding="utf-8").splitlines()]

    def _outlook(self, config: RunConfig) -> list[str]:
        """Memory, and the time of the real run at the measured speed."""
        info, records = self.stage.info() or {}, self._metrics()
        lines = []
        if peaks := [record["peak_memory_gib"] for record in records if record.get("peak_memory_gib")]:
            lines.append(f"memory: {max(peaks):.1f} GiB at most")
        found = speed(records, [0, *(start["step"] for start in info.get("resumed", []))])
        if found is not None and (whole := whole_stage(config, info["data"], *found)) is not None:
            rate, unit = found
            lines.append(
                f"speed: {rate:,.{0 if unit == 'tokens' else 2}f} {unit}/s measured, so the real {self.method} of about "
                f"{whole[0]:,} steps takes about {duration(whole[1])}, evaluations not counted"
            )
        return lines


def table(parts: Sequence[Part]) -> list[str]:
    """The parts, with seconds."""
    width = max((len(part.name) for part in parts), default=0)
    return [f"  {part.name:<{width}}  {part.seconds:6.0f} s  {part.found}" for part in parts]


def small_stage(config: RunConfig, method: Method, run: Path, *, steps: int = STEPS) -> RunConfig:
    """The same stage on few rows, for few steps, in another run, without copies or trackers.

    Base, lengths, adapters and optimizer, which decide the memory, stay. A step has as many rows as may run at once.
    """
    longest = config.max_length * (1 if method == "sft" else 2)
    batch = min(config.batch_size, max(1, math.ceil(MICRO_TOKENS / longest)))
    # conversations are shorter than the rows they are packed into
    rows = steps * batch * (2 if method == "sft" else 1)
    return config.model_copy(
        update={
            "output_dir": str(run),
            "stage": method,
            "dataset": [_few(spec, rows) for spec in config.dataset],
            "eval_dataset": [_few(spec, HELD_OUT) for spec in config.eval_dataset],
            "batch_size": batch,
            "max_steps": steps,
            "eval_steps": steps,
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


def _few(spec: DatasetSpec, rows: int) -> DatasetSpec:
    return spec.model_copy(update={"limit": min(rows, spec.limit or rows)})


def on_what(loaded: Loaded) -> tuple[RunConfig, bool]:
    """A DPO stage's configuration with the adapters below it, and whether an SFT stage has to be trained first."""
    config = loaded.config
    if config.adapters:
        return config, False
    below = StageDir(Path(config.output_dir) / "sft")
    if below.complete():
        chain = chain_of_run(config.output_dir, stage="sft")
        return config.model_copy(update={"adapters": [str(adapter.path) for adapter in chain.adapters]}), False
    if below.config.is_file():  # SFT is still being trained: DPO will use its base
        theirs = stage_config(below)
        taken = {key: getattr(theirs, key) for key in INHERITED if key not in loaded.given}
        config = config.model_copy(update=taken)
    return config, True


def stage_below(config: RunConfig, run: Path, rows: Path) -> RunConfig:
    """An SFT stage for a DPO stage to start from: a few steps on its own chosen answers, which are written to ``rows``."""
    few = small_stage(config, "dpo", run, steps=BELOW_STEPS)
    pairs = load_rows(few.dataset, "dpo", seed=config.seed, system=config.system)
    with file_aside(rows) as file:
        for pair in pairs.values():
            file.write(json.dumps({"messages": [*pair["prompt"], *pair["chosen"]], "tools": pair.get("tools")}) + "\n")
    keys = (*INHERITED, "engine", "seed", "chat_template", "max_length", "memory")
    shared = {key: getattr(config, key) for key in keys}
    whole = RunConfig(**{**shared, "dataset": [DatasetSpec(path=str(rows))], "eval_dataset": []})
    return small_stage(whole, "sft", run, steps=BELOW_STEPS)


def first_prompt(config: RunConfig, method: Method) -> str:
    """The first user turn of the first row."""
    specs = [_few(spec, 1) for spec in config.dataset[:1]]
    row = next(load_rows(specs, method, seed=config.seed).values())
    turns = row["messages" if method == "sft" else "prompt"]
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    return asked[0] if asked else turns[0]["content"]


def merged_bytes(config: RunConfig) -> int:
    """Bytes of the merged model on the disk."""
    files = BaseFiles(config.model_name_or_path, fetch_base(config.model_name_or_path, config.model_revision))
    return sum(entry.nbytes for entry in files.entries.values())


def speed(metrics: Sequence[Metrics], began: Sequence[int]) -> tuple[float, str] | None:
    """(rate, ``tokens`` or ``pairs``) per second over the steps, without the first one of each process.

    Args:
        metrics: the records of ``metrics.jsonl``.
        began: the steps after which a process began.
    """
    steps = [m for m in metrics if "loss" in m and m["step"] - 1 not in began and m.get("seconds")]
    seconds = sum(m["seconds"] for m in steps)
    unit = "pairs" if any("pairs_per_second" in m for m in steps) else "tokens"
    done = sum(m.get(f"num_{unit}", 0.0) for m in steps)
    return (done / seconds, unit) if seconds and done else None


def whole_stage(config: RunConfig, data: dict[str, Any], rate: float, unit: str) -> tuple[int, float] | None:
    """(steps, seconds) of the real stage at a measured rate.

    Args:
        config: the real stage's.
        data: the rows of the small stage, from its ``stage.json``.
    """
    if not data.get("read") or not data.get("rows"):
        return None
    read = 0.0
    for spec in config.dataset:
        total = len(open_source(spec))
        read += min(total, spec.limit or total) * spec.weight
    rows = read * data["rows"] / data["read"]
    steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * math.ceil(rows / config.batch_size)))
    done = steps * config.batch_size if config.max_steps else rows * config.num_train_epochs
    return steps, done * (data["tokens"] / data["rows"] if unit == "tokens" else 1.0) / rate
