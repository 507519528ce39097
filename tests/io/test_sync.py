"""The machine disappears: what lies elsewhere by then, in a folder or on the hub."""

import errno
import inspect
import json
import shutil
import threading
import time

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.fake_hub import Api, http_error
from tests.messages import messages_to
from tests.synced import AStage, hub_in_memory, mirror_of, patient, there
from zephyr_lite.errors import UserError
from zephyr_lite.io import sync as sync_file
from zephyr_lite.io.manifest import manifest_fault
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.io.sync import FolderPlace, Mirror, catch_up, place_of, restore


@pytest.fixture
def hub(monkeypatch):
    return hub_in_memory(monkeypatch)


# What is copied


def test_the_newest_and_the_best_are_there_and_whole(tmp_path):
    stage = AStage(tmp_path / "runs" / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    for step, best in ((2, None), (4, 4), (6, 4), (8, 4)):
        stage.checkpoint(step)
        mirror.changed(best)
        assert mirror.finish(10)
    copy = tmp_path / "drive" / "a" / "sft"
    assert there(copy) == ["checkpoint-4", "checkpoint-8", "config.yaml", "metrics.jsonl", "stage.json"]
    for step in (4, 8):
        assert manifest_fault(copy / f"checkpoint-{step}") is None
    assert (copy / "metrics.jsonl").read_bytes() == stage.dir.metrics.read_bytes()
    stage.finish()
    assert mirror.finish(10)
    assert (
        manifest_fault(copy / "adapter") is None
        and json.loads((copy / "stage.json").read_text())["status"] == "complete"
    )
    mirror.close()
    assert mirror.busy() == frozenset()


def test_an_old_copy_goes_only_when_the_new_one_is_there(tmp_path, monkeypatch):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    stage.checkpoint(2)
    mirror.changed(None)
    assert mirror.finish(10)
    seen = []
    plain = sync_file.remove_folder

    def watched(path):
        seen.append((path.name, manifest_fault(path.parent / "checkpoint-4")))
        plain(path)

    monkeypatch.setattr(sync_file, "remove_folder", watched)
    stage.checkpoint(4)
    mirror.changed(None)
    assert mirror.finish(10) and seen == [("checkpoint-2", None)]
    mirror.close()


def test_a_slow_place_gets_the_latest_and_what_it_reads_is_not_deleted(tmp_path, monkeypatch):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    begun, go = threading.Event(), threading.Event()
    copied = []
    plain = sync_file._copy_tree

    def slow(source, target):
        copied.append(source.name)
        begun.set()
        assert go.wait(10)
        plain(source, target)

    monkeypatch.setattr(sync_file, "_copy_tree", slow)
    stage.checkpoint(2)
    started = time.monotonic()
    mirror.changed(None)
    assert begun.wait(10)
    for step in (4, 6, 8):
        stage.checkpoint(step)
        mirror.changed(None)
        assert mirror.busy() == {"checkpoint-2", f"checkpoint-{step}"}
    assert time.monotonic() - started < 5  # nobody waited
    go.set()
    assert mirror.finish(10) and mirror.busy() == frozenset()
    assert copied == ["checkpoint-2", "checkpoint-8"]
    assert "checkpoint-8" in there(tmp_path / "drive" / "a" / "sft")
    mirror.close()


def test_a_full_place_is_said_once_and_tried_again(tmp_path, monkeypatch, said):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    full = [True]
    plain = sync_file._copy_tree
    attempts = []

    def copy(source, target):
        attempts.append(1)
        if full[0]:
            (target / "half").write_text("h")
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        plain(source, target)

    monkeypatch.setattr(sync_file, "_copy_tree", copy)
    stage.checkpoint(2)
    mirror.changed(None)
    patient(lambda: len(attempts) > 3)
    assert (
        len(said) == 1 and "No space left" in said[0] and "training continues, and the copy is tried again" in said[0]
    )
    assert not mirror.finish(0.05)
    assert "does not have checkpoint-2: [Errno 28] No space left" in said[-1] and "the same command" in said[-1]
    assert not list((tmp_path / "drive" / "a" / "sft").glob("*checkpoint*"))  # no half of it either
    full[0] = False
    assert mirror.finish(10) and "is up to date again" in said[-1]
    mirror.close()


def test_a_place_that_lost_what_it_had_gets_all_of_it_again(tmp_path):
    stage, drive = AStage(tmp_path / "a"), tmp_path / "drive"
    mirror = mirror_of(drive, stage)
    stage.checkpoint(2)
    mirror.changed(None)
    assert mirror.finish(10)
    before = there(drive / "a" / "sft")
    shutil.rmtree(drive)
    mirror.changed(None)
    assert mirror.finish(10) and there(drive / "a" / "sft") == before
    mirror.close()


def test_who_copies_goes_on_when_nothing_can_be_printed(tmp_path):
    def gone(line):
        raise BrokenPipeError

    stage, drive = AStage(tmp_path / "a"), tmp_path / "drive"
    drive.write_text("a file is in the way")
    mirror = Mirror(FolderPlace(drive), "a/sft", stage.dir)
    mirror.retry = 0.01
    stage.checkpoint(2)
    with pytest.raises(BrokenPipeError), messages_to(gone):  # it is raised at the end
        mirror.changed(None)
        patient(lambda: mirror._fault is not None)
        drive.unlink()
        assert mirror.finish(10) and "checkpoint-2" in there(drive / "a" / "sft")
        mirror.close()


def test_the_end_of_a_run_does_not_wait_for_a_place_that_always_fails(tmp_path):
    stage, drive = AStage(tmp_path / "a"), tmp_path / "drive"
    drive.write_text("a file is in the way")
    mirror = Mirror(FolderPlace(drive), "a/sft", stage.dir)
    mirror.retry = 0.01
    stage.checkpoint(2)
    assert not mirror.finish(attempts=3)
    drive.unlink()
    assert mirror.finish()
    mirror.close()


def test_a_checkpoint_that_rots_here_does_not_replace_a_good_copy(tmp_path, said):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    stage.checkpoint(2)
    mirror.changed(None)
    assert mirror.finish(10)
    folder = stage.checkpoint(4)
    (folder / "state.safetensors").write_text("weights of 5")
    mirror.changed(None)
    assert not mirror.finish(0.3)
    assert "checkpoint-4: state.safetensors has another hash than was written" in said[0]
    assert "checkpoint-2" in there(tmp_path / "drive" / "a" / "sft")
    mirror.close()


def test_a_stage_whose_end_was_not_copied_is_copied_by_the_same_command(tmp_path, said):
    stage = AStage(tmp_path / "a")
    stage.checkpoint(2)
    stage.finish()
    catch_up(str(tmp_path / "drive"), stage.dir)
    assert "adapter" in there(tmp_path / "drive" / "a" / "sft") and len(said) == 1
    catch_up(str(tmp_path / "drive"), stage.dir)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("sync", "message"),
    [
        ("{run}", "is in the run's own folder"),
        ("{run}/copies", "is in the run's own folder"),
        ("{run}/..", "is in the run's own folder"),
        ("{file}", "is a file"),
        ("s3://bucket/x", "neither a folder nor hub:OWNER/NAME"),
        ("hub:me", "is not a repository's name"),
        ("hub:me/../x", "is not a repository's name"),
    ],
)
def test_a_place_that_is_none(tmp_path, sync, message):
    (tmp_path / "file").write_text("x")
    sync = sync.format(run=tmp_path / "a", file=tmp_path / "file")
    with pytest.raises(UserError, match=message):
        place_of(sync, tmp_path / "a")


