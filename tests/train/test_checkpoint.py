"""Checkpoints that are damaged, pruned, full of 8-bit state; the metrics log; the reference's progress."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.faults import faulty
from tests.train.test_optim import KINDS, parameters, train
from zephyr_lite.config.load import RunConfig
from zephyr_lite.errors import UserError
from zephyr_lite.io.atomic import MANIFEST, manifest_fault, write_manifest
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.train import reference
from zephyr_lite.train.checkpoint import (
    STATE,
    TENSORS,
    Checkpoint,
    MetricsLog,
    checkpoint_fault,
    prune,
    resume_point,
)
from zephyr_lite.train.optim import make_optimizer, make_scheduler
from zephyr_lite.train.reference import ReferenceCache

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
EXTRA = {"best": (1.5, 2), "stale": 0, "total": 12}


def made(kind="adamw_torch", seed=0):
    """A checkpoint's parts over fresh parameters."""
    config = RunConfig(optim=kind, learning_rate=1e-2)
    named = parameters(seed)
    optimizer = make_optimizer(config, named)
    scheduler = make_scheduler(config, optimizer, 12)
    return Checkpoint(named, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False))


def steps(of: Checkpoint, count: int, seed: int = 1) -> None:
    for step in range(count):
        train(of.optimizer, of.parameters, 1, seed=seed + step)
        of.scheduler.step()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A stage with checkpoints of steps 4, 8 and 12."""
    stage = StageDir(tmp_path_factory.mktemp("stage"))
    parts = made()
    for step in (4, 8, 12):
        steps(parts, 4, seed=step)
        parts.write(stage, step, EXTRA)
    return stage


@pytest.fixture
def stage(written, tmp_path):
    shutil.copytree(written.path, tmp_path / "sft")
    return StageDir(tmp_path / "sft")


def names(stage: StageDir) -> list[str]:
    return [path.name for path in stage.checkpoints()]


# What a checkpoint holds


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_comes_back_bit_for_bit(kind, tmp_path):
    first, again, untouched = made(kind), made(kind, seed=7), made(kind)
    for parts in (first, untouched):
        steps(parts, 3)
    folder = first.write(StageDir(tmp_path), 3, EXTRA)
    state = again.read(folder)
    assert state["step"] == 3 and state["best"] == [1.5, 2]
    assert again.scheduler.state_dict() == first.scheduler.state_dict()
    stored = load_file(folder / TENSORS)
    for number, (name, parameter) in enumerate(first.parameters.items()):
        mine, found = (p.optimizer.state[list(p.parameters.values())[number]] for p in (first, again))
        assert mine.keys() == found.keys() and len(mine) >= 3, name
        for key, value in mine.items():
            same = torch.as_tensor(found[key])
            assert torch.as_tensor(value).dtype == same.dtype and torch.equal(torch.as_tensor(value), same), key
        assert torch.equal(stored[f"adapter.{name}"], parameter)
    eight = {t.dtype for key, t in stored.items() if key.endswith("state1.a")}
    assert eight == ({torch.uint8} if "8bit" in kind else set())
    for parts in (first, again, untouched):  # writing changed nothing, and all go on alike
        steps(parts, 2, seed=9)
    for name in first.parameters:
        assert torch.equal(first.parameters[name], again.parameters[name])
        assert torch.equal(first.parameters[name], untouched.parameters[name])


# Damage


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place * len(data) // 100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", [TENSORS, STATE, MANIFEST])
@pytest.mark.parametrize("place", [0, 3, 37, 61, 99])
def test_a_flipped_bit_is_seen_wherever_it_is(stage, file, place, said):
    flip(stage.path / "checkpoint-12" / file, place)
    assert resume_point(stage).name == "checkpoint-8"
    assert len(said) == 1 and said[0].startswith("checkpoint-12: ") and said[0].endswith("; using checkpoint-8")
    assert names(stage) == ["checkpoint-4", "checkpoint-8"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = [
    (lambda f: flip(f / TENSORS, 50), "state.safetensors has another hash than was written"),
    (lambda f: cut(f / TENSORS), "state.safetensors has {less:,} bytes, {size:,} were written"),
    (lambda f: (f / TENSORS).unlink(), "state.safetensors is missing"),
    (lambda f: (f / STATE).unlink(), "state.json is missing"),
    (lambda f: (f / STATE).write_text("{}"), "state.json has 2 bytes, "),
    (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json is missing or damaged"),
    (lambda f: (f / MANIFEST).write_bytes(b"\0" * 90), "manifest.json is missing or damaged"),
    (lambda f: (f / MANIFEST).write_text("[" * 100_000), "manifest.json is missing or damaged"),
    (lambda f: (f / MANIFEST).write_text('{"format": 7, "files": {}}'), "manifest.json is missing or damaged"),
    (
        lambda f: (f / MANIFEST).write_text('{"format": 1, "files": {}}') and (f / STATE).unlink(),
        "state.json is missing",
    ),
]


@pytest.mark.parametrize(("damage", "what"), DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(stage, damage, what, said):
    folder = stage.path / "checkpoint-12"
    size = (folder / TENSORS).stat().st_size
    damage(folder)
    assert resume_point(stage).name == "checkpoint-8"
    assert said[0].startswith(f"checkpoint-12: {what.format(less=size - 1, size=size)}")
    # it is neither counted nor in the way of the one that is written in its place
    made().write(stage, 12, EXTRA)
    prune(stage, keep=2, best=None)
    assert names(stage) == ["checkpoint-8", "checkpoint-12"] and len(list(stage.path.iterdir())) == 2
    assert resume_point(stage).name == "checkpoint-12" and len(said) == 1


def test_all_damaged_is_an_error_not_a_start_from_the_beginning(stage):
    for name, file in (("4", STATE), ("8", TENSORS), ("12", MANIFEST)):
        flip(stage.path / f"checkpoint-{name}" / file, 50)
    with pytest.raises(UserError) as found:
        resume_point(stage)
    assert "all of its checkpoints are damaged: checkpoint-12: " in found.value.message
    assert "checkpoint-8: state.safetensors has another hash than was written" in found.value.message
    assert "delete them to train the stage from its beginning" in found.value.hint
    assert len(names(stage)) == 3


def test_what_an_earlier_version_wrote_is_taken(stage, said):
    folder = stage.path / "checkpoint-12"
    (folder / MANIFEST).unlink()
    assert resume_point(stage) == folder
    assert len(said) == 1 and said[0].startswith("checkpoint-12: has no manifest.json, an earlier version wrote it")
    cut(folder / TENSORS)
    assert resume_point(stage).name == "checkpoint-8"
    assert said[1].startswith("checkpoint-12: state.safetensors: not a complete safetensors file")


# Deleting


def test_prune_keeps_the_best_the_last_and_what_is_being_copied(stage):
    for step in (16, 20):
        made().write(stage, step, EXTRA)
    prune(stage, keep=3, best=4, busy=frozenset({"checkpoint-8"}))
    assert names(stage) == ["checkpoint-4", "checkpoint-8", "checkpoint-20"]
    prune(stage, keep=1, best=4)
    assert names(stage) == ["checkpoint-4", "checkpoint-20"]
    prune(stage, keep=1, best=None)
    assert names(stage) == ["checkpoint-20"]
    prune(stage, keep=1, best=None)
    assert names(stage) == ["checkpoint-20"]


def test_prune_never_deletes_the_last_good_one(stage):
    """Damaged ones do not count towards those that are kept."""
    for step in (8, 12):
        cut(stage.path / f"checkpoint-{step}" / TENSORS)
    prune(stage, keep=1, best=None)
    assert names(stage) == ["checkpoint-4"]
    cut(stage.path / "checkpoint-4" / TENSORS)
    prune(stage, keep=1, best=None)
    assert names(stage) == ["checkpoint-4"]  # nothing good is there: nothing is deleted


def test_nothing_is_deleted_before_the_new_one_is_on_the_disk(stage):
    with faulty() as disk:
        made().write(stage, 16, EXTRA)
        prune(stage, keep=1, best=None)
    calls = [name for name, _ in disk.calls]
    place = max(i for i, (name, path) in enumerate(disk.calls) if name == "replace" and path.endswith("checkpoint-16"))
    assert calls[place + 1] == "fsync" and calls.index("replace", place + 1) > place + 1


# The metrics log


def test_a_record_is_one_line_and_one_write(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.flush()  # nothing was logged yet
    with faulty() as disk:
        for step in (1, 2, 3):
            log.append({"step": step, "loss": 1.0, "note": "é\n" * 5000})
        log.flush()
    assert [name for name, _ in disk.calls] == ["write"] * 3 + ["fsync"] * 2
    assert len(log.path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize(
    "tail", [b'{"step": 4, "lo', b"\0" * 4096, b'{"step": 4}\n\0\0\0', b"\xff\xfe\n", b"[4]\n7\n", b"\n\n"]
)
def test_what_a_power_failure_leaves_of_the_last_lines_is_dropped(tmp_path, tail):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step, "loss": float("inf")})
    with log.path.open("ab") as file:
        file.write(tail)
    assert [r["step"] for r in log.truncate(3)] == [1, 2, 3]
    log.append({"step": 4})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_an_evaluation_that_no_checkpoint_knows_of_is_made_again(tmp_path):
    """Stopped during the evaluation after step 3, gone on with, and killed after it was logged."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for record in ({"step": 2, "eval_loss": 3.0}, {"step": 3, "loss": 1.0}, {"step": 3, "eval_loss": 2.0}):
        log.append(record)
    kept = log.truncate(3, pending=True)
    assert [sorted(record) for record in kept] == [["eval_loss", "step"], ["loss", "step"]]
    assert len(log.path.read_text().splitlines()) == 2


