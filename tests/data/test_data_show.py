"""``zephyr-lite data show``: what it prints is what training gets, token by token."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.conftest import make_tokenizer
from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import DatasetSpec, RunConfig
from zephyr_lite.data.chat_template import Example, resolve_template
from zephyr_lite.data.dataset import prepare
from zephyr_lite.data.preview import example_segments

TABLE = re.compile(r"^ *(\d+) +(\d+) +(\d+)  (\S+) +(yes|no) +(yes|no) +(\d+)  (.*)$")


@pytest.fixture(scope="module")
def no_weights(tiny_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "base"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(folder.glob("*.safetensors"))
    return folder


@pytest.fixture
def show(capsys, tmp_path, monkeypatch, no_weights):
    """Run the command in an empty folder on a base without weights: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(method: str, *words: object) -> tuple[int, str, str]:
        whole = ("val_size=0", "max_length=2048")  # not what is chosen for so few rows
        code = cli.run(["data", "show", method, *whole, *map(str, words), f"model_name_or_path={no_weights}"])
        captured = capsys.readouterr()
        assert not (tmp_path / "runs").exists()
        return code, captured.out, captured.err

    return run


def table(out: str) -> list[dict]:
    names = ("token", "segment", "position", "role", "supervised", "special", "id", "text")
    return [dict(zip(names, match.groups())) for line in out.splitlines() if (match := TABLE.match(line))]


def test_the_table_has_the_ids_mask_and_positions_that_training_gets(show, no_weights, chat_rows):
    code, out, err = show("sft", f"dataset={chat_rows}", "max_length=256", "--table", "--row", "2")
    assert code == 0, err
    tokens = table(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(no_weights)
    config = RunConfig(max_length=256)
    data = prepare([DatasetSpec(path=str(chat_rows))], "sft", config, resolve_template("auto", tokenizer))
    row = [data.examples[index] for index in data.rows[1]]
    assert len(row) > 1
    assert [int(t["id"]) for t in tokens] == np.concatenate([e.ids for e in row]).tolist()
    assert [t["supervised"] == "yes" for t in tokens] == np.concatenate([e.mask for e in row]).tolist()
    assert [int(t["position"]) for t in tokens] == [p for e in row for p in range(len(e.ids))]
    assert [int(t["segment"]) for t in tokens] == [s for s, e in enumerate(row, 1) for _ in e.ids]
    assert {t["id"] for t in tokens if t["special"] == "yes"} == {str(tokenizer.eos_token_id)}
    for example in row:
        assert example.where in out


def test_a_pair_shows_the_prompt_once_and_responses_that_go_on_from_it(show, pair_rows):
    code, out, err = show("dpo", f"dataset={pair_rows}", "--row", "3", "--table")
    assert code == 0, err
    assert "no finished stage sft yet" in out
    tokens = table(out)
    prompt, chosen, rejected = ([t for t in tokens if t["segment"] == s] for s in "123")
    assert "Name␣three␣rivers." in "".join(t["text"] for t in prompt)
    assert all(t["supervised"] == "no" for t in prompt)
    for side, text in (
        (chosen, "The␣Rhine,␣the␣Nile␣and␣the␣Amazon."),
        (rejected, "As␣a␣model␣I␣have␣no␣opinion␣on␣that."),
    ):
        assert "".join(t["text"] for t in side if t["supervised"] == "yes") == text + "</s>"
        assert [int(t["position"]) for t in side] == list(range(len(prompt), len(prompt) + len(side)))
    for part in ("prompt", "chosen", "rejected"):
        assert f": {part}, {pair_rows} row 3" in out


# -- tokens ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["byte level", "mistral"])
def tokenizer(request, tmp_path):
    return make_tokenizer(tmp_path) if request.param == "byte level" else request.getfixturevalue("mistral")


def tokens_of(template, turns):
    ids, mask = template.encode(turns)
    (segment,) = example_segments(template, Example(ids, mask, "x row 1", 0), {"messages": turns})
    return segment.tokens


def test_the_tokens_bytes_are_the_text(tokenizer):
    template = resolve_template("zephyr", tokenizer)
    turns = [{"role": "user", "content": "Où est\n 東京 🙂?\u202e\x1b"}, {"role": "assistant", "content": "Là-bas."}]
    tokens, bos = tokens_of(template, turns), "<s>" if template.bos_token_id is not None else ""
    assert b"".join(t.raw for t in tokens).decode() == template.text_of(turns)
    by_role = {role: b"".join(t.raw for t in tokens if t.role == role).decode() for role in (t.role for t in tokens)}
    assert by_role == {
        "template": f"{bos}<|system|>\n</s>\n",
        "user": f"<|user|>\n{turns[0]['content']}</s>\n",
        "assistant": "<|assistant|>\nLà-bas.</s>\n",
    }
    assert b"".join(t.raw for t in tokens if t.supervised).decode() == "Là-bas.</s>"
    assert [t.text for t in tokens if t.special][-3:] == ["</s>"] * 3
    texts = "".join(token.text for token in tokens)
    assert "\\u001b" in texts and not {"\x1b", "\u202e"} & set(texts)  # control characters would move the cursor
