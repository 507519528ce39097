"""The speed of earlier runs on this machine as a share of the predicted one: ``measured.json`` in the cache."""

from __future__ import annotations

from ..io.atomic import write_json
from ..io.run_dir import cache_dir, read_json
from .workload import Workload

# the newest runs of a kind that count
RUNS = 5


def _kind(machine: str, job: Workload) -> str:
    dtype = str(job.dtype).removeprefix("torch.")
    return (
        f"{machine}, engine {job.engine}, {dtype}, {job.shape.layers} layers of {job.shape.hidden}{', int8' * job.int8}"
    )


def earlier_runs(machine: str, job: Workload) -> list[float]:
    """Measured over predicted speed of the last runs of a base of this size on a machine, oldest first."""
    return list((read_json(cache_dir() / "measured.json") or {}).get(_kind(machine, job), []))


def add_run(machine: str, job: Workload, ratio: float) -> None:
    """Record a run's measured over predicted speed."""
    file = cache_dir() / "measured.json"
    found, ratios = read_json(file) or {}, [*earlier_runs(machine, job), round(ratio, 4)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**found, _kind(machine, job): ratios[-RUNS:]})
