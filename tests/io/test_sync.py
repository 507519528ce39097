"""Copies of a stage in a folder or on the hub."""

import errno
import inspect
import json
import shutil
import threading

import pytest
from huggingface_hub import HfApi

from tests.fake_hub import Api, http_error
from tests.synced import AStage, hub_in_memory, mirror_of, there
from zephyr_lite.errors import UserError
from zephyr_lite.io import sync as sync_file
from zephyr_lite.io.atomic import manifest_fault
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.io.sync import place_of, restore


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(sync_file, "RETRY", 0.01)


@pytest.fixture
def hub(monkeypatch):
    return hub_in_memory(monkeypatch)


def checkpointed(mirror, stage, *steps, best=None):
    for step in steps:
        stage.checkpoint(step)
        mirror.changed(best if best in steps and step >= best else None)
        assert mirror.finish(10)


def test_the_newest_and_the_best_are_copied_completely(tmp_path):
    stage = AStage(tmp_path / "runs" / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    checkpointed(mirror, stage, 2, 4, 6, 8, best=4)
    copy = tmp_path / "drive" / "a" / "sft"
    assert there(copy) == ["checkpoint-4", "checkpoint-8", "config.yaml", "metrics.jsonl", "stage.json"]
    assert all(manifest_fault(copy / f"checkpoint-{step}") is None for step in (4, 8))
    assert (copy / "metrics.jsonl").read_bytes() == stage.dir.metrics.read_bytes()
    stage.finish()
    assert mirror.finish(10)
    assert (copy / "adapter" / "adapter_model.safetensors").read_text() == "adapter"
    assert json.loads((copy / "stage.json").read_text())["status"] == "complete"
    before = there(copy)
    shutil.rmtree(tmp_path / "drive")  # a place that lost everything gets all of it again
    assert mirror.finish(10) and there(copy) == before and mirror.busy() == frozenset()


def test_a_slow_place_gets_the_latest_and_what_is_being_copied_is_busy(tmp_path, monkeypatch):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    begun, go, copied, plain = threading.Event(), threading.Event(), [], sync_file._copy_folder

    def slow(source, target):
        copied.append(source.name)
        begun.set()
        assert go.wait(10)
        plain(source, target)

    monkeypatch.setattr(sync_file, "_copy_folder", slow)
    stage.checkpoint(2)
    mirror.changed(None)
    assert begun.wait(10)
    for step in (4, 6, 8):
        stage.checkpoint(step)
        mirror.changed(None)
        assert mirror.busy() == {"checkpoint-2", f"checkpoint-{step}"}
    go.set()
    assert mirror.finish(10) and mirror.busy() == frozenset()
    assert copied == ["checkpoint-2", "checkpoint-8"]


def test_a_full_place_is_reported_once_and_made_up_for(tmp_path, monkeypatch, said):
    stage, plain = AStage(tmp_path / "a"), sync_file._copy_folder
    mirror = mirror_of(tmp_path / "drive", stage)

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(sync_file, "_copy_folder", full)
    stage.checkpoint(2)
    assert not mirror.finish(attempts=3)
    first, last = said
    assert "No space left" in first and "training continues, and the copy is tried again" in first
    assert "does not have the last state" in last and "No space left" in last and "the same command" in last
    assert not list((tmp_path / "drive" / "a" / "sft").glob("*checkpoint*"))
    monkeypatch.setattr(sync_file, "_copy_folder", plain)
    assert mirror.finish(10) and "is up to date again" in said[-1]


def test_a_damaged_checkpoint_does_not_replace_a_good_copy(tmp_path, said):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    checkpointed(mirror, stage, 2)
    (stage.checkpoint(4) / "state.safetensors").write_text("weights of 5")
    assert not mirror.finish(attempts=2)
    assert "checkpoint-4: state.safetensors has another hash than was written" in said[0]
    assert "checkpoint-2" in there(tmp_path / "drive" / "a" / "sft")


@pytest.mark.parametrize(
    ("sync", "message"),
    [
        ("{run}", "is in the run's own folder"),
        ("{run}/copies", "is in the run's own folder"),
        ("{run}/..", "is in the run's own folder"),
        ("{file}", "neither a folder nor hub:OWNER/NAME"),
        ("s3://bucket/x", "neither a folder nor hub:OWNER/NAME"),
        ("hub:me", "is not a repository's name"),
        ("hub:me/../x", "is not a repository's name"),
    ],
)
def test_a_place_that_is_none(tmp_path, sync, message):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=message):
        place_of(sync.format(run=tmp_path / "a", file=tmp_path / "file"), tmp_path / "a")


