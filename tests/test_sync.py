"""The machine disappears: what lies elsewhere by then, and that a new machine goes on from it to the same bits."""

import errno
import inspect
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.fake_hub import FakeHub, _Api, http_error
from tests.test_train import dpo_words, killed_at, metrics, quiet, words
from zephyr_lite.config import RunConfig, load_config
from zephyr_lite.errors import UserError
from zephyr_lite.manifest import manifest_fault, write_manifest
from zephyr_lite.model.chain import chain_of_run
from zephyr_lite.model.peft_files import read_adapter
from zephyr_lite.rundir import StageDir, newest_run
from zephyr_lite.sync import Mirror, catch_up, open_mirror, restore
from zephyr_lite.sync import folder as folder_file
from zephyr_lite.sync import hub as hub_file
from zephyr_lite.sync.place import place_of
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.setup import resolve_run
from zephyr_lite.train.sft import run_sft

SETTINGS = {"lora_dropout": 0.1, "num_train_epochs": 2, "save_total_limit": 1}


@pytest.fixture
def hub(monkeypatch):
    """A hub in memory, a token, and no waiting between attempts."""
    fake = FakeHub()
    monkeypatch.setattr(hub_file, "HfApi", fake)
    monkeypatch.setattr(hub_file, "get_token", lambda: "hf_secret_of_the_tests")
    monkeypatch.setattr(hub_file.constants, "HF_HUB_OFFLINE", False)
    return fake


@pytest.fixture
def at_once(monkeypatch):
    """A network so fast that a copy is there before the next step."""
    plain = Mirror.changed

    def changed(self, best):
        plain(self, best)
        with self._turn:
            assert self._turn.wait_for(lambda: self._wanted is None and self._at_work is None, timeout=20)

    monkeypatch.setattr(Mirror, "changed", changed)


class AStage:
    """A stage's folder without a model: what the mirror sees of it."""

    def __init__(self, run, name="sft", id="one"):
        self.dir = StageDir(run / name)
        self.dir.path.mkdir(parents=True)
        self.dir.config.write_text("seed: 1\n")
        self.info(id=id, status="running", created="2026-01-01")

    def info(self, **values):
        self.dir.write_info({**(self.dir.info() or {}), **values})

    def checkpoint(self, step, content=None):
        folder = self.dir.path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "state.safetensors").write_text(content or f"weights of {step}")
        write_manifest(folder)
        with self.dir.metrics.open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
        return folder

    def finish(self):
        self.dir.adapter.mkdir()
        (self.dir.adapter / "adapter_model.safetensors").write_text("adapter")
        self.info(status="complete")


def config_of(run, sync, stage="sft"):
    return RunConfig(output_dir=str(run), sync=str(sync), stage=stage)


def mirror_of(run, sync, stage, say=quiet, waits=(0.01,)):
    mirror = open_mirror(config_of(run, sync, stage.dir.path.name), stage.dir, say)
    mirror.waits = waits
    return mirror


def there(folder):
    return sorted(p.name for p in folder.iterdir())


def patient(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# What is copied


def test_the_newest_and_the_best_are_there_and_whole(tmp_path):
    stage = AStage(tmp_path / "runs" / "a")
    mirror = mirror_of(tmp_path / "runs" / "a", tmp_path / "drive", stage)
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
    mirror = mirror_of(tmp_path / "a", tmp_path / "drive", stage)
    stage.checkpoint(2)
    mirror.changed(None)
    assert mirror.finish(10)
    seen = []
    plain = folder_file.remove_folder

    def watched(path):
        seen.append((path.name, manifest_fault(path.parent / "checkpoint-4")))
        plain(path)

    monkeypatch.setattr(folder_file, "remove_folder", watched)
    stage.checkpoint(4)
    mirror.changed(None)
    assert mirror.finish(10) and seen == [("checkpoint-2", None)]
    mirror.close()


def test_a_slow_place_gets_the_latest_and_what_it_reads_is_not_deleted(tmp_path, monkeypatch):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "a", tmp_path / "drive", stage)
    begun, go = threading.Event(), threading.Event()
    copied = []
    plain = folder_file._copy_tree

    def slow(source, target):
        copied.append(source.name)
        begun.set()
        assert go.wait(10)
        plain(source, target)

    monkeypatch.setattr(folder_file, "_copy_tree", slow)
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


