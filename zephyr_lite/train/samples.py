"""Answers of the model under training to held-out prompts, at the start and at every evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .observer import Sample

if TYPE_CHECKING:
    from .stage import Stage


def draw_samples(stage: Stage, step: int) -> list[Sample]:
    """Answer the first ``config.samples`` held-out prompts greedily with the policy as it is now."""
    return []
