"""Results of evaluations: one JSON file per kind, which identifies the evaluated models by hashes; pictures."""

from __future__ import annotations

import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import UserError
from ..io.atomic import write_json
from ..io.run_dir import text_sha256

if TYPE_CHECKING:  # jobs that ask servers run without torch
    from ..client.local_model import Weights
    from ..model.chain import Chain
    from ..model.loaded import LoadedModel

FOLDER = "eval"


def result_folder(source: str | Path, chain: Chain | None, out: Path | None = None) -> Path:
    """``out``, or ``eval/`` in a stage's folder, or ``NAME-eval`` beside a model's folder."""
    if out is not None:
        return out
    if chain is None:
        return Path(source).with_name(f"{Path(source).resolve().name}-{FOLDER}")
    if chain.run is None or chain.stage is None:
        raise UserError(
            "explicit adapters belong to no run, so there is no folder for the result.", "Add --out FOLDER."
        )
    return chain.run / chain.stage / FOLDER


def head_of(live: LoadedModel) -> dict[str, Any]:
    """The part of a result that identifies a loaded model."""
    return _head(live.source, live.chain, live.base.name_or_path, live.base.fingerprint, live.template.text)


def head_of_weights(weights: Weights, chat_template: str | None) -> dict[str, Any]:
    """``head_of`` a source that is not loaded."""
    from ..model.base import load_tokenizer
    from ..model.loaded import template_of_folder

    folder = weights.tokenizer_from
    template = template_of_folder(folder, load_tokenizer(folder), chat_template)
    fingerprint = next(iter(weights.models.values()))[0]
    return _head(weights.source, weights.chain, str(weights.path), fingerprint, template.text)


def _head(source: str, chain: Chain | None, base: str, fingerprint: str, template: str) -> dict[str, Any]:
    return {
        "source": source,
        "base": {**(chain.base if chain else {"name_or_path": base}), "fingerprint": fingerprint},
        "adapters": [{"path": str(a.path), "sha256": a.sha256} for a in (chain.adapters if chain else [])],
        "chat_template_sha256": text_sha256(template),
    }


def write_result(folder: Path, kind: str, body: dict[str, Any], head: dict[str, Any]) -> Path:
    """Write ``folder/KIND.json``: kind, version and time, then the head and the body; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.json"
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(path, {"kind": kind, "version": __version__, "created": created, **head, **body})
    return path


def have_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def need_matplotlib(what: str, without: str) -> None:
    """Raise a UserError if matplotlib, which is optional, is not installed; ``without`` is the option that leaves the picture
    out."""
    if not have_matplotlib():
        raise UserError(
            f"{what} cannot be drawn: matplotlib is not installed.",
            f'pip install "zephyr-lite[plots]", or leave the picture out with {without}.',
        )
