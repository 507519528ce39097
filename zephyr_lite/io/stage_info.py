"""``stage.json``: what a stage is, and what it was trained from. People edit and copy this file, so it is validated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import UserError
from .words import short

# of stage.json's layout; files of a later format are refused
FORMAT = 1
# keys without which a stage cannot be resumed
TO_GO_ON = ("method", "base.name_or_path", "base.fingerprint", "adapters", "data.fingerprint")


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Base(_Part):
    name_or_path: str | None = None
    fingerprint: str | None = None


class _Data(_Part):
    fingerprint: str | None = None


class _Trl(_Part):
    arguments: dict[str, Any] | None = None
    continues: list[dict[str, Any]] | None = None


class StageMetadata(_Part):
    """The keys of stage.json that are read again; files of older versions lack some, and others may be added."""

    format: int | None = None
    id: str | None = None
    method: Literal["sft", "dpo"] | None = None
    stage: str | None = None
    status: str | None = None
    base: _Base | None = None
    adapters: list[dict[str, Any]] | None = None
    own: dict[str, Any] | None = None
    chat_template: str | None = None
    template_time: str | None = None
    versions: dict[str, str] | None = None
    machine: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    data: _Data | None = None
    eval_data: dict[str, Any] | None = None
    trl: _Trl | None = None
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
    try:
        told = StageMetadata.model_validate(info)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: {key!r} is {short(first['input'], 40)}: {first['msg']}.", hint) from None
    if (told.format or 0) > FORMAT:
        wrote = (told.versions or {}).get("zephyr-lite")
        raise UserError(
            f"{file}: has format {told.format}; this version reads formats up to {FORMAT}"
            + (f" (written by zephyr-lite {wrote})." if wrote else "."),
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
    """Compare the template and tokenizer in a finished stage's ``adapter/`` with those that it was trained with.

    Args:
        info: of the stage.
        stage: its folder.

    Raises:
        UserError: they differ.
    """
    then = {"chat_template": info.get("chat_template"), **(info.get("data") or {})}
    now = {"chat_template": template, "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    for key, name in (("chat_template", "chat template"), ("tokenizer_sha256", "tokenizer")):
        if isinstance(then.get(key), str) and then[key] != now[key]:
            raise UserError(
                f"{stage / 'adapter'}: the {name} there is not the one that {stage.name} was trained with.",
                "The files beside the adapter have changed. Restore them (stage.json has the template's text).",
            )


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of the fast tokenizer's JSON."""
    return text_sha256(tokenizer.backend_tokenizer.to_str())


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
