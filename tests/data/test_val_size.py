"""Rows that are held out by their content."""

import pytest

from tests.data.test_sources import messages, turns, write
from zephyr_lite.config.load import DatasetSpec, load_config
from zephyr_lite.data.load import NothingHeldOut, load_rows
from zephyr_lite.errors import UserError


def sides(paths, method="sft", size="auto", **options):
    """The training rows and the held-out ones."""
    specs = [DatasetSpec(path=path, val_size=size, **options) for path in paths]
    held_out = [spec.model_copy(update={"part": "test"}) for spec in specs]
    return [load_rows(each, method, seed=1) for each in (specs, held_out)]


def chats(count, start=0):
    return [{"messages": turns(f"Question {n}?", f"Answer {n}.")} for n in range(start, start + count)]


def said(rows):
    return {each[0]["content"] for each in messages(rows)}


@pytest.mark.parametrize(
    ("rows", "size", "held_out"),
    [(20, "auto", 4), (30, "auto", 5), (200, "auto", 10), (30, 0.1, 3), (30, 7, 7)],
)
def test_the_number_of_held_out_rows(tmp_path, rows, size, held_out):
    train, test = sides([write(tmp_path / "a.jsonl", chats(rows))], size=size)
    assert len(said(test)) == held_out and said(train) | said(test) == {f"Question {n}?" for n in range(rows)}
    assert not said(train) & said(test) and train.read == rows - held_out
    assert f"{held_out} of {rows} rows are held out, and not learned; val_size=0 trains on all" in train.notes


def test_equal_rows_are_on_one_side_and_counted(tmp_path):
    """Also those of another file; a held-out row is read once."""
    files = [write(tmp_path / "a.jsonl", [*chats(30), *chats(30)]), write(tmp_path / "b.jsonl", chats(20, 20))]
    train, test = sides(files)
    assert not said(train) & said(test) and len(messages(test)) == len(said(test)) == 5
    assert train.notes[-1].endswith("; 40 rows are copies of others, on the same side")


def test_pairs_with_one_prompt_are_on_one_side(tmp_path):
    rows = [
        {"prompt": f"Question {n}?", "chosen": f"Good {k}.", "rejected": "Bad."} for n in range(10) for k in range(3)
    ]
    train, test = sides([write(tmp_path / "a.jsonl", rows)], "dpo")
    prompts = [{row["prompt"][0]["content"] for row in each.values()} for each in (train, test)]
    assert not prompts[0] & prompts[1] and [len(each.dataset) for each in (train, test)] == [24, 6]


def test_too_few_rows_are_all_trained_on_unless_a_number_is_set(tmp_path):
    spec = DatasetSpec(path=write(tmp_path / "a.jsonl", chats(4)), val_size="auto")
    assert len(load_rows([spec], "sft", seed=1).dataset) == 4
    with pytest.raises(NothingHeldOut, match="too few rows"):
        load_rows([spec.model_copy(update={"part": "test"})], "sft", seed=1)
    with pytest.raises(UserError, match="val_size holds 4 of 4 different rows out") as error:
        sides([spec.path], size=4)
    assert "val_size=0" in error.value.hint


def test_the_key_makes_the_held_out_data_set():
    config = load_config("sft", None, ["dataset=a.jsonl", "--val_set_size", "0.1"]).config
    assert config.dataset[0].val_size == 0.1 and config.eval_dataset[0].part == "test"
    assert load_config("sft", None, ["dataset=a.jsonl"]).config.eval_dataset == []
    again = type(config).model_validate({**config.model_dump(), "val_size": 0})
    assert again.eval_dataset == [] and again.dataset == [DatasetSpec(path="a.jsonl")]
    for other in ("eval_dataset=b.jsonl", "dataset.test_size=3"):
        with pytest.raises(UserError, match="val_size does not go together with eval_dataset or test_size"):
            load_config("sft", None, ["dataset=a.jsonl", "val_size=0.1", other])
