"""``--smoke``: twenty steps, a kill, a resume, merge and an answer, on the user's own card and data, before the night is spent.

Everything lies in ``NAME-smoke`` beside the run, which is never touched. Every part is a command as a user gives it, in a
process of its own; the kill is a real one.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...config.load import Loaded, Method, RunConfig, dump_config
from ...config.resolve import resolve_run
from ...errors import Interrupted, UserError
from ...io.atomic import make_folder, remove_tree, write_json, write_text
from ...io.lock import LOCK_FILE, alone
from ...io.run_dir import StageDir, read_json
from ...io.words import duration
from .child import Ended, child
from .small import (
    KILLED_AFTER,
    STEPS,
    first_prompt,
    merged_bytes,
    on_what,
    small_stage,
    speed,
    stage_below,
    whole_stage,
)

Say = Callable[[str], None]
MARK = "smoke.json"
LN2 = math.log(2)
LAST_WORDS = 6  # lines of a failed part's log that are shown
RESERVE = 2**30  # bytes of the disk that a merge for trial leaves free


@dataclass(frozen=True)
class Part:
    """What was rehearsed.

    Attributes:
        name: in a word or two.
        seconds: it took.
        found: what there is to say of it.
    """

    name: str
    seconds: float
    found: str


def run_smoke(
    method: Method,
    config: str | None,
    overrides: Sequence[str],
    *,
    say: Say,
    run: Callable[..., Ended] = child,
) -> list[Part]:
    """Rehearse a stage.

    Args:
        config, overrides: as the stage's command takes them.
        run: starts a command and waits for it (``child.child``).

    Returns:
        what was done.

    Raises:
        UserError: a part failed; or as the stage itself.
        Interrupted: a signal came.
    """
    loaded = resolve_run(method, config, list(overrides), say=say)
    for note in loaded.notes:
        say(note)
    folder = rehearsal_folder(Path(loaded.config.output_dir))
    with alone(folder, say):
        claim(folder)
        say(f"rehearsing {method} in {folder}; {loaded.config.output_dir} is not touched")
        try:
            return Rehearsal(method, loaded, folder, say, run).perform()
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; {folder} may be deleted, and the next --smoke replaces it.") from None


def rehearsal_folder(run: Path) -> Path:
    """``NAME-smoke`` beside ``NAME``. The rehearsed stages lie a level deeper than those of runs, so that nothing which
    looks for the newest run finds them."""
    run = run.expanduser()
    run = run if run.name not in ("", "..") else run.resolve()
    return run.with_name(f"{run.name}-smoke")


def claim(folder: Path) -> None:
    """Empty the folder of an earlier rehearsal, and mark it as one.

    Raises:
        UserError: it is none.
    """
    inside = [path for path in folder.iterdir() if path.name != LOCK_FILE]
    if inside and not (folder / MARK).is_file():
        raise UserError(
            f"{folder} exists and is no rehearsal (it holds {', '.join(sorted(p.name for p in inside)[:3])}).",
            "Move it away, or give another output_dir: the rehearsal lies beside it, in NAME-smoke.",
        )
    # the mark goes last: what is left when this is interrupted is still a rehearsal
    for path in sorted(inside, key=lambda path: path.name == MARK):
        remove_tree(path)
    write_json(folder / MARK, {"status": "running"})
    make_folder(folder / "logs")


class Rehearsal:
    """One stage's.

    Args:
        folder: claimed.
        run: starts a command and waits for it.
    """

    def __init__(self, method: Method, loaded: Loaded, folder: Path, say: Say, run: Callable[..., Ended]) -> None:
        self.method, self.loaded, self.folder, self.say, self.start = method, loaded, folder, say, run
        self.run = folder / "run"
        self.stage = StageDir(self.run / method)
        self.parts: list[Part] = []

    def perform(self) -> list[Part]:
        """All parts, then what they say of the real run."""
        begun = time.monotonic()
        config, alone_yet = (self.loaded.config, False) if self.method == "sft" else on_what(self.loaded)
        if alone_yet:
            with self._part("an SFT stage below") as (log, found):
                below = stage_below(config, self.run, self.folder / "chosen.jsonl")
                self._command(log, *self._training("sft", below))
                found.append("on chosen answers; the run has none yet")
        words = self._training(self.method, small_stage(config, self.method, self.run))
        with self._part(f"train, {KILLED_AFTER} steps") as (log, found):
            found.append(self._killed(log, words))
        with self._part(f"go on to step {STEPS}") as (log, found):
            self._command(log, *words)
            found.append(self._went_on())
        with self._part("merge") as (log, found):
            found.append(self._merge(log, config))
        with self._part("answer") as (log, found):
            found.append(self._answer(log, config))
        took = time.monotonic() - begun
        verdict = [f"rehearsed in {duration(took)}: everything works", *self._outlook(config)]
        write_json(
            self.folder / MARK,
            {
                "status": "passed",
                "method": self.method,
                "parts": [asdict(part) for part in self.parts],
                "verdict": verdict,
            },
        )
        remove_tree(self.folder / "merged")
        for checkpoint in self.stage.checkpoints():
            remove_tree(checkpoint)
        for line in [*table(self.parts), *verdict]:
            self.say(line)
        return self.parts

    @contextmanager
    def _part(self, name: str) -> Iterator[tuple[Path, list[str]]]:
        """One part: where its log goes, and a list for what is found.

        Raises:
            UserError: what went wrong, with the part's name.
        """
        log = self.folder / "logs" / f"{len(self.parts) + 1}-{name.split(',')[0].replace(' ', '-')}.log"
        self.say(f"{name} …")
        begun, found = time.monotonic(), list[str]()
        try:
            yield log, found
        except UserError as error:
            for line in table(self.parts):
                self.say(line)
            write_json(self.folder / MARK, {"status": "failed", "at": name, "why": error.message})
            where = f"What it said is in {log}." if log.is_file() else ""
            raise UserError(
                f"the rehearsal failed at: {name}. {error.message}", f"{error.hint} {where}".strip()
            ) from None
        self.parts.append(Part(name, round(time.monotonic() - begun, 1), "; ".join(found)))

    def _training(self, method: Method, config: RunConfig) -> list[str]:
        file = self.folder / f"{method}.yaml"
        write_text(file, dump_config(config))
        return [method, "--config", str(file)]

    def _command(self, log: Path, *words: str, **files: Path) -> Ended:
        """Raises:
        UserError: it failed; with its last words.
        """
        ended = self.start(words, log=log, **files)
        if ended.code != 0:
            raise UserError(f"`zephyr-lite {words[0]}` ended with {_code(ended.code)}{_last_words(log)}")
        return ended

    def _killed(self, log: Path, words: Sequence[str]) -> str:
        first = self.stage.path / f"checkpoint-{KILLED_AFTER}"
        ended = self.start(words, log=log, kill_when=first.is_dir)
        if not ended.killed and ended.code == 0:
            raise UserError(f"{STEPS} steps were over before the process could be killed.", "Try again.")
        if not ended.killed:
            raise UserError(f"`zephyr-lite {words[0]}` ended with {_code(ended.code)}{_last_words(log)}")
        return "killed there (SIGKILL), as a power cut would"

    def _went_on(self) -> str:
        """Whether the second process went on where the first one was killed, and what it came to."""
        info = self.stage.info() or {}
        records = self._metrics()
        steps = [record["step"] for record in records if "loss" in record]
        began = [start.get("step", 0) for start in info.get("resumed", [])]
        if info.get("status") != "complete" or steps != list(range(1, STEPS + 1)):
            raise UserError(f"the stage is {info.get('status')} after steps {steps}.", "That is a fault of ours.")
        if not began or began[-1] < KILLED_AFTER:
            raise UserError(f"it began again at step {began[-1] if began else 0}.", "That is a fault of ours.")
        losses = [record["loss"] for record in records if "loss" in record]
        if not all(math.isfinite(loss) for loss in losses):
            raise UserError(
                f"losses that are not finite at steps {[s for s, x in zip(steps, losses) if not math.isfinite(x)]}.",
                "Look at the rows (zephyr-lite data show), or lower learning_rate.",
            )
        told = [f"from checkpoint-{began[-1]}", f"loss {losses[0]:.3f}, at the end {losses[-1]:.3f}"]
        config = self.loaded.config
        starts_at_ln2 = self.method == "dpo" and config.loss_type == "sigmoid" and not config.label_smoothing
        if starts_at_ln2 and config.engine == "fused" and abs(losses[0] - LN2) > 1e-3:
            raise UserError(
                f"the first loss is {losses[0]:.4f}; policy and reference begin as one, so it should be ln 2 = 0.6931.",
                "That is a fault of ours: please report it.",
            )
        held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
        told.append(f"held out {held_out[-1]:.3f}" if held_out else "nothing is held out")
        return ", ".join(told)

    def _merge(self, log: Path, config: RunConfig) -> str:
        out = self.folder / "merged"
        words = ["merge", "--run", str(self.run), "--stage", self.method, "--out", str(out), "--no-card"]
        size, free = merged_bytes(config), shutil.disk_usage(self.folder).free
        if free < size + RESERVE:
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
        return f"“{said[:60]}{'…' if len(said) > 60 else ''}”" if said else "none: the first token was the end"

    def _metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stage.metrics.read_text(encoding="utf-8").splitlines()]

    def _outlook(self, config: RunConfig) -> list[str]:
        """What the rehearsal says of the real run."""
        info, records = read_json(self.stage.path / "stage.json") or {}, self._metrics()
        lines = []
        peaks = [record["peak_memory_gib"] for record in records if record.get("peak_memory_gib")]
        if peaks:
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


def _code(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _last_words(log: Path) -> str:
    """The end of what a command said."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_WORDS:] if log.is_file() else []
    return ":\n" + "\n".join(f"  {line}" for line in lines) if lines else ", and said nothing."
