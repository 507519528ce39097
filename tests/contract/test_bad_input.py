"""Claim 11: bad input ends with exit code 2 and names its file and place, and nothing is half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import CONVERSATIONS, make_model, make_tokenizer
from zephyr_lite.cli import app as cli


@pytest.fixture
def refused(invoke, tmp_path):
    """A command that must end with exit code 2, a message that names what is asked for, and nothing half-written."""

    def run(*words: object, says: tuple[str, ...]) -> str:
        before = files_of_runs(tmp_path)
        code, out, err = invoke(*words)
        assert code == 2, out + err
        # a command that chose the run itself has said which one
        chosen = "runs/t, the newest run; --run runs/NAME chooses another\n"
        assert err.removeprefix(chosen).startswith("error: ") and "Traceback" not in out + err
        for text in says:
            assert text in err, err
        assert files_of_runs(tmp_path) == before
        return out + err

    return run


def files_of_runs(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if "runs" in p.parts and p.is_file()}


def rows_file(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """As conftest's, with rows of whole NF4 blocks: bitsandbytes' AVX-512 kernel mixes up the scales of others."""
    folder = tmp_path_factory.mktemp("base")
    make_model(intermediate_size=192).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture
def sft_words(tiny_base, chat_rows):
    return [
        "sft",
        f"model_name_or_path={tiny_base}",
        f"dataset={chat_rows}",
        "max_length=128",
        "batch_size=4",
        "lora_r=4",
        "samples=0",
    ]


@pytest.fixture
def dpo_words(tiny_base, pair_rows):
    return [
        "dpo",
        f"model_name_or_path={tiny_base}",
        f"dataset={pair_rows}",
        "max_length=128",
        "max_prompt_length=64",
        "batch_size=4",
        "lora_r=4",
        "samples=0",
        "max_steps=2",
    ]


def other(words: list[str], **changes: object) -> list[str]:
    """The words with some keys changed."""
    return [w for w in words if w.split("=")[0] not in changes] + [f"{k}={v}" for k, v in changes.items()]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_base, chat_rows, pair_rows) -> Path:
    """A folder with runs/t, both stages complete. Tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    here = Path.cwd()
    os.chdir(folder)
    try:
        common = ["max_length=128", "batch_size=4", "lora_r=4", "samples=0", "max_steps=2", "learning_rate=1e-2"]
        sft = ["sft", f"model_name_or_path={tiny_base}", f"dataset={chat_rows}", "output_dir=runs/t", *common]
        assert cli.run(sft) == 0
        assert (
            cli.run(["dpo", f"dataset={pair_rows}", f"eval_dataset={pair_rows}", *common, "max_prompt_length=64"]) == 0
        )
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "t"


@pytest.mark.parametrize(
    "words", [["sfft"], ["merge"], ["merge", "--out", "x", "--onto", "y"], ["demo", "--no-such"], []]
)
def test_wrong_usage_ends_with_2(invoke, words):
    code, out, err = invoke(*words)
    assert code == 2 and "Traceback" not in out + err


def test_an_unknown_key(refused):
    refused("sft", "--learning-rat", "1", says=("learning_rat", "Did you mean 'learning_rate'?"))


def test_a_missing_file(refused, sft_words):
    refused(*other(sft_words, dataset="nowhere/rows.jsonl"), says=("nowhere/rows.jsonl", "no such file"))


def test_a_missing_configuration(refused):
    refused("sft", "--config", "mine.yaml", says=("mine.yaml", "zephyr-7b/overnight-sft"))


