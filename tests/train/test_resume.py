"""Resuming a stage: which changes it accepts, which it refuses, and what it prints of both."""

import json
import re
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.train.test_train import dpo_words, killed_at, words
from zephyr_lite.config.load import load_config
from zephyr_lite.data.templates import TEMPLATES
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.merge.command import run_merge
from zephyr_lite.model.base_folder import _fingerprint_of_files
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train import setup
from zephyr_lite.train.resume import StageComplete
from zephyr_lite.train.sft import run_sft

SETTINGS = {"batch_size": 2, "num_train_epochs": 1, "max_length": 64, "save_steps": 1}


@pytest.fixture(scope="module")
def places(tiny_base, chat_rows, tmp_path_factory):
    """A base, rows and held-out rows that tests may change, and a run that was killed and one that was finished."""
    root = tmp_path_factory.mktemp("ground")
    shutil.copytree(tiny_base, root / "base")
    shutil.copy(chat_rows, root / "chat.jsonl")
    shutil.copy(chat_rows, root / "held.jsonl")
    with killed_at(2):
        run_sft(load_config("sft", None, given(root)))
    shutil.copytree(root / "run", root / "killed")
    run_sft(load_config("sft", None, given(root)))
    shutil.move(root / "run", root / "finished")
    return root


@pytest.fixture
def place(places, tmp_path):
    """A copy of it, whose ``run`` was killed."""
    shutil.copytree(places, tmp_path, dirs_exist_ok=True)
    shutil.move(tmp_path / "killed", tmp_path / "run")
    for run in ("run", "finished"):  # as if it had been there from the beginning
        for name in ("config.yaml", "stage.json"):
            file = tmp_path / run / "sft" / name
            file.write_text(file.read_text().replace(str(places), str(tmp_path)))
    return tmp_path


def given(root, **changes):
    held = {"eval_dataset.path": root / "held.jsonl"}
    return words(root / "base", root / "run", root / "chat.jsonl", **{**held, **SETTINGS, **changes})


def opened(root, **changes):
    return setup.setup_stage("sft", load_config("sft", None, given(root, **changes)))


def refused(root, **changes):
    with pytest.raises(UserError) as error:
        opened(root, **changes)
    assert not isinstance(error.value, StageComplete)
    return error.value.message


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file, lines):
    file.write_text("".join(file.read_text().splitlines(keepends=True)[lines:]))


# What is refused


def test_every_difference_is_shown_with_old_and_new(place):
    weights = load_file(place / "base" / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, place / "base" / "model.safetensors", metadata={"format": "pt"})
    edit(place / "run" / "sft" / "stage.json", adapters=[{"path": "zero/adapter", "sha256": "ab" * 32}])
    lines = refused(
        place, learning_rate=1e-4, lora_target_modules="[q_proj]", eval_steps=1
    ).splitlines()  # which may change
    assert lines[0].endswith("run/sft: was started with another configuration or on other files than these:")
    assert lines[1:] == [
        "  lora_target_modules: 'all-linear' then, ['q_proj'] now",
        "  learning_rate: 0.005 then, 0.0001 now",
    ]
    lines = refused(place).splitlines()
    assert re.fullmatch(rf"  base {place / 'base'}: weights [0-9a-f]{{12}} then, [0-9a-f]{{12}} now", lines[1])
    assert lines[2:] == ["  adapters below: zero/adapter (abababababab) then, none now"]


def test_other_rows_another_template_and_another_tokenizer_are_named(place):
    file = place / "chat.jsonl"
    rows = file.read_text()
    cut(file, 1)
    message = refused(place)
    assert "data: read 8 then, 7 now" in message and "data: kept 8 then, 7 now" in message
    file.write_text(rows.replace("the Nile and the Amazon", "the Amazon and the Nile"))  # the counts are the same
    assert re.search(r"these:\n  data: fingerprint \w{12} then, \w{12} now$", refused(place))
    file.write_text(rows)
    opened(place, chat_template="zephyr")  # what auto took
    (place / "mine.jinja").write_text(TEMPLATES["zephyr"].replace("<|user|>", "<|human|>"))
    message = refused(place, chat_template=place / "mine.jinja")
    assert f"chat_template: 'zephyr' then, '{place / 'mine.jinja'}' now" in message
    assert re.search(r"data: template_sha256 \w{12} then, \w{12} now", message) and "tokenizer" not in message
    file = place / "base" / "tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["merges"] = told["model"]["merges"][:-20]
    file.write_text(json.dumps(told))
    message = refused(place, chat_template="zephyr")
    assert re.search(r"data: tokenizer_sha256 \w{12} then, \w{12} now", message) and "template_sha" not in message


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"dropconnect": 0.1}, "dropconnect is 0.1: there is no such key"),
        ({"memory": {"reference": "own"}}, "memory.reference is 'own': there is no such key"),
        ({"memory": {"keep": 7}}, "memory.keep is 7"),
    ],
)
def test_a_key_or_value_of_another_version(place, changes, fault):
    file = place / "run" / "sft" / "config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))
    assert f"{file}: {fault}" in refused(place)