def test_the_stages_below_are_copied_too(tmp_path):
    """They may have been trained without ``sync``; a new machine could not go on without them."""
    AStage(tmp_path / "a").finish()
    AStage(tmp_path / "a", "abandoned")
    dpo = AStage(tmp_path / "a", "dpo")
    dpo.checkpoint(2)
    mirror = mirror_of(tmp_path / "drive", dpo)
    mirror.changed(None)
    assert mirror.finish(10)
    mirror.close()
    assert there(tmp_path / "drive" / "a") == ["dpo", "sft"]
    shutil.rmtree(tmp_path / "a")
    restore(str(tmp_path / "drive"), dpo.dir)
    assert StageDir(tmp_path / "a" / "sft").complete() and StageDir(tmp_path / "a" / "dpo").checkpoints()


# The hub


def test_the_hub_holds_whole_states_in_a_private_repository(tmp_path, hub, said):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of("hub:me/copies", stage)
    for step in (2, 4, 6):
        stage.checkpoint(step)
        mirror.changed(4 if step > 2 else None)
        assert mirror.finish(10)
    assert hub.private == {"me/copies"}
    for tree in hub.repos["me/copies"][1:]:  # every commit is a state to go on from
        names = {path.split("/")[2] for path in tree if path.startswith("a/")}
        assert {"stage.json", "config.yaml", "metrics.jsonl"} < names
        assert sum(name.startswith("checkpoint-") for name in names) in (1, 2)
    assert {p.split("/")[2] for p in hub.tree("me/copies") if "checkpoint" in p} == {"checkpoint-4", "checkpoint-6"}
    stage.finish()
    assert mirror.finish(10)
    mirror.close()
    before = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    shutil.rmtree(tmp_path / "a")
    restore("hub:me/copies", stage.dir)
    after = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert after == {path: data for path, data in before.items() if "checkpoint" not in str(path)}
    assert "complete" in said[0] and "hf_secret" not in str(said)