def test_an_empty_file(refused, sft_words, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    refused(*other(sft_words, dataset="rows.jsonl"), says=("rows.jsonl", "empty"))


def test_rows_of_another_schema(refused, sft_words, dpo_words, tmp_path, pair_rows, chat_rows):
    rows_file(tmp_path / "rows.jsonl", [{"title": "a", "body": "b"}])
    refused(*other(sft_words, dataset="rows.jsonl"), says=("rows.jsonl", "title", "dataset.columns.prompt=COLUMN"))
    refused(*other(sft_words, dataset=pair_rows), says=("chosen", "sft needs"))
    refused(*other(dpo_words, dataset=chat_rows, adapters="none"), says=("messages", "dpo needs"))


def test_broken_json(refused, sft_words, tmp_path):
    good = {"messages": turns("a", "b")}
    rows_file(tmp_path / "rows.jsonl", [good, good, '{"messages": [', good])
    refused(*other(sft_words, dataset="rows.jsonl"), says=("rows.jsonl line 3", "Correct the line"))


def test_chosen_equal_to_rejected(refused, dpo_words, tmp_path):
    rows_file(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "same", "rejected": "same"}] * 2)
    words = other(dpo_words, dataset="rows.jsonl", adapters="none")
    refused(*words, says=("chosen", "rejected", "rows.jsonl row 1"))


def test_one_pair_of_equals_does_not_stop_a_run(invoke, dpo_words, tmp_path):
    rows = [{"prompt": q, "chosen": a, "rejected": "No."} for q, a in CONVERSATIONS[:3]]
    rows_file(tmp_path / "rows.jsonl", [*rows, {"prompt": "q", "chosen": "same", "rejected": "same"}])
    code, out, err = invoke(*other(dpo_words, dataset="rows.jsonl", adapters="none", output_dir="runs/x", max_steps=1))
    assert code == 0, err
    assert "left out" in out and "rows.jsonl row 4" in out
    dropped = json.loads((tmp_path / "runs/x/dpo/stage.json").read_text())["data"]["dropped"]
    assert sum(entry["count"] for entry in dropped.values()) == 1


def test_conversations_that_end_with_the_user(invoke, refused, sft_words, tmp_path):
    rows_file(tmp_path / "all.jsonl", [{"messages": turns("only a question")}] * 2)
    refused(*other(sft_words, dataset="all.jsonl"), says=("all.jsonl row 1",))
    rows_file(tmp_path / "some.jsonl", [{"messages": turns("a", "b", "c")}, {"messages": turns("a", "b")}])
    code, out, _ = invoke(*other(sft_words, dataset="some.jsonl"), "--dry-run")
    assert code == 0 and "some.jsonl row 1" in out


def test_a_split_that_does_not_exist(refused, sft_words, tmp_path, chat_rows):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train_sft", "test_sft"):
        shutil.copy(chat_rows, folder / f"{split}.jsonl")
    refused(*other(sft_words, dataset="{path: set, split: train}"), says=("no split 'train'", "test_sft, train_sft"))
    refused(*other(sft_words, dataset="set"), says=("which split", "test_sft"))


def test_a_prompt_longer_than_the_budget(invoke, refused, dpo_words, tmp_path):
    long = {"prompt": "word " * 300, "chosen": "yes", "rejected": "no, no"}
    rows = [{"prompt": q, "chosen": a, "rejected": "No."} for q, a in CONVERSATIONS[:3]]
    rows_file(tmp_path / "some.jsonl", [*rows, long])
    # cut on the left where the budget leaves room for a response …
    words = other(dpo_words, dataset="some.jsonl", adapters="none")
    code, out, _ = invoke(*words, "--dry-run")
    assert code == 0 and "prompt's left" in out
    # … dropped and counted where it does not, and refused where nothing is left
    code, out, err = invoke(*other(words, max_prompt_length=128), "--dry-run")
    assert code == 0, err
    assert "left out" in out and "some.jsonl row 4" in out
    rows_file(tmp_path / "all.jsonl", [long])
    refused(*other(words, dataset="all.jsonl", max_prompt_length=128), says=("all.jsonl row 1", "max_length"))