def test_a_full_place_is_said_once_and_tried_again(tmp_path, monkeypatch):
    stage = AStage(tmp_path / "a")
    said = []
    mirror = mirror_of(tmp_path / "a", tmp_path / "drive", stage, said.append)
    full = [True]
    plain = folder_file._copy_tree
    attempts = []

    def copy(source, target):
        attempts.append(1)
        if full[0]:
            (target / "half").write_text("h")
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        plain(source, target)

    monkeypatch.setattr(folder_file, "_copy_tree", copy)
    stage.checkpoint(2)
    mirror.changed(None)
    patient(lambda: len(attempts) > 3)
    assert [line for line in said if "no space left" in line] == said and len(said) == 1
    assert "training goes on, and it is tried again" in said[0]
    assert not mirror.finish(0.05)
    assert "does not have checkpoint-2: no space left" in said[-1] and "the same command" in said[-1]
    assert not list((tmp_path / "drive" / "a" / "sft").glob("*checkpoint*"))  # no half of it either
    full[0] = False
    assert mirror.finish(10) and "is up to date again" in said[-1]
    mirror.close()


def test_who_waits_at_the_end_waits_no_longer_than_makes_sense(tmp_path, monkeypatch):
    """A failure long ago: the next attempt would be in minutes, and comes at once. And nobody waits for a place that fails
    all the time."""
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "a", tmp_path / "drive", stage, waits=(0.01, 300.0))
    plain, full, attempts = folder_file._copy_tree, [True], []

    def copy(source, target):
        attempts.append(1)
        if full[0]:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(target))
        plain(source, target)

    monkeypatch.setattr(folder_file, "_copy_tree", copy)
    stage.checkpoint(2)
    mirror.changed(None)
    patient(lambda: len(attempts) == 2)
    started = time.monotonic()
    assert not mirror.finish(patience=0.1) and len(attempts) > 2
    full[0] = False
    assert mirror.finish() and time.monotonic() - started < 5
    mirror.close()


def test_a_checkpoint_that_rots_here_does_not_replace_a_good_copy(tmp_path):
    stage = AStage(tmp_path / "a")
    said = []
    mirror = mirror_of(tmp_path / "a", tmp_path / "drive", stage, said.append)
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


def test_two_machines_on_one_run_do_not_delete_each_others_copies(tmp_path):
    stage = AStage(tmp_path / "a")
    said = []
    mirror = mirror_of(tmp_path / "a", tmp_path / "drive", stage, said.append)
    stage.checkpoint(2)
    mirror.changed(None)
    assert mirror.finish(10)
    shutil.copytree(
        tmp_path / "a", tmp_path / "elsewhere" / "a"
    )  # the other machine, which had taken this one for lost
    other = AStage.__new__(AStage)
    other.dir = StageDir(tmp_path / "elsewhere" / "a" / "sft")
    theirs = mirror_of(tmp_path / "elsewhere" / "a", tmp_path / "drive", other)
    other.checkpoint(8)
    theirs.changed(None)
    assert theirs.finish(10)
    stage.checkpoint(4)
    mirror.changed(None)
    assert not mirror.finish(0.3) and "a/sft/checkpoint-8 was not copied from here" in said[0]
    assert "checkpoint-8" in there(tmp_path / "drive" / "a" / "sft")
    assert len((tmp_path / "drive" / "a" / "sft" / "metrics.jsonl").read_text().splitlines()) == 2  # theirs
    mirror.close(), theirs.close()


def test_a_run_that_began_at_the_same_time_elsewhere_is_not_written_over(tmp_path):
    first = AStage(tmp_path / "a")
    first.checkpoint(2)
    mirror = mirror_of(tmp_path / "a", tmp_path / "drive", first)
    mirror.changed(None)
    assert mirror.finish(10)
    second = AStage(tmp_path / "elsewhere" / "a", id="two")
    second.info(created="2026-01-02")
    second.checkpoint(2)
    said = []
    late = mirror_of(tmp_path / "elsewhere" / "a", tmp_path / "drive", second, said.append)
    late.changed(None)
    assert not late.finish(0.2) and "another run: a/sft there is another run, begun 2026-01-01" in said[0]
    assert json.loads((tmp_path / "drive" / "a" / "sft" / "stage.json").read_text())["id"] == "one"
    mirror.close(), late.close()