# The reference's progress


@pytest.fixture
def sums(monkeypatch):
    """Pairs' sums without a model; the log of what was computed, and a place to fail at."""
    calls = SimpleNamespace(groups=[], dies_at=None)

    def pair_sums(decoder, batch, reference):
        if len(calls.groups) == calls.dies_at:
            raise KeyboardInterrupt
        calls.groups.append(batch.indices)
        return torch.tensor([[-i - 0.1, -2 * i - 0.3] for i in batch.indices], dtype=torch.float32)

    monkeypatch.setattr(reference, "pair_sums", pair_sums)
    return calls


class Rows:
    def __init__(self, indices):
        self.indices = indices

    def to(self, device):
        return self


def fill(cache):
    groups = [[0, 3], [1], [2, 4], [5]]
    cache.compute(SimpleNamespace(device="cpu"), Rows, [(nullcontext(), group) for group in groups])


def test_what_the_reference_computed_is_there_after_an_interrupt(tmp_path, sums, said):
    whole = ReferenceCache(tmp_path, "k" * 64, 6)
    fill(whole)
    right = whole.path.read_bytes()
    whole.path.unlink()
    sums.groups.clear()
    said.clear()
    computed = []
    for sums.dies_at in (1, 0, 2, None):
        sums.groups.clear()
        cache = ReferenceCache(tmp_path, "k" * 64, 6)
        assert not cache.load()
        if sums.dies_at is None:
            fill(cache)
        else:
            with pytest.raises(KeyboardInterrupt):
                fill(cache)
        computed += sums.groups
    assert computed == [[0, 3], [1], [2, 4], [5]] and not said
    assert cache.path.read_bytes() == right and cache.missing == 0
    again = ReferenceCache(tmp_path, "k" * 64, 6)
    assert again.load() and torch.equal(again.sums, whole.sums)


