"""The speed of earlier runs on this machine as a share of the predicted one: ``measured.json`` in the cache."""

from __future__ import annotations

import logging

from pydantic import TypeAdapter

from ..io.atomic import write_json
from ..io.run_dir import cache_dir
from .workload import Workload

logger = logging.getLogger(__name__)
# the newest runs of a kind that count
RUNS = 5


def _kind(machine: str, job: Workload) -> str:
    dtype = str(job.dtype).removeprefix("torch.")
    return (
        f"{machine}, engine {job.engine}, {dtype}, {job.shape.layers} layers of {job.shape.hidden}{', int8' * job.int8}"
    )


def earlier_runs(machine: str, job: Workload) -> list[float]:
    """Measured over predicted speed of the last runs of a base of this size on a machine, oldest first."""
    return _read().get(_kind(machine, job), [])


def add_run(machine: str, job: Workload, ratio: float) -> None:
    """Record a run's measured over predicted speed."""
    file = cache_dir() / "measured.json"
    found, kind = _read(), _kind(machine, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**found, kind: [*found.get(kind, []), round(ratio, 4)][-RUNS:]})


def _read() -> dict[str, list[float]]:
    file = cache_dir() / "measured.json"
    try:
        return TypeAdapter(dict[str, list[float]]).validate_json(file.read_bytes()) if file.exists() else {}
    except ValueError:
        logger.warning(f"{file}: damaged, so earlier runs do not correct the plan; the next run starts it anew")
        return {}