def test_a_stage_whose_end_was_not_copied_is_copied_by_the_same_command(tmp_path):
    stage = AStage(tmp_path / "a")
    stage.checkpoint(2)
    stage.finish()
    said = []
    catch_up(config_of(tmp_path / "a", tmp_path / "drive"), stage.dir, said.append)
    assert "adapter" in there(tmp_path / "drive" / "a" / "sft") and len(said) == 1
    catch_up(config_of(tmp_path / "a", tmp_path / "drive"), stage.dir, said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("sync", "message"),
    [
        ("{run}", "lies in the run's own folder"),
        ("{run}/copies", "lies in the run's own folder"),
        ("{run}/..", "lies in the run's own folder"),
        ("{file}", "is a file"),
        ("s3://bucket/x", "neither a folder nor hub:OWNER/NAME"),
        ("hub:me", "is no repository's name"),
        ("hub:me/../x", "is no repository's name"),
    ],
)
def test_a_place_that_is_none(tmp_path, sync, message):
    (tmp_path / "file").write_text("x")
    sync = sync.format(run=tmp_path / "a", file=tmp_path / "file")
    with pytest.raises(UserError, match=message):
        place_of(config_of(tmp_path / "a", sync))


def test_the_stages_below_are_copied_too(tmp_path):
    """They may have been trained without ``sync``; a new machine could not go on without them."""
    AStage(tmp_path / "a").finish()
    AStage(tmp_path / "a", "abandoned")
    dpo = AStage(tmp_path / "a", "dpo")
    dpo.checkpoint(2)
    mirror = mirror_of(tmp_path / "a", tmp_path / "drive", dpo)
    mirror.changed(None)
    assert mirror.finish(10)
    mirror.close()
    assert there(tmp_path / "drive" / "a") == ["dpo", "sft"]
    shutil.rmtree(tmp_path / "a")
    restore(config_of(tmp_path / "a", tmp_path / "drive", "dpo"), quiet)
    assert StageDir(tmp_path / "a" / "sft").complete() and StageDir(tmp_path / "a" / "dpo").checkpoints()


# A new machine


@pytest.fixture
def synced(tmp_path):
    """A stage with copies of checkpoint-2, its best, and of checkpoint-4; and the folder where they lie."""
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "a", tmp_path / "drive", stage)
    for step in (2, 4):
        stage.checkpoint(step)
        mirror.changed(2)
        assert mirror.finish(10)
    mirror.close()
    return stage


def brought(tmp_path):
    said = []
    restore(config_of(tmp_path / "a", tmp_path / "drive"), said.append)
    return said