def test_a_key_that_an_earlier_version_did_not_have(place):
    """It did what the default does."""
    file = place / "run" / "sft" / "config.yaml"
    old = yaml.safe_load(file.read_text())
    del old["sync"], old["bnb_4bit_use_double_quant"], old["dataset"][0]["test_size"], old["dataset"][0]["part"]
    file.write_text(yaml.safe_dump(old))
    opened(place)


# What is allowed


def same_result(place):
    run, finished = (read_adapter(place / name / "sft" / "adapter").sha256 for name in ("run", "finished"))
    return run == finished


def test_what_may_change_is_reported_in_one_line_and_kept(place, said):
    run_sft(load_config("sft", None, given(place, eval_steps=1, logging_steps=2)))
    line = "eval_steps: 2 then, 1 now; logging_steps: 1 then, 2 now"
    assert f"changed since this stage was last worked on: {line}" in said
    (entry,) = StageDir(place / "run" / "sft").info()["resumed"]
    assert entry["step"] == 2 and entry["changed"] == line.split("; ") and entry["machine"]["device"] and entry["at"]
    assert same_result(place)


def test_the_same_things_elsewhere_are_the_same(place, said):
    for name in ("base", "chat.jsonl", "held.jsonl"):
        shutil.move(place / name, place / f"moved-{name}")
    moved = {"model_name_or_path": place / "moved-base", "dataset.path": place / "moved-chat.jsonl"}
    run_sft(load_config("sft", None, given(place, **moved, **{"eval_dataset.path": place / "moved-held.jsonl"})))
    (line,) = [line for line in said if line.startswith("changed since")]
    assert f"model_name_or_path: '{place / 'base'}' then, '{place / 'moved-base'}' now" in line
    assert f"; dataset: {place / 'chat.jsonl'} then, {place / 'moved-chat.jsonl'} now" in line
    assert "do not count" not in str(said) and same_result(place)
    # merge looks there
    assert StageDir(place / "run" / "sft").info()["base"]["name_or_path"] == str(place / "moved-base")
    for name in ("base", "chat.jsonl", "held.jsonl"):  # and back
        shutil.move(place / f"moved-{name}", place / name)
    with pytest.raises(StageComplete):
        opened(place)
    (place / "other.jsonl").write_text((place / "chat.jsonl").read_text())
    cut(place / "other.jsonl", 2)
    message = refused(
        place, **{"dataset.path": place / "other.jsonl"}
    )  # a finished stage is not passed over for others
    assert "was finished with another configuration or on other files" in message and "read 8 then, 6 now" in message


def test_a_stage_of_an_earlier_version_is_resumed(place):
    file = place / "run" / "sft" / "stage.json"
    told = json.loads(file.read_text())
    for key in ("format", "id", "machine", "eval_data"):
        told.pop(key)
    told["data"] = {k: v for k, v in told["data"].items() if not k.endswith("sha256")}
    told["base"]["fingerprint"] = _fingerprint_of_files(place / "base")
    file.write_text(json.dumps(told))
    opened(place)
    info = StageDir(place / "run" / "sft").info()
    assert info["format"] == 1 and len(info["id"]) == 32


@pytest.mark.parametrize("what", ["chat template", "tokenizer"])
def test_a_stage_is_rendered_as_the_one_below_it_was(place, pair_rows, what):
    """Its template and its tokenizer are files beside its adapter, and may be damaged so that they can still be read."""
    adapter = place / "finished" / "sft" / "adapter"
    if what == "tokenizer":
        file = adapter / "tokenizer.json"
        told = json.loads(file.read_text())
        told["model"]["merges"].pop()
        file.write_text(json.dumps(told))
    else:
        file = adapter / "chat_template.jinja"
        file.write_text(file.read_text().replace("|>", ">"))
    message = f"{re.escape(str(adapter))}: the {what} there is not the one that sft was trained with"
    with pytest.raises(UserError, match=message):
        run_merge(place / "out", run=place / "finished", check=False)
    loaded = load_config("dpo", None, dpo_words(place / "base", place / "finished", pair_rows))
    with pytest.raises(UserError, match=message):
        setup.setup_stage("dpo", loaded)
