"""Checkpoints that are damaged, pruned, full of 8-bit state; the metrics log; the reference's progress."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.faults import faulty
from tests.train.test_optim import KINDS, parameters, train
from zephyr_lite.config.load import RunConfig
from zephyr_lite.errors import UserError
from zephyr_lite.io.atomic import MANIFEST
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.train import reference
from zephyr_lite.train.checkpoint import (
    STATE,
    TENSORS,
    MetricsLog,
    prune,
    read_checkpoint,
    resume_point,
    write_checkpoint,
)
from zephyr_lite.train.optim import make_optimizer, make_scheduler
from zephyr_lite.train.reference import ReferenceCache

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
EXTRA = {"best": (1.5, 2), "stale": 0, "total": 12}


def made(folder, kind="adamw_torch", seed=0, step=0, limit=2, best=None, busy=()):
    """What a checkpoint is written of, over fresh parameters."""
    config = RunConfig(optim=kind, learning_rate=1e-2, save_total_limit=limit)
    named = {f"{name}.lora_{'AB'[name in 'ad']}": parameter for name, parameter in parameters(seed).items()}
    optimizer = make_optimizer(config, named)
    mirror = SimpleNamespace(busy=lambda: frozenset(busy))
    return SimpleNamespace(
        stage=SimpleNamespace(dir=StageDir(folder), config=config, mirror=mirror),
        parameters=named,
        optimizer=optimizer,
        scheduler=make_scheduler(config, optimizer, 12),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        step=step,
        best=best,
        before_skips=None,
    )


def steps(state, count, seed=1):
    for step in range(count):
        train(state.optimizer, state.parameters, 1, seed=seed + step)
        state.scheduler.step()
    state.step += count


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A stage with checkpoints of steps 4, 8 and 12."""
    state = made(tmp_path_factory.mktemp("stage"))
    for step in (4, 8, 12):
        steps(state, 4, seed=step)
        write_checkpoint(state, EXTRA)
    return state.stage.dir


@pytest.fixture
def stage(written, tmp_path):
    shutil.copytree(written.path, tmp_path / "sft")
    return StageDir(tmp_path / "sft")


def names(stage):
    return [path.name for path in stage.checkpoints()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_is_restored_bit_for_bit(kind, tmp_path):
    first, again, untouched = (made(tmp_path, kind, seed=seed) for seed in (0, 7, 0))
    for state in (first, untouched):
        steps(state, 3)
    folder = write_checkpoint(first, EXTRA)
    content = read_checkpoint(again, folder)
    assert content["step"] == 3 and content["best"] == [1.5, 2]
    assert again.scheduler.state_dict() == first.scheduler.state_dict()
    for state in (first, again, untouched):  # writing changed nothing, and all continue alike
        steps(state, 2, seed=9)
    for name in first.parameters:
        assert torch.equal(first.parameters[name], again.parameters[name])
        assert torch.equal(first.parameters[name], untouched.parameters[name])


def test_a_checkpoint_of_another_optimizer_is_refused(stage):
    with pytest.raises(
        UserError, match=r"checkpoint-12: holds another optimizer's state than this run's \(it has exp_avg"
    ):
        read_checkpoint(made(stage.path, "adamw_8bit"), stage.path / "checkpoint-12")


# Damage


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place * len(data) // 100] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "state": lambda f: flip(f / STATE, 37),
    "tensor": lambda f: flip(f / TENSORS, 99),
    "missing": lambda f: (f / TENSORS).unlink(),
    "empty manifest": lambda f: (f / MANIFEST).write_bytes(b"\0" * 90),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(stage, damage, said):
    DAMAGE[damage](stage.path / "checkpoint-12")
    assert resume_point(stage).name == "checkpoint-8"
    assert len(said) == 1 and said[0].startswith("checkpoint-12: ") and said[0].endswith("; using checkpoint-8")
    assert names(stage) == ["checkpoint-4", "checkpoint-8"]


def test_all_damaged_is_an_error_not_a_start_from_the_beginning(stage):
    for name, file in (("4", STATE), ("8", TENSORS), ("12", MANIFEST)):
        flip(stage.path / f"checkpoint-{name}" / file, 50)
    with pytest.raises(UserError, match="all of its checkpoints are damaged: checkpoint-12: ") as found:
        resume_point(stage)
    assert "checkpoint-8: state.safetensors has another hash than was written" in found.value.message
    assert len(names(stage)) == 3


# Deleting


@pytest.mark.parametrize(
    ("limit", "best", "busy", "kept"),
    [(3, 4, ("checkpoint-8",), (4, 8, 20)), (1, 4, (), (4, 20)), (1, None, (), (20,))],
)
def test_prune_keeps_the_best_the_last_and_what_is_being_copied(stage, limit, best, busy, kept):
    for step in (16, 20):
        write_checkpoint(made(stage.path, step=step), EXTRA)
    prune(made(stage.path, limit=limit, best=best and (1.0, best), busy=busy))
    assert names(stage) == [f"checkpoint-{step}" for step in kept]


# The metrics log


@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', b"\0" * 4096, b"\xff\xfe\n"])
def test_what_a_power_failure_leaves_of_the_last_lines_is_dropped(tmp_path, tail):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step, "loss": float("inf")})
    with log.path.open("ab") as file:
        file.write(tail)
    assert [r["step"] for r in log.truncate(3)] == [1, 2, 3]
    log.append({"step": 4})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_pending_evaluation_is_removed_from_the_log(tmp_path):
    """Stopped during the evaluation after step 3, resumed, and killed after it was logged."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for record in ({"step": 2, "eval_loss": 3.0}, {"step": 3, "loss": 1.0}, {"step": 3, "eval_loss": 2.0}):
        log.append(record)
    kept = log.truncate(3, pending=True)
    assert [sorted(record) for record in kept] == [["eval_loss", "step"], ["loss", "step"]]
    assert len(log.path.read_text().splitlines()) == 2


# The reference's progress


@pytest.fixture
def computed(monkeypatch):
    """Pairs' sums without a model; the log of what was computed, and a place to fail at."""
    calls = SimpleNamespace(groups=[], dies_at=None)

    def pair_sums(decoder, batch, reference):
        if len(calls.groups) == calls.dies_at:
            raise KeyboardInterrupt
        calls.groups.append(batch.indices)
        return torch.tensor([[-i - 0.1, -2 * i - 0.3] for i in batch.indices], dtype=torch.float32)

    monkeypatch.setattr(reference, "pair_sums", pair_sums)
    monkeypatch.setattr(reference, "collate_pairs", Pairs)
    return calls