def test_the_hub_fails_in_every_way_and_the_copy_comes_through(tmp_path, hub, monkeypatch, said):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_tests")
    stage = AStage(tmp_path / "a")
    mirror = mirror_of("hub:me/copies", stage)
    stage.checkpoint(2)
    mirror.changed(None)
    assert mirror.finish(10)
    hub.faults = [
        http_error(503),
        http_error(429),
        ConnectionResetError("reset by peer"),
        http_error(403),
        http_error(503),
        ValueError("hf_secret_of_the_tests is no token"),
    ]
    stage.checkpoint(4)
    mirror.changed(None)
    assert mirror.finish(10)
    assert len(said) == 2 and "503 of the server" in said[0] and "up to date" in said[1] and hub.faults == []
    mirror.close()


def test_a_commit_that_breaks_leaves_what_was_there(tmp_path, hub):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of("hub:me/copies", stage)
    stage.checkpoint(2)
    mirror.changed(None)
    assert mirror.finish(10)
    states = hub.repos["me/copies"]
    hub.breaks = [(1, ConnectionError("cut")), (3, TimeoutError("slow")), (4, http_error(500))]
    stage.checkpoint(4)
    mirror.changed(None)
    assert mirror.finish(10) and hub.breaks == [] and len(states) == 3  # empty, with checkpoint-2, with checkpoint-4
    assert any("checkpoint-2" in path for path in states[1]) and any("checkpoint-4" in path for path in states[2])
    mirror.close()


def test_the_history_is_squashed_now_and_then(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(sync_file, "SQUASH_EVERY", 2)
    place = sync_file.HubPlace("me/copies")
    place.prepare()
    for step in range(4):
        (tmp_path / "config.yaml").write_text(str(step))
        place.put("a/sft", [tmp_path / "config.yaml"], [])
    assert hub.squashed == 2 and len(hub.repos["me/copies"]) == 1 and place.read("a/sft/config.yaml") == b"3"


def test_the_calls_are_those_of_the_real_hub():
    """The hub of these tests takes what the library's own takes."""
    for name in (
        "create_repo",
        "list_repo_tree",
        "hf_hub_download",
        "snapshot_download",
        "create_commit",
        "super_squash_history",
    ):
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (Api, HfApi))
        assert set(ours) - {"repo"} < set(theirs) and list(theirs)[1] == "repo_id"
        by_place = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
        assert list(theirs)[2 : 2 + len(by_place)] == by_place


def test_a_new_machine_and_the_hub_away(tmp_path, hub):
    hub.faults = [http_error(503)]
    with pytest.raises(UserError, match=r"503 of the server. Whether it has the run is not known"):
        restore("hub:me/copies", StageDir(tmp_path / "a" / "sft"))
    restore("hub:me/copies", StageDir(tmp_path / "a" / "sft"))  # no such repository yet
    assert not (tmp_path / "a").exists()


def test_a_network_that_fails_in_the_middle_is_not_an_empty_place(tmp_path, hub, monkeypatch):
    """The hub's library turns a failed download into "not in the cache", which is an entry that was not found too."""
    stage = AStage(tmp_path / "a")
    stage.checkpoint(2)
    catch_up("hub:me/copies", stage.dir)
    shutil.rmtree(tmp_path / "a")

    def away(self, *arguments, **options):
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(Api, "hf_hub_download", away)
    with pytest.raises(UserError, match="Whether it has the run is not known"):
        restore("hub:me/copies", stage.dir)


def test_without_a_token_or_offline_it_is_said_at_the_start(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(sync_file, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the hub"):
        place_of("hub:me/copies", tmp_path / "a")
    monkeypatch.setattr(sync_file.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        place_of("hub:me/copies", tmp_path / "a")