def test_a_new_machine_gets_what_was_there(tmp_path, synced):
    before = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    shutil.rmtree(tmp_path / "a")
    assert brought(tmp_path) == [f"{tmp_path / 'a' / 'sft'} was fetched from {tmp_path / 'drive'}, at checkpoint-4"]
    assert before == {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert brought(tmp_path) == []  # it is here now


def test_a_torn_copy_is_said_and_the_one_before_taken(tmp_path, synced):
    shutil.rmtree(tmp_path / "a")
    copy = tmp_path / "drive" / "a" / "sft"
    (copy / "checkpoint-4" / "state.safetensors").write_text("weights of 5")
    said = brought(tmp_path)
    assert "a/sft/checkpoint-4: state.safetensors has another hash than was written; taking the one before" in said[0]
    assert "at checkpoint-2" in said[1]
    assert [p.name for p in StageDir(tmp_path / "a" / "sft").checkpoints()] == ["checkpoint-2"]
    shutil.rmtree(tmp_path / "a")
    (copy / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(UserError, match="every checkpoint of a/sft there is damaged"):
        brought(tmp_path)
    assert not (tmp_path / "a" / "sft").exists()


def test_a_damaged_checkpoint_here_is_replaced_by_its_copy(tmp_path, synced):
    here = tmp_path / "a" / "sft" / "checkpoint-4" / "state.safetensors"
    here.write_text("weights of 5")
    assert "at checkpoint-4" in brought(tmp_path)[0]
    assert here.read_text() == "weights of 4"


def test_what_is_newer_here_stays(tmp_path, synced):
    synced.checkpoint(6)
    assert brought(tmp_path) == []
    assert [p.name for p in synced.dir.checkpoints()] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_another_run_of_that_name_is_not_mixed_with_it(tmp_path, synced):
    shutil.rmtree(tmp_path / "a")
    AStage(tmp_path / "a", id="two").checkpoint(2)
    info = StageDir(tmp_path / "a" / "sft").info()
    StageDir(tmp_path / "a" / "sft").write_info({**info, "created": "2026-02-02"})
    with pytest.raises(UserError, match=r"holds another run named a, begun 2026-01-01, than .*/a is"):
        brought(tmp_path)


def test_a_start_that_kept_nothing_gives_way(tmp_path, synced):
    shutil.rmtree(tmp_path / "a")
    AStage(tmp_path / "a", id="two")
    assert "at checkpoint-4" in brought(tmp_path)[0]


def test_a_start_that_was_killed_while_it_fetched_is_in_nobodys_way(tmp_path, synced):
    """What it left aside looks like a stage: half a one, or a whole one."""
    shutil.rmtree(tmp_path / "a")
    for name, text in ((".sft.0123abcd", '{"status"'), (".dpo.89abcdef", '{"status": "complete", "id": "two"}')):
        (tmp_path / "a" / name / "checkpoint-2").mkdir(parents=True)
        (tmp_path / "a" / name / "stage.json").write_text(text)
    assert newest_run(tmp_path) is None
    with pytest.raises(UserError, match="no complete stage"):
        chain_of_run(tmp_path / "a")
    assert "at checkpoint-4" in brought(tmp_path)[0]
    assert there(tmp_path / "a") == ["sft"]


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path, synced):
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a" / "sft").mkdir(parents=True)
    (tmp_path / "a" / "sft" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not a stage of a run"):
        brought(tmp_path)
    assert (tmp_path / "a" / "sft" / "thesis.tex").is_file()


def test_links_and_broken_files_there_are_not_followed(tmp_path, synced):
    shutil.rmtree(tmp_path / "a")
    copy = tmp_path / "drive" / "a" / "sft"
    (tmp_path / "secret").write_text("s")
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link or a device"):
        brought(tmp_path)
    (copy / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"a/sft/stage.json is not the JSON object that a run writes"):
        brought(tmp_path)


def test_a_place_that_cannot_be_asked(tmp_path, synced, monkeypatch):
    """With nothing here it must not begin anew; with the run here it goes on."""

    def away(self, folder):
        raise folder_file.PlaceError("not connected", "the drive is gone")

    monkeypatch.setattr(folder_file.FolderPlace, "names", away)
    assert brought(tmp_path) == [
        f"sync: {tmp_path / 'drive'}: not connected: the drive is gone; going on with what is here"
    ]
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match="Whether the run lies there is not known"):
        brought(tmp_path)
    assert not (tmp_path / "a").exists()


# The hub


def test_the_hub_holds_whole_states_in_a_private_repository(tmp_path, hub):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "a", "hub:me/copies", stage)
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
    said = []
    restore(config_of(tmp_path / "a", "hub:me/copies"), said.append)
    after = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert after == {path: data for path, data in before.items() if "checkpoint" not in str(path)}
    assert "complete" in said[0] and "hf_secret" not in str(said)


def test_the_hub_fails_in_every_way_and_the_copy_comes_through(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_tests")
    stage = AStage(tmp_path / "a")
    said = []
    mirror = mirror_of(tmp_path / "a", "hub:me/copies", stage, said.append)
    stage.checkpoint(2)
    mirror.changed(None)
    assert mirror.finish(10)
    hub.faults = [
        http_error(503), http_error(429, {"Retry-After": "0.01"}), ConnectionResetError("reset by peer"), http_error(403),
        http_error(503), ValueError("hf_secret_of_the_tests is no token"),
    ]  # fmt: skip
    stage.checkpoint(4)
    mirror.changed(None)
    assert mirror.finish(10)
    kinds = ["server error (503)", "rate limit (429)", "network", "not permitted (403)", "ValueError"]
    assert [next(kind for kind in kinds if kind in line) for line in said[:-1]] == kinds and "up to date" in said[-1]
    assert "hf_secret" not in str(said) and "***" in said[-2]
    mirror.close()


def test_a_commit_that_breaks_leaves_what_was_there(tmp_path, hub):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "a", "hub:me/copies", stage)
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
    monkeypatch.setattr(hub_file, "SQUASH_EVERY", 2)
    place = hub_file.HubPlace("me/copies")
    place.prepare()
    for step in range(4):
        place.put("a/sft", {"config.yaml": b"%d" % step}, [])
    assert hub.squashed == 2 and len(hub.repos["me/copies"]) == 1 and place.read("a/sft/config.yaml") == b"3"