class Pairs:
    def __init__(self, indices):
        self.indices = indices

    def to(self, device):
        return self


def fill(cache):
    oom = SimpleNamespace(groups=lambda data, compute: map(compute, [[0, 3], [1], [2, 4], [5]]))
    cache.compute(SimpleNamespace(device="cpu"), SimpleNamespace(examples=range(6)), oom)


def test_an_interrupted_reference_continues_where_it_was(tmp_path, computed):
    whole = ReferenceCache(tmp_path, 6, rows="k")
    fill(whole)
    right = whole.path.read_bytes()
    whole.path.unlink()
    done = []
    for computed.dies_at in (1, 0, 2, None):
        computed.groups.clear()
        cache = ReferenceCache(tmp_path, 6, rows="k")
        assert not cache.load()
        if computed.dies_at is None:
            fill(cache)
        else:
            with pytest.raises(KeyboardInterrupt):
                fill(cache)
        done += computed.groups
    assert done == [[0, 3], [1], [2, 4], [5]]
    assert cache.path.read_bytes() == right and cache.missing == 0
    again = ReferenceCache(tmp_path, 6, rows="k")
    assert again.load() and torch.equal(again.sums, whole.sums)
    assert ReferenceCache(tmp_path, 6, rows="l").path != cache.path


def test_a_checkpoint_of_an_earlier_version_has_no_manifest(stage):
    (stage.path / "checkpoint-12" / MANIFEST).unlink()
    assert resume_point(stage).name == "checkpoint-12"


def test_nothing_is_deleted_before_the_new_one_is_on_the_disk(stage):
    with faulty() as disk:
        state = made(stage.path, step=16, limit=1)
        write_checkpoint(state, EXTRA)
        prune(state)
    calls = [name for name, _ in disk.calls]
    place = max(i for i, (name, path) in enumerate(disk.calls) if name == "replace" and path.endswith("checkpoint-16"))
    assert calls[place + 1] == "fsync" and calls.index("replace", place + 1) > place + 1


@pytest.mark.parametrize("keep", [slice(0, 0), slice(0, -1)])
def test_a_damaged_reference_is_computed_again(tmp_path, computed, keep, said):
    fill(ReferenceCache(tmp_path, 6, rows="k"))
    cache = ReferenceCache(tmp_path, 6, rows="k")
    data = cache.path.read_bytes()
    cache.path.write_bytes(data[keep] + bytes(len(data) - len(data[keep])) if keep.stop else b"")
    assert not cache.load() and cache.missing == 6
    assert said[-1] == f"{cache.path}: is damaged, or of other pairs; it is computed again"
    fill(cache)
    assert ReferenceCache(tmp_path, 6, rows="k").load()