def test_the_references_progress_is_written_every_minute(tmp_path, sums, monkeypatch):
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(reference.time, "monotonic", lambda: float(next(clock)))
    with faulty() as disk:
        fill(ReferenceCache(tmp_path, "k" * 64, 6))
    assert sum(name == "replace" for name, _ in disk.calls) == 2  # after the third group, and at the end


def other_key(path):
    path.write_bytes(path.read_bytes().replace(b"kkkkkkkkkk", b"kkkkkkkkkl"))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (other_key, "belongs to other rows, another base or other adapters"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x40"), "has another hash than was written"),
        (cut, "cannot be read ("),
        (lambda p: p.write_bytes(b""), "cannot be read ("),
        (lambda p: (p.unlink(), p.mkdir()), ""),
    ],
)
def test_a_damaged_reference_is_said_and_computed_anew(tmp_path, sums, damage, what, said):
    fill(ReferenceCache(tmp_path, "k" * 64, 6))
    cache = ReferenceCache(tmp_path, "k" * 64, 6)
    damage(cache.path)
    assert not cache.load() and cache.missing == 6
    assert len(said) == 1 and said[0].startswith(f"{cache.path}: {what}") and said[0].endswith("; it is computed again")
    if cache.path.is_dir():
        with pytest.raises(OSError, match="reference-"):
            fill(cache)
    else:
        fill(cache)
        assert ReferenceCache(tmp_path, "k" * 64, 6).load() and len(said) == 1
    wide = ReferenceCache(tmp_path, "k" * 64, 7)
    assert not wide.load()


# Manifests


def test_a_manifest_reaches_into_subfolders_and_leaves_out_what_is_not_its(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a", "deep/b", "deep/er/c"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    (tmp_path / "more").write_text("unlisted")
    assert manifest_fault(tmp_path) is None
    (tmp_path / "deep" / "er" / "c").write_text("deep/er/d")
    assert manifest_fault(tmp_path, deep=False) is None
    assert manifest_fault(tmp_path) == "deep/er/c has another hash than was written"
    shutil.rmtree(tmp_path / "deep")
    assert manifest_fault(tmp_path, deep=False) == "deep/b is missing"
    (tmp_path / MANIFEST).unlink()
    assert manifest_fault(tmp_path) == "manifest.json is missing or damaged"
    assert checkpoint_fault(tmp_path).startswith("state.safetensors is missing")