def test_the_calls_are_those_of_the_real_hub():
    """The hub of these tests takes what the library's own takes."""
    for name in ("create_repo", "list_repo_tree", "hf_hub_download", "create_commit", "super_squash_history"):
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (_Api, HfApi))
        assert set(ours) - {"repo"} < set(theirs) and list(theirs)[1] == "repo_id"
        by_place = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
        assert list(theirs)[2 : 2 + len(by_place)] == by_place


def test_a_new_machine_and_the_hub_away(tmp_path, hub):
    hub.faults = [http_error(503)]
    with pytest.raises(UserError, match=r"server error \(503\).* Whether the run lies there is not known"):
        restore(config_of(tmp_path / "a", "hub:me/copies"), quiet)
    restore(config_of(tmp_path / "a", "hub:me/copies"), quiet)  # no such repository yet
    assert not (tmp_path / "a").exists()


def test_without_a_token_or_offline_it_is_said_at_the_start(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(hub_file, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the hub"):
        place_of(config_of(tmp_path / "a", "hub:me/copies"))
    monkeypatch.setattr(hub_file.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        place_of(config_of(tmp_path / "a", "hub:me/copies"))


# End to end


@pytest.fixture(scope="module")
def undisturbed(tiny_base, chat_rows, pair_rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mine"
    run_sft(load_config("sft", None, words(tiny_base, out, chat_rows, **SETTINGS)), say=quiet)
    run_dpo(load_config("dpo", None, dpo_words(tiny_base, out, pair_rows, precompute_ref_log_probs=True)), say=quiet)
    return out


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_both_stages_go_on_from_the_copy_bit_for_bit(
    undisturbed, tiny_base, chat_rows, pair_rows, tmp_path, monkeypatch, where, hub, at_once
):
    monkeypatch.chdir(tmp_path)
    out, sync = Path("runs/mine"), "hub:me/copies" if where == "hub" else tmp_path / "drive"
    said = []

    def sft():
        loaded = resolve_run(
            "sft", None, words(tiny_base, out, chat_rows, sync=sync, **SETTINGS), say=said.append, fetch=True
        )
        run_sft(loaded, say=said.append)

    def dpo():
        given = [
            w
            for w in dpo_words(tiny_base, out, pair_rows, precompute_ref_log_probs=True, sync=sync)
            if "output_dir" not in w
        ]
        run_dpo(resolve_run("dpo", None, given, say=said.append, fetch=True), say=said.append)

    with killed_at(3):
        sft()
    shutil.rmtree(tmp_path / "runs")
    sft()
    assert any("mine/sft was fetched from" in line and "checkpoint-2" in line for line in said)
    assert read_adapter(out / "sft" / "adapter").sha256 == read_adapter(undisturbed / "sft" / "adapter").sha256
    assert metrics(out / "sft") == metrics(undisturbed / "sft")
    with killed_at(3):
        dpo()
    shutil.rmtree(tmp_path / "runs")
    said.clear()
    dpo()
    assert any("sft was fetched" in line and "complete" in line for line in said)
    assert any("dpo was fetched" in line and "checkpoint-2" in line for line in said)
    assert any("reference log-probabilities read from" in line for line in said)
    for part in ("adapter", "delta"):
        assert read_adapter(out / "dpo" / part).sha256 == read_adapter(undisturbed / "dpo" / part).sha256
    assert metrics(out / "dpo") == metrics(undisturbed / "dpo")
    assert len(StageDir(out / "dpo").info()["resumed"]) == 1