def test_the_stages_below_are_copied_too(tmp_path):
    """They may have been trained without ``sync``; a new machine could not continue without them."""
    AStage(tmp_path / "a").finish()
    AStage(tmp_path / "a", "abandoned")
    dpo = AStage(tmp_path / "a", "dpo")
    checkpointed(mirror_of(tmp_path / "drive", dpo), dpo, 2)
    assert there(tmp_path / "drive" / "a") == ["dpo", "sft"]
    shutil.rmtree(tmp_path / "a")
    restore(str(tmp_path / "drive"), dpo.dir)
    assert StageDir(tmp_path / "a" / "sft").complete() and StageDir(tmp_path / "a" / "dpo").checkpoints()


# The hub


def test_every_commit_on_the_hub_is_a_state_to_continue_from(tmp_path, hub, said):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of("hub:me/copies", stage)
    checkpointed(mirror, stage, 2, 4, 6, best=4)
    assert hub.private == {"me/copies"}
    for tree in hub.repos["me/copies"][1:]:
        names = {path.split("/")[2] for path in tree if path.startswith("a/")}
        assert {"stage.json", "config.yaml", "metrics.jsonl"} < names
        assert sum(name.startswith("checkpoint-") for name in names) in (1, 2)
    assert {p.split("/")[2] for p in hub.tree("me/copies") if "checkpoint" in p} == {"checkpoint-4", "checkpoint-6"}
    stage.finish()
    assert mirror.finish(10)
    before = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    shutil.rmtree(tmp_path / "a")
    restore("hub:me/copies", stage.dir)
    after = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert after == {path: data for path, data in before.items() if "checkpoint" not in str(path)}
    assert "complete" in said[0] and "hf_secret" not in str(said)


def test_the_hub_fails_in_every_way_and_the_copy_comes_through(tmp_path, hub, said):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of("hub:me/copies", stage)
    checkpointed(mirror, stage, 2)
    hub.faults = [http_error(503), ConnectionResetError("reset by peer"), http_error(403), ValueError("no token")]
    hub.breaks = [(1, ConnectionError("cut")), (3, TimeoutError("slow")), (4, http_error(500))]
    checkpointed(mirror, stage, 4)
    assert len(said) == 2 and "503 of the server" in said[0] and "up to date" in said[1]
    assert hub.faults == hub.breaks == []
    for state in hub.repos["me/copies"][1:]:  # no commit is incomplete
        assert any(path.startswith(("a/sft/checkpoint-2/s", "a/sft/checkpoint-4/s")) for path in state)


def test_the_calls_are_those_of_the_real_hub():
    for name in ("create_repo", "repo_info", "snapshot_download", "upload_folder", "super_squash_history"):
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (Api, HfApi))
        assert set(ours) - {"repo"} < set(theirs)


def test_a_new_machine_and_the_hub_away(tmp_path, hub):
    hub.faults = [http_error(503)]
    with pytest.raises(UserError, match=r"503 of the server. Whether it has the run is not known"):
        restore("hub:me/copies", StageDir(tmp_path / "a" / "sft"))
    restore("hub:me/copies", StageDir(tmp_path / "a" / "sft"))  # no such repository yet
    assert not (tmp_path / "a").exists()


def test_without_a_token_or_offline_it_is_refused_at_the_start(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(sync_file, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the hub"):
        place_of("hub:me/copies", tmp_path / "a")
    monkeypatch.setattr(sync_file.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        place_of("hub:me/copies", tmp_path / "a")
