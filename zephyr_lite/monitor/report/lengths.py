"""How long a stage's rows are: counted once, when training begins, because afterwards no file says it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...io.atomic import write_json
from .read import LENGTHS

if TYPE_CHECKING:
    from ...data.dataset import TokenizedDataset
    from ...train.stage import Stage

BINS = 32


def write_lengths(stage: Stage) -> Path:
    """Write ``lengths.json`` into a stage's folder.

    Raises:
        OSError: it cannot be written.
    """
    parts = {"training": stage.data, "held-out": stage.eval_data}
    told: dict[str, Any] = {"format": 1, "unit": "conversation" if stage.method == "sft" else "pair"}
    told.update({name: counted(data) for name, data in parts.items() if data is not None})
    path = stage.dir.path / LENGTHS
    write_json(path, told)
    return path


def counted(data: TokenizedDataset) -> dict[str, Any]:
    """Histograms of the tokens that examples take in a batch and of the supervised ones among them.

    Returns:
        ``length`` and ``supervised``: ``edges`` [BINS + 1] (the last bin has both of its edges), ``whole`` and ``cut``
        [BINS]: examples as they were, and cut to ``max_length``; ``mean``, ``median``, ``p95``, ``longest``.
    """
    table = data.examples.columns("supervised", "cut")[:]
    was_cut = table.column("cut").to_numpy() > 0
    values = {"length": np.asarray(data.lengths), "supervised": table.column("supervised").to_numpy()}
    return {name: _histogram(each, was_cut) for name, each in values.items()}


def _histogram(values: np.ndarray, was_cut: np.ndarray) -> dict[str, Any]:
    edges = np.linspace(0, max(int(values.max()), BINS), BINS + 1)
    return {
        "edges": [round(float(edge), 2) for edge in edges],
        "whole": np.histogram(values[~was_cut], edges)[0].tolist(),
        "cut": np.histogram(values[was_cut], edges)[0].tolist(),
        "mean": round(float(values.mean()), 1),
        "median": float(np.median(values)),
        "p95": round(float(np.quantile(values, 0.95)), 1),
        "longest": int(values.max()),
    }
