"""Results of evaluations: one JSON file per kind, which names the evaluated models by hashes."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..io.atomic import make_folder, write_json
from ..io.run_dir import StageDir, text_sha256
from ..model.loaded import LoadedModel

FOLDER = "eval"


def result_folder(live: LoadedModel, out: Path | None = None) -> Path:
    """``eval/`` in a stage's folder, ``NAME-eval`` beside a model's folder, or ``out``.

    Raises:
        UserError: explicit adapters, and no ``out``.
    """
    if out is not None:
        return out
    if live.chain is None:
        folder = Path(live.source)
        return folder.with_name(f"{folder.resolve().name}-{FOLDER}")
    if live.chain.run is None or live.chain.stage is None:
        raise UserError("explicit adapters belong to no run, so there is no folder for the result.", "Add --out FOLDER.")
    return StageDir(live.chain.run / live.chain.stage).path / FOLDER


def claim_folder(folder: Path) -> None:
    """Create the results' folder before the evaluation starts.

    Raises:
        UserError: it cannot be made, or is a file.
    """
    try:
        make_folder(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}.", "Choose another --out.") from None
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file.", "Choose another --out.")


def write_result(folder: Path, kind: str, body: dict[str, Any], live: LoadedModel) -> Path:
    """Write ``folder/KIND.json``: hashes of the evaluated models, then the body; returns the file.

    Raises:
        UserError, OSError: it cannot be written.
    """
    make_folder(folder)
    path = folder / f"{kind}.json"
    chain = live.chain
    head = {
        "kind": kind,
        "version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": live.source,
        "base": {
            **(chain.base if chain else {"name_or_path": live.base.name_or_path}),
            "fingerprint": live.base.fingerprint,
        },
        "adapters": [{"path": str(a.path), "sha256": a.sha256} for a in (chain.adapters if chain else [])],
        "chat_template_sha256": text_sha256(live.template.text),
    }
    write_json(path, {**head, **body})
    return path
