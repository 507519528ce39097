"""The models of a local folder: told apart without loading anything, and made from one base that is loaded once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..chat import Chat
    from ..model.chain import Chain


class Weights:
    """A run's folder, a stage's, a model's, or explicit adapters on a base (as ``live.open_live``).

    Attributes:
        path: the folder; None: the newest run under ``runs/``, or explicit adapters.
        chain: where the adapters come from; None for a model's folder.
        models: model → the hashes that tell it from others, its base's first. The names are those of ``Live.models``.

    Raises:
        UserError: it is none of these, or a stage of it is not complete or was changed.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        stage: str | None = None,
        adapters: Sequence[str] = (),
        base: str | None = None,
        chat_template: str | None = "auto",
    ) -> None:
        # imported here: torch is heavy, and a desk of servers needs none
        from ..model.base import fingerprint
        from ..model.loaded import WHOLE

        self.path = None if path is None else Path(path).expanduser()
        self._stage, self._adapters, self._base, self._chat_template = stage, list(adapters), base, chat_template
        self._chat: Chat | None = None
        if self.path is not None and not self.path.is_dir():
            raise UserError(
                f"{self.path}: no such folder.", "Give a run's folder (runs/NAME), a stage's, or a model's."
            )
        if adapters and (path is not None or stage is not None):
            raise UserError("--adapter names the chain itself; a run or a stage names one too.", "Give one of the two.")
        self.chain = None if self._whole else self._read_chain()
        if self.chain is None:
            assert self.path is not None
            if stage is not None or base is not None:
                option = "stages" if base is None else "base"
                raise UserError(
                    f"{self.path}: is a model's folder, which has no {option}.", "Leave --stage and --base out."
                )
            self.models = {WHOLE: [fingerprint(self.path)]}
        else:
            self.models = _models(self.chain)

    @property
    def source(self) -> str:
        """As ``Live.source``: a stage's folder, a model's, or the adapters."""
        if self.chain is None:
            return str(self.path)
        if self.chain.run is not None and self.chain.stage is not None:
            return str(self.chain.run / self.chain.stage)
        return " + ".join(str(adapter.path) for adapter in self.chain.adapters)

    def is_same(self, other: Weights) -> bool:
        """Whether both hold the same models by the same names, and talk to them by the same template."""
        return list(self.models.items()) == list(other.models.items()) and self.identity() == other.identity()

    @property
    def _whole(self) -> bool:
        return self.path is not None and (self.path / "config.json").is_file()

    def _read_chain(self) -> Chain:
        from ..io.run_dir import STAGE_FILE
        from ..model.chain import chain_of_adapters, chain_of_run

        if self._adapters:
            return chain_of_adapters(self._adapters, self._base)
        if self.path is not None and (self.path / STAGE_FILE).is_file():
            return chain_of_run(self.path.parent, stage=self._stage or self.path.name, base=self._base)
        return chain_of_run(self.path, stage=self._stage, base=self._base)

    @cached_property
    def tokenizer_from(self) -> Path:
        """The folder whose tokenizer and chat template are used."""
        from ..model.fetch import fetch_base

        if self.chain is None:
            assert self.path is not None
            return self.path
        if self.chain.tokenizer_from is not None:
            return self.chain.tokenizer_from
        return fetch_base(self.chain.base["name_or_path"], self.chain.base.get("revision", "main"), weights=False)

    def identity(self, model: str | None = None) -> str:
        """What tells a model from others in a journal: its weights and its template. None: the model at the top.

        Raises:
            UserError: there is no such model here.
        """
        if model is not None and model not in self.models:
            raise UserError(
                f"{self.source} has no model {model!r}; it has {', '.join(self.models)}.", "Name one of these."
            )
        digest = hashlib.sha256()
        known = self.models[list(self.models)[-1] if model is None else model]
        # a folder's fingerprint alone stands without the line's end: journals know it so
        digest.update(known[0].encode() if self.chain is None else "".join(f"{part}\n" for part in known).encode())
        for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            file = self.tokenizer_from / name
            digest.update(file.read_bytes() if file.is_file() else b"")
        choice = self._chat_template
        if choice not in (None, "auto"):
            assert choice is not None
            file = Path(choice).expanduser()
            digest.update(file.read_bytes() if file.is_file() else choice.encode())
        return f"local {digest.hexdigest()}"

    def chat(self) -> Chat:
        """Load what is there; the second call gives the same.

        Raises:
            UserError: as ``live.open_live``.
        """
        if self._chat is None:
            from .. import chat

            if self._adapters:
                from ..model.loaded import open_live

                live = open_live(adapters=self._adapters, base=self._base, chat_template=self._chat_template)
                self._chat = chat.Chat(live)
            else:
                settings: dict[str, Any] = {"base": self._base} if self._base is not None else {}
                if self._chat_template != "auto":
                    settings["chat_template"] = self._chat_template
                path = self.path
                if self.chain is not None:  # the one that ``models`` tells of, whatever has been trained meanwhile
                    path, settings["stage"] = self.chain.run, self.chain.stage
                self._chat = chat.load_chat(path, **settings)
        return self._chat

    def forget(self) -> None:
        """Let go of what was loaded."""
        self._chat = None


def _models(chain: Chain) -> dict[str, list[str]]:
    """As ``live.live_of`` names them, without a model in memory."""
    from ..model.adapters import resolve_frozen_names
    from ..model.base import fingerprint
    from ..model.loaded import BASE

    name = chain.base["name_or_path"]
    known = chain.base.get("fingerprint")
    if known is None and Path(name).expanduser().is_dir():  # explicit adapters
        known = fingerprint(Path(name).expanduser())
    parts = [str(known if known is not None or chain.run is not None else f"{name}@{chain.base.get('revision')}")]
    models = {BASE: list(parts)}
    for place, adapter in zip(resolve_frozen_names([a.path for a in chain.adapters]), chain.adapters):
        parts.append(str(adapter.sha256))
        models[place if place != BASE else f"{place}_adapter"] = list(parts)
    return models
