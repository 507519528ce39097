"""What stage.json has to look like before anything of it is believed: it is a file that people edit, copy and lose half of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

# of stage.json's layout; a version refuses files of a later one
FORMAT = 1


def _object(value: Any) -> str | None:
    return None if isinstance(value, dict) else "an object"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "text"


def _number(value: Any) -> str | None:
    return None if isinstance(value, int) and not isinstance(value, bool) else "an integer"


def _method(value: Any) -> str | None:
    return None if value in ("sft", "dpo") else "sft or dpo"


def _links(value: Any) -> str | None:
    fits = isinstance(value, list) and all(isinstance(link, dict) for link in value)
    return None if fits else "a list of objects with path and sha256"


def _objects(value: Any) -> str | None:
    return None if isinstance(value, list) and all(isinstance(one, dict) for one in value) else "a list of objects"


def _texts(value: Any) -> str | None:
    return None if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()) else "names and texts"


SHAPES: dict[str, Callable[[Any], str | None]] = {
    "format": _number,
    "id": _text,
    "method": _method,
    "stage": _text,
    "status": _text,
    "base": _object,
    "base.name_or_path": _text,
    "base.fingerprint": _text,
    "adapters": _links,
    "own": _object,
    "chat_template": _text,
    "template_time": _text,
    "versions": _texts,
    "machine": _object,
    "plan": _object,
    "data": _object,
    "data.fingerprint": _text,
    "eval_data": _object,
    "trl": _object,
    "trl.arguments": _object,
    "trl.continues": _links,
    "resumed": _objects,
    "result": _object,
}
# what a stage cannot go on without
TO_GO_ON = ("method", "base.name_or_path", "base.fingerprint", "adapters", "data.fingerprint")


def checked(info: dict[str, Any], file: Path, *, needs: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a stage.json, as it is.

    Args:
        needs: keys (``base.fingerprint``) that have to be there.

    Raises:
        UserError: it is of a later format, a key holds something else than a run writes, or is missing.
    """
    version = info.get("format", 0)
    if _number(version) is None and version > FORMAT:
        by = info.get("versions")
        wrote = by.get("zephyr-lite") if isinstance(by, dict) else None
        raise UserError(
            f"{file}: has format {version}, and this version knows formats up to {FORMAT}"
            + (f" (zephyr-lite {wrote} wrote it)." if wrote else "."),
            "Update zephyr-lite, or choose another output_dir.",
        )
    for key, shape in SHAPES.items():
        found, value = _get(info, key)
        if not found and key in needs:
            raise UserError(f"{file}: has no {key!r}.", "Restore the file, or choose another output_dir or stage.")
        if found and (wanted := shape(value)) is not None and not (value is None and key not in needs):
            raise UserError(
                f"{file}: {key!r} is {_shown(value)}, and has to be {wanted}.",
                "Restore the file, or choose another output_dir or stage.",
            )
    return info


def check_rendering(info: dict[str, Any], stage: Path, template: str, tokenizer: Any) -> None:
    """A finished stage's template and tokenizer, as its ``adapter/`` has them now, against those that it was trained with.

    Args:
        info: of the stage.
        stage: its folder.

    Raises:
        UserError: they are others: the files were damaged or replaced.
    """
    then = {"chat_template": info.get("chat_template"), **(info.get("data") or {})}
    now = {"chat_template": template, "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    for key, name in (("chat_template", "chat template"), ("tokenizer_sha256", "tokenizer")):
        if isinstance(then.get(key), str) and then[key] != now[key]:
            raise UserError(
                f"{stage / 'adapter'}: the {name} there is not the one that {stage.name} was trained with.",
                "The files beside the adapter were damaged or replaced. Restore them from a copy (stage.json has the "
                "template's text).",
            )


def tokenizer_sha256(tokenizer: Any) -> str:
    """Of what turns text into tokens."""
    return text_sha256(tokenizer.backend_tokenizer.to_str())


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _get(info: dict[str, Any], key: str) -> tuple[bool, Any]:
    value: Any = info
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
