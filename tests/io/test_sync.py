"""Copies of a stage in a folder or on the hub."""

import shutil
from pathlib import Path

import pytest

from tests.fake_hub import http_error
from tests.messages import messages_to
from tests.synced import AStage, hub_in_memory, mirror_of, there
from tests.train.test_train import dpo_words, killed_at, metrics, words
from zephyr_lite.config.load import load_config
from zephyr_lite.config.resolve import resolve_run
from zephyr_lite.errors import UserError
from zephyr_lite.io import sync as sync_file
from zephyr_lite.io.atomic import manifest_fault
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.io.sync import FolderPlace, Mirror, restore
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(sync_file, "RETRY", 0.01)


@pytest.fixture
def hub(monkeypatch):
    return hub_in_memory(monkeypatch)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def checkpointed(mirror, stage, *steps, best=None):
    for step in steps:
        stage.checkpoint(step)
        mirror.changed(best if best in steps and step >= best else None)
        assert mirror.finish(10)


def test_a_damaged_checkpoint_does_not_replace_a_good_copy(tmp_path, said):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    checkpointed(mirror, stage, 2)
    (stage.checkpoint(4) / "state.safetensors").write_text("weights of 5")
    assert not mirror.finish(attempts=2)
    assert "checkpoint-4: state.safetensors has another hash than was written" in said[0]
    assert "checkpoint-2" in there(tmp_path / "drive" / "a" / "sft")