def test_an_output_folder_that_is_not_ours(refused, sft_words, tmp_path):
    (tmp_path / "mine" / "sft").mkdir(parents=True)
    (tmp_path / "mine" / "sft" / "thesis.txt").write_text("years of work")
    refused(*sft_words, "output_dir=mine", says=("mine/sft", "thesis.txt", "output_dir"))
    assert [p.name for p in (tmp_path / "mine" / "sft").iterdir()] == ["thesis.txt"]


def test_an_adapter_of_another_base(refused, dpo_words, runs, tmp_path):
    make_model(hidden_size=128, num_attention_heads=2, num_key_value_heads=1).save_pretrained(tmp_path / "small")
    make_tokenizer(tmp_path / "small")
    # its shapes say so, where nothing else is known of the adapter
    shutil.copytree(runs / "sft" / "adapter", tmp_path / "foreign")
    words = other(dpo_words, model_name_or_path="small")
    refused(*words, "output_dir=runs/u", "adapters=foreign", says=("foreign", "another base"))
    # a run of ours knows its base, whatever the shapes
    make_model(seed=5, intermediate_size=192).save_pretrained(tmp_path / "twin")
    make_tokenizer(tmp_path / "twin")
    words = other(dpo_words, model_name_or_path="twin")
    refused(*words, "output_dir=runs/u", "adapters=runs/t/sft/adapter", says=("runs/t/sft/adapter", "another model"))


def spoil(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, file)


def test_a_chain_whose_hash_does_not_match(refused, dpo_words, runs):
    spoil(runs / "sft" / "adapter")
    words = [w for w in dpo_words if not w.startswith("model_name")]
    refused(*words, "output_dir=runs/t", "stage=again", says=("sft/adapter", "Restore"))
    refused("merge", "--out", "model", says=("sft/adapter", "Restore"))
    assert not Path("model").exists()


def test_dpo_without_a_stage_below(refused, dpo_words):
    refused(*dpo_words, "output_dir=runs/new", says=("runs/new", "zephyr-lite sft", "adapters=none"))


def test_a_bin_checkpoint_is_not_read(refused, sft_words, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"pickle")
    refused(*other(sft_words, model_name_or_path="./old"), says=("pytorch_model.bin", "safetensors"))


def test_merge_refuses_a_folder_that_is_not_ours(refused, runs, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    refused("merge", "--out", "model", "--overwrite", says=("model", "thesis.txt"))


def test_merge_where_the_base_changed_since(refused, runs, tmp_path):
    info = json.loads((runs / "dpo" / "stage.json").read_text())
    info["base"]["fingerprint"] = "0" * 64
    (runs / "dpo" / "stage.json").write_text(json.dumps(info))
    refused("merge", "--out", "model", says=("not the model", "trained on"))


def test_a_stage_of_the_other_method(refused, sft_words, dpo_words, runs):
    refused(*sft_words, f"output_dir={runs}", "stage=dpo", says=("is a dpo stage",))
    refused(*dpo_words, f"output_dir={runs}", "stage=sft", says=("is a sft stage",))


def test_an_output_dir_that_is_a_file(refused, sft_words, tmp_path):
    (tmp_path / "taken").write_text("mine")
    refused(*sft_words, "output_dir=taken", says=("taken", "Choose another output_dir"))
    assert (tmp_path / "taken").read_text() == "mine"


def test_explicit_adapters_that_count_twice_or_stand_on_nothing(refused, dpo_words, runs, tiny_base, tmp_path):
    sft, whole, delta = (runs / name for name in ("sft/adapter", "dpo/adapter", "dpo/delta"))
    merge = ("merge", "--out", tmp_path / "out", "--base", tiny_base, "--adapter")
    refused(*merge, sft, "--adapter", whole, says=("count twice", str(delta)))
    refused(*merge, delta, says=("only on top", str(whole)))
    refused(*dpo_words, "output_dir=runs/u", f"adapters=[{sft},{whole}]", says=("count twice",))
    refused(*dpo_words, "output_dir=runs/u", f"adapters={delta}", says=("only on top",))
    assert not (tmp_path / "out").exists()
