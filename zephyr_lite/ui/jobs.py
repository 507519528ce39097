"""What the buttons run: commands in processes of their own. Training outlives the page and its server."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from urllib.parse import quote

import gradio as gr
import psutil

from ..config.load import Method
from ..config.resolve import resolve_run
from ..demo import child
from ..errors import UserError
from ..io.atomic import LOCK_FILE
from ..io.run_dir import STAGE_FILE, StageDir
from ..monitor.charts import number
from ..monitor.records import Columns, StageRecord
from ..monitor.report import REPORT

RUNS = Path("runs")  # with all runs of the page
KEYS = (
    *("model_name_or_path", "dataset", "eval_dataset", "output_dir"),
    *("learning_rate", "num_train_epochs", "batch_size", "max_length"),
)
LINES = 14  # of a log that are shown
# stage → the process that this server started last for it
_children: dict[Path, subprocess.Popen[bytes]] = {}


@contextmanager
def errors_on_page() -> Iterator[None]:
    """Show a UserError of a block or function on the page; any other exception has its traceback in the terminal."""
    try:
        yield
    except UserError as error:
        raise gr.Error(error_html(error), duration=None, print_exception=False) from None


def error_html(error: UserError) -> str:
    return escape("\n".join(filter(None, (error.message, error.hint)))).replace("\n", "<br>")


def words_of(*fields: str) -> list[str]:
    """The ``key=value`` words of the page's fields: values of KEYS, other words; an empty field keeps its default."""
    *values, more = fields
    try:
        others = shlex.split(more or "")
    except ValueError as error:
        raise UserError(f"other keys: {error}.", "Write key=value, and quote a value with spaces.") from None
    return [f"{key}={value.strip()}" for key, value in zip(KEYS, values) if value and value.strip()] + others


def run_command(*words: str) -> Iterator[str]:
    """Run a command; yields what it has printed so far, at every line. It is interrupted if the iterator is closed."""
    process, text = child.start(words, stdout=subprocess.PIPE, start_new_session=False), _title(words)
    assert process.stdout is not None
    try:
        yield text
        for line in process.stdout:
            text += _as_shown(line)
            yield text
        if process.wait():
            raise _failure(text)
    finally:
        if process.poll() is None:
            process.terminate()


def start(method: Method, config: str | None, words: list[str]) -> Path:
    """Start training; returns the stage's folder. The output goes to ``RUN/STAGE.log``, after that of earlier starts."""
    refuse_while_training()
    found = resolve_run(method, config, words, fetch=False).config
    stage = StageDir(Path(os.path.relpath(found.output_dir)) / found.stage)
    if stage.run.parent != RUNS:
        raise UserError(f"{stage.run} is not in {RUNS}/, where the page looks for runs.", f"Write {RUNS}/NAME.")
    stage.run.mkdir(parents=True, exist_ok=True)
    command = [method, *(["--config", config] if config else []), *words]
    with log_of(stage.path).open("ab") as log:
        log.write(_title(command).encode())
        log.flush()
        _children[stage.path] = child.start(command, stdout=log)
    return stage.path


def resume(folder: Path) -> Path:
    """Start a stage again with the configuration in its folder; it continues from its last checkpoint."""
    stage = StageDir(folder)
    if not stage.config.is_file():
        raise UserError(f"{folder}: nothing was trained yet that could be resumed.", "Press Start.")
    return start(StageRecord(folder).method, str(stage.config), [])


def stop(folder: Path) -> None:
    """Send SIGTERM to a stage's process: it finishes the step and writes a checkpoint; a second one ends it at once."""
    process = process_of(folder.parent)
    if process is None:
        raise UserError(f"{folder} is not being trained.", "There is nothing to stop.")
    process.terminate()