def test_the_newest_and_the_best_are_copied_completely(tmp_path):
    stage = AStage(tmp_path / "runs" / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    checkpointed(mirror, stage, 2, 4, 6, 8, best=4)
    copy = tmp_path / "drive" / "a" / "sft"
    assert there(copy) == ["checkpoint-4", "checkpoint-8", "config.yaml", "metrics.jsonl", "stage.json"]
    assert all(manifest_fault(copy / f"checkpoint-{step}") is None for step in (4, 8))
    stage.finish()
    assert mirror.finish(10)
    before = files(copy)
    assert before[Path("adapter/adapter_model.safetensors")] == b"adapter" and b"complete" in before[Path("stage.json")]
    shutil.rmtree(tmp_path / "drive")  # a place that lost everything gets all of it again
    assert mirror.finish(10) and files(copy) == before and mirror.busy() == frozenset()


# The hub


def test_every_commit_on_the_hub_is_a_state_to_continue_from(tmp_path, hub):
    AStage(tmp_path / "a", "below").finish()  # may have been trained without ``sync``
    stage = AStage(tmp_path / "a")
    mirror = mirror_of("hub:me/copies", stage)
    checkpointed(mirror, stage, 2, 4, 6, best=4)
    assert hub.private == {"me/copies"}
    for tree in hub.repos["me/copies"][2:]:
        names = {path.split("/")[2] for path in tree if path.startswith("a/sft/")}
        assert {"stage.json", "config.yaml", "metrics.jsonl"} < names
        assert sum(name.startswith("checkpoint-") for name in names) in (1, 2)
    assert {p.split("/")[2] for p in hub.tree("me/copies") if "checkpoint" in p} == {"checkpoint-4", "checkpoint-6"}
    stage.finish()
    assert mirror.finish(10)
    before = files(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    restore("hub:me/copies", stage.dir)
    assert files(tmp_path / "a") == {path: data for path, data in before.items() if "checkpoint" not in str(path)}


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


# A new machine


@pytest.fixture
def synced(tmp_path):
    """A stage with copies of checkpoint-2, its best, and of checkpoint-4; and the folder with them."""
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    for step in (2, 4):
        stage.checkpoint(step)
        mirror.changed(2)
        assert mirror.finish(10)
    return stage


@pytest.fixture
def brought(tmp_path, said):
    """Restores the stage ``a/sft``; returns the messages."""

    def run():
        said.clear()
        restore(str(tmp_path / "drive"), StageDir(tmp_path / "a" / "sft"))
        return list(said)

    return run


def test_a_new_machine_gets_what_was_there(tmp_path, synced, brought):
    before = files(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    assert brought() == [f"{tmp_path / 'a' / 'sft'} was fetched from {tmp_path / 'drive'}, at checkpoint-4"]
    assert before == files(tmp_path / "a")
    assert brought() == []  # it is here now


def test_of_a_damaged_copy_the_checkpoint_before_is_taken(tmp_path, synced, brought):
    shutil.rmtree(tmp_path / "a")
    copy = tmp_path / "drive" / "a" / "sft"
    (copy / "checkpoint-4" / "state.safetensors").write_text("weights of 5")
    first, second = brought()
    assert "sft/checkpoint-4: state.safetensors has another hash than was written" in first
    assert "at checkpoint-2" in second
    assert [p.name for p in StageDir(tmp_path / "a" / "sft").checkpoints()] == ["checkpoint-2"]
    shutil.rmtree(tmp_path / "a")
    (copy / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(UserError, match="a/sft is damaged there"):
        brought()
    assert not (tmp_path / "a" / "sft").exists()


def test_a_damaged_checkpoint_here_is_replaced_by_its_copy(tmp_path, synced, brought):
    here = tmp_path / "a" / "sft" / "checkpoint-4" / "state.safetensors"
    here.write_text("weights of 5")
    assert "at checkpoint-4" in brought()[0] and here.read_text() == "weights of 4"
    synced.checkpoint(6)  # newer than the copy
    assert brought() == [] and len(synced.dir.checkpoints()) == 3


def test_another_run_of_that_name_is_not_mixed_with_it(tmp_path, synced, brought):
    shutil.rmtree(tmp_path / "a")
    AStage(tmp_path / "a", id="two").checkpoint(2)
    info = StageDir(tmp_path / "a" / "sft").info()
    StageDir(tmp_path / "a" / "sft").write_info({**info, "created": "2026-02-02"})
    with pytest.raises(UserError, match=r"holds another run named a, not .*/a"):
        brought()


def test_a_place_that_cannot_be_read(tmp_path, synced, brought, monkeypatch):
    """With nothing here the run must not start over; with the run here it continues."""

    def away(self, patterns):
        raise OSError("the drive is gone")

    monkeypatch.setattr(FolderPlace, "files", away)
    assert brought() == [f"sync: {tmp_path / 'drive'}: the drive is gone; continuing with the files here"]
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match="Whether it has the run is not known"):
        brought()
    assert not (tmp_path / "a").exists()


# End to end

SETTINGS = {"warmup_ratio": 0.1, "lora_dropout": 0.1, "num_train_epochs": 2, "save_total_limit": 1}


@pytest.fixture
def at_once(monkeypatch):
    """A network so fast that a copy is there before the next step."""
    plain = Mirror.changed

    def changed(self, best):
        plain(self, best)
        self._thread.join(20)

    monkeypatch.setattr(Mirror, "changed", changed)


@pytest.fixture(scope="module")
def undisturbed(tiny_base, chat_rows, pair_rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mine"
    run_sft(load_config("sft", None, words(tiny_base, out, chat_rows, **SETTINGS)))
    run_dpo(load_config("dpo", None, dpo_words(tiny_base, out, pair_rows, precompute_ref_log_probs=True)))
    return out


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_both_stages_go_on_from_the_copy_bit_for_bit(
    undisturbed, tiny_base, chat_rows, pair_rows, tmp_path, monkeypatch, where, hub, at_once
):
    monkeypatch.chdir(tmp_path)
    out, sync = Path("runs/mine"), "hub:me/copies" if where == "hub" else tmp_path / "drive"
    said = []

    def sft():
        with messages_to(said.append):
            loaded = resolve_run("sft", None, words(tiny_base, out, chat_rows, sync=sync, **SETTINGS), fetch=True)
        with messages_to(said.append):
            run_sft(loaded)

    def dpo():
        given = [
            w
            for w in dpo_words(tiny_base, out, pair_rows, precompute_ref_log_probs=True, warmup_ratio=0.1, sync=sync)
            if "output_dir" not in w
        ]
        with messages_to(said.append):
            run_dpo(resolve_run("dpo", None, given, fetch=True))

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


def test_an_old_copy_is_deleted_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
    stage = AStage(tmp_path / "a")
    mirror = mirror_of(tmp_path / "drive", stage)
    seen, plain = [], sync_file.remove_folder

    def watched(path):
        seen.append((path.name, manifest_fault(path.parent / "checkpoint-4")))
        plain(path)

    monkeypatch.setattr(sync_file, "remove_folder", watched)
    checkpointed(mirror, stage, 2, 4)
    assert seen == [("checkpoint-2", None)]
