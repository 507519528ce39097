"""The layout of a run's folder, and its ``stage.json``.

    runs/NAME/STAGE/  config.yaml  stage.json  metrics.jsonl  checkpoint-N/  adapter/  delta/

``adapter/`` is the adapter to load. For a stage trained on top of frozen adapters it is the whole chain composed into
one PEFT adapter, and ``delta/`` is the stage's own part; otherwise it is the stage's own adapter.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..errors import UserError
from .atomic import make_folder, refuse_others, sweep, write_json
from .text import check_values, duration, read_object

logger = logging.getLogger(__name__)

STAGE_FILE = "stage.json"
# of stage.json's layout; files of a later format are refused
FORMAT = 1
# seconds before the newest run within which another one may be meant as well
RECENT = 86400.0
# keys without which a stage cannot be resumed
TO_GO_ON = ("method", "base.name_or_path", "base.fingerprint", "adapters", "data.fingerprint")


class StageDir:
    """One stage's folder, ``output_dir/stage``, and the places in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, path.parent
        self.adapter, self.delta = path / "adapter", path / "delta"
        self.config, self.metrics, self.samples = path / "config.yaml", path / "metrics.jsonl", path / "samples.jsonl"

    @property
    def own(self) -> Path:
        """The stage's own adapter: ``delta/`` where there is one."""
        return self.delta if self.delta.is_dir() else self.adapter

    def info(self) -> dict[str, Any] | None:
        """The content of stage.json, or None where there is none."""
        return read_json(self.path / STAGE_FILE)

    def complete(self) -> bool:
        info = self.info()
        return info is not None and info.get("status") == "complete"

    def write_info(self, info: dict[str, Any]) -> None:
        write_json(self.path / STAGE_FILE, info)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name[11:]))

    def claim(self) -> None:
        """Make the folder, and remove temporary files of killed processes from it."""
        sweep(self.path)
        hint = "Choose another output_dir or stage, or move that folder away."
        refuse_others(self.path, (self.path / STAGE_FILE).is_file(), "a stage of a run", hint)
        make_folder(self.path, "output_dir")


def newest_run(
    root: Path = Path("runs"), *, stage: str | None = None, complete: bool = True, option: str = ""
) -> Path | None:
    """The run under ``root`` that changed last, for a command that names none; prints which one it is.

    Args:
        stage: only runs with a stage of this name.
        complete: only runs in which it (or, without a name, any stage) is complete.
        option: what the command's words for a run begin with: ``--run ``, ``output_dir=``, or nothing.

    Raises:
        UserError: another run changed within a day of it.
    """
    changed: dict[Path, float] = {}
    own_names = {run.resolve(): run for run in sorted(root.glob("*"), key=Path.is_symlink, reverse=True)}
    for run in own_names.values():  # a link to another run of the folder is not one more
        stages = stages_of(run)
        with suppress(UserError, OSError):  # a broken stage.json of another run
            if any(stage in (None, each.path.name) and (not complete or each.complete()) for each in stages):
                changed[run] = max((each.path / STAGE_FILE).stat().st_mtime for each in stages)
    recent = sorted((run for run in changed if changed[run] > max(changed.values()) - RECENT), key=changed.__getitem__)
    if len(recent) > 1:
        now, wide = time.time(), max(len(str(run)) for run in recent)
        lines = [f"  {option}{run!s:{wide}}  changed {duration(now - changed[run])} ago" for run in recent[:-10:-1]]
        raise UserError(
            f"which run? These {len(recent)} changed within a day:\n" + "\n".join(lines),
            f"Add one to the command, such as {option}{recent[-1]}.",
        )
    if recent:
        logger.warning(f"{recent[0]}, the newest run; {option}runs/NAME chooses another", extra={"stderr": True})
    return recent[0] if recent else None


def stages_of(run: Path) -> list[StageDir]:
    """A run's stages, by name, without the temporary folders of killed processes (``.NAME.xxxxxxxx``)."""
    files = sorted(run.glob(f"*/{STAGE_FILE}"))
    return [StageDir(file.parent) for file in files if not file.parent.name.startswith(".")]


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object, or None if there is no such file."""
    if not path.exists():
        return None
    return read_object(path, hint="Restore the file, or start in another folder.")


def cache_dir() -> Path:
    """The cache folder: ``$ZEPHYR_LITE_CACHE``, or ``$XDG_CACHE_HOME/zephyr-lite``, or ``~/.cache/zephyr-lite``."""
    if own := os.environ.get("ZEPHYR_LITE_CACHE"):
        return Path(own).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "zephyr-lite"


class StageMetadata(BaseModel):
    """The keys of stage.json that are read again; people edit and copy the file. Files of older versions lack some keys, and
    others may be added."""

    model_config = ConfigDict(extra="allow", strict=True)

    format: int | None = None
    id: str | None = None
    method: Literal["sft", "dpo"] | None = None
    stage: str | None = None
    status: str | None = None
    base: dict[str, Any] | None = None
    adapters: list[dict[str, Any]] | None = None
    own: dict[str, Any] | None = None
    chat_template: str | None = None
    template_time: str | None = None
    versions: dict[str, str] | None = None
    machine: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    eval_data: dict[str, Any] | None = None
    trl: dict[str, Any] | None = None
    resumed: list[dict[str, Any]] | None = None
    result: dict[str, Any] | None = None


def checked(info: dict[str, Any], file: Path, *, needs: Sequence[str] = ()) -> dict[str, Any]:
    """Validate the content of a stage.json, and return it unchanged.

    Args:
        needs: keys (``base.fingerprint``) that must be there.

    Raises:
        UserError: it has a later format, a value of the wrong type, or lacks a key.
    """
    hint = "Restore the file, or choose another output_dir or stage."
    told = check_values(StageMetadata, info, file, hint)
    if (told.format or 0) > FORMAT:
        raise UserError(
            f"{file}: has format {told.format}; this version reads formats up to {FORMAT} (written by zephyr-lite "
            f"{(told.versions or {}).get('zephyr-lite')}).",
            "Update zephyr-lite, or choose another output_dir.",
        )
    for key in needs:
        value: Any = info
        for part in key.split("."):
            value = (value or {}).get(part)
        if value is None:
            raise UserError(f"{file}: has no {key!r}.", hint)
    return info


def check_rendering(info: dict[str, Any], stage: Path, template: str, tokenizer: Any) -> None:
    """Compare the template and tokenizer in a finished stage's ``adapter/`` with those that it was trained with."""
    trained_with = (info.get("data") or {}).get("tokenizer_sha256")
    for name, then, now in (
        ("chat template", info.get("chat_template"), template),
        ("tokenizer", trained_with, tokenizer_sha256(tokenizer)),
    ):
        if then is not None and then != now:
            raise UserError(
                f"{stage / 'adapter'}: the {name} there is not the one that {stage.name} was trained with.",
                "The files beside the adapter have changed. Restore them (stage.json has the template's text).",
            )


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of the fast tokenizer's JSON."""
    return text_sha256(tokenizer.backend_tokenizer.to_str())


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
