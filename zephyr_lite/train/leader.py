"""What a run's other processes take over from the one that writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data.dataset import TokenizedDataset
from ..errors import UserError
from ..model.base import fetch_base, fingerprint
from .stage import Stage


@dataclass(frozen=True)
class Leader:
    """What the process that writes has found, for those that follow it.

    Attributes:
        info: what stage.json says.
        base: the base's fingerprint.
        dtype: in what it computes.
        forget_best: as ``Stage``'s.
    """

    info: dict[str, Any]
    base: str
    dtype: str
    forget_best: bool

    @classmethod
    def of(cls, stage: Stage) -> Leader:
        base = fingerprint(fetch_base(stage.config.model_name_or_path, stage.config.model_revision))
        return cls(stage.info, base, str(stage.base.dtype).removeprefix("torch."), stage.forget_best)

    def agrees(self, base: str, data: TokenizedDataset, machine: dict[str, Any]) -> None:
        """Raises:
        UserError: this process found another base or other rows, or would compute in another dtype.
        """
        here = machine["host"]
        if base != self.base:
            raise UserError(
                f"{here}: has another base than the process that writes.", "Give all machines the same files."
            )
        if data.fingerprint != self.info["data"]["fingerprint"]:
            raise UserError(
                f"{here}: reads other rows than the process that writes.",
                "Give all machines the same data and the same versions of tokenizers and transformers.",
            )
        if machine["dtype"] != self.dtype:
            raise UserError(
                f"{here}: {machine['processor']} would compute in {machine['dtype']}, the first process in {self.dtype}.",
                "Name one that all cards have: dtype=float16.",
            )
