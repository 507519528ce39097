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
        with self._turn:
            assert self._turn.wait_for(lambda: self._wanted is None and self._at_work is None, timeout=20)

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
    mirror.close()
    return stage


def brought(tmp_path):
    said = []
    with messages_to(said.append):
        restore(str(tmp_path / "drive"), StageDir(tmp_path / "a" / "sft"))
    return said


def test_a_new_machine_gets_what_was_there(tmp_path, synced):
    before = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    shutil.rmtree(tmp_path / "a")
    assert brought(tmp_path) == [f"{tmp_path / 'a' / 'sft'} was fetched from {tmp_path / 'drive'}, at checkpoint-4"]
    assert before == {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert brought(tmp_path) == []  # it is here now


def test_a_place_that_has_nothing_is_said(tmp_path):
    """A drive that is not mounted looks like one that is new."""
    (line,) = brought(tmp_path)
    assert line.startswith(f"sync: {tmp_path / 'drive'} has nothing of a yet, so it starts here") and "mounted" in line


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
    with pytest.raises(UserError, match=r"holds another run named a, begun 2026-01-01, not .*/a"):
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
    with pytest.raises(UserError, match=r"metrics.jsonl is a link"):
        brought(tmp_path)
    (copy / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"a/sft/stage.json is not a JSON object"):
        brought(tmp_path)


def test_a_place_that_cannot_be_asked(tmp_path, synced, monkeypatch):
    """With nothing here it must not begin anew; with the run here it goes on."""

    def away(self, folder):
        raise OSError("the drive is gone")

    monkeypatch.setattr(FolderPlace, "names", away)
    assert brought(tmp_path) == [f"sync: {tmp_path / 'drive'}: the drive is gone; continuing with the files here"]
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match="Whether it has the run is not known"):
        brought(tmp_path)
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