def process_of(run: Path) -> psutil.Process | None:
    """The process that works on a run, also one that was started in a terminal."""
    for stage, started in _children.items():
        if stage.parent == run and started.poll() is None:
            return psutil.Process(started.pid)  # it may not have locked the folder yet
    lock = run / LOCK_FILE
    with suppress(OSError, ValueError, psutil.NoSuchProcess):
        pid, host = lock.read_text(encoding="utf-8").split()[:2]
        process = psutil.Process(int(pid))
        # a killed process leaves its lock, and another one may have its number since
        if host == platform.node() and process.create_time() < lock.stat().st_mtime:
            return process
    return None


def in_training() -> list[Path]:
    """The runs that a process works on now."""
    runs = {stage.parent for stage in _children} | {lock.parent for lock in RUNS.glob(f"*/{LOCK_FILE}")}
    return sorted(run for run in runs if process_of(run) is not None)


def refuse_while_training() -> None:
    """Raise a UserError while a run is trained: it has planned with all of the memory."""
    if found := in_training():
        raise UserError(f"{found[0]} is being trained and needs the memory.", "Stop it first, or wait for its end.")


def state_of(folder: Path) -> tuple[str, Columns, str, bool]:
    """A stage as it stands: (Markdown, the columns of its metrics, the end of its output, whether it is in training)."""
    stage, log, columns = StageDir(folder), log_text(folder), {}
    started, process = _children.get(folder), process_of(folder.parent)
    if stage.info() is not None:
        record = StageRecord(folder)
        text, columns = _standing(record, stage, process is not None), record.columns
    elif process:
        text = "is starting."
    else:
        text = "was not begun; the output below says why." if log else "is no stage of a run."
    if started is not None and started.poll() not in (None, 0, 130):
        text += f'\n\n<p class="zl-failed">{error_html(_failure(log))}</p>'
    return f"**{folder}** {text}", columns, log, process is not None


def _standing(record: StageRecord, stage: StageDir, running: bool) -> str:
    at = f"at step {number(record.step)}" + ("" if record.total is None else f" of {number(record.total)}")
    if record.complete:
        text = "is complete."
    elif running:
        text = f"is in training, {at}."
    else:
        kept = [path.name for path in stage.checkpoints()]
        text = f"was stopped {at}. Resume continues from {kept[-1] if kept else 'the start'}."
    if (stage.path / REPORT).is_file():
        text += f" [Open the report](/report?stage={quote(str(stage.path))})"
    facts = "; ".join(f"{name} {value}" for name, value in record.facts().items() if name != "steps")
    return f"{text}\n\n{facts}"


def stages() -> list[str]:
    """The stages under runs/, also those that were only started, the one that changed last first."""
    files = [*RUNS.glob("*/*.log"), *RUNS.glob(f"*/[!.]*/{STAGE_FILE}")]
    files.sort(key=lambda file: -file.stat().st_mtime)
    return list(dict.fromkeys(str(file.parent if file.name == STAGE_FILE else file.with_suffix("")) for file in files))


def runs() -> list[str]:
    """The runs with a finished stage, the one that changed last first."""
    finished = [Path(path).parent for path in stages() if StageDir(Path(path)).complete()]
    return list(dict.fromkeys(map(str, finished)))


def log_of(folder: Path) -> Path:
    """The file with the output of a stage that was started on the page."""
    return folder.with_name(f"{folder.name}.log")


def log_text(folder: Path) -> str:
    """The last lines of a stage's output; "" if it was started in a terminal."""
    path = log_of(folder)
    return "".join(map(_as_shown, path.read_bytes().splitlines(keepends=True)[-LINES:])) if path.is_file() else ""


def _title(words: Sequence[str]) -> str:
    return f"$ {shlex.join(['zephyr-lite', *words])}\n"


def _as_shown(line: bytes) -> str:
    """A line as a terminal shows it: progress bars return to its beginning."""
    return line.decode("utf-8", "replace").rstrip("\r\n").rsplit("\r", 1)[-1] + "\n"


def _failure(text: str) -> UserError:
    """The error that a command's output ends with."""
    for word in ("error: ", "failed: "):
        _, found, said = text.rpartition(f"\n{word}")
        if found:
            message, _, hint = said.strip().partition("\n")
            return UserError(message, hint)
    return UserError(text.strip().rpartition("\n")[2])
