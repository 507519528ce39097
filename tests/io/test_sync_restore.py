"""The machine disappeared: a new one goes on from what lies elsewhere, to the same bits."""

import shutil
from pathlib import Path

import pytest

from tests.messages import messages_to
from tests.synced import AStage, hub_in_memory, mirror_of, there
from tests.train.test_train import dpo_words, killed_at, metrics, words
from zephyr_lite.config.load import load_config
from zephyr_lite.config.resolve import resolve_run
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir, newest_run
from zephyr_lite.io.sync import FolderPlace, Mirror, restore
from zephyr_lite.model.chain import chain_of_run
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

SETTINGS = {"lora_dropout": 0.1, "num_train_epochs": 2, "save_total_limit": 1}


@pytest.fixture
def hub(monkeypatch):
    return hub_in_memory(monkeypatch)


@pytest.fixture
def at_once(monkeypatch):
    """A network so fast that a copy is there before the next step."""
    plain = Mirror.changed

    def changed(self, best):
        plain(self, best)
        self._thread.join(20)

    monkeypatch.setattr(Mirror, "changed", changed)


# A new machine


@pytest.fixture
def synced(tmp_path):
    """A stage with copies of checkpoint-2, its best, and of checkpoint-4; and the folder where they lie."""
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


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_machine_gets_what_was_there(tmp_path, synced, brought):
    before = files(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    assert brought() == [f"{tmp_path / 'a' / 'sft'} was fetched from {tmp_path / 'drive'}, at checkpoint-4"]
    assert before == files(tmp_path / "a")
    assert brought() == []  # it is here now


def test_a_place_that_has_nothing_is_reported(tmp_path, brought):
    """A drive that is not mounted looks like one that is new."""
    (line,) = brought()
    assert line.startswith(f"sync: {tmp_path / 'drive'} has nothing of a yet, so it starts here") and "mounted" in line


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


@pytest.mark.parametrize("left", ["a stage without a checkpoint", "temporary folders"])
def test_a_start_that_kept_nothing_gives_way(tmp_path, synced, brought, left):
    shutil.rmtree(tmp_path / "a")
    if left == "temporary folders":
        for name, text in ((".sft.0123abcd", '{"status"'), (".dpo.89abcdef", '{"status": "complete", "id": "two"}')):
            (tmp_path / "a" / name / "checkpoint-2").mkdir(parents=True)
            (tmp_path / "a" / name / "stage.json").write_text(text)
        assert newest_run(tmp_path) is None
        with pytest.raises(UserError, match="no complete stage"):
            chain_of_run(tmp_path / "a")
    else:
        AStage(tmp_path / "a", id="two")
    assert "at checkpoint-4" in brought()[0]
    assert there(tmp_path / "a") == ["sft"]


def test_a_folder_of_the_users_is_not_replaced(tmp_path, synced, brought):
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a" / "sft").mkdir(parents=True)
    (tmp_path / "a" / "sft" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not a stage of a run"):
        brought()
    assert (tmp_path / "a" / "sft" / "thesis.tex").is_file()


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
            for w in dpo_words(tiny_base, out, pair_rows, precompute_ref_log_probs=True, sync=sync)
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
