"""``zephyr-lite data show``: what it prints is what training gets, token by token."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import make_tokenizer
from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import DatasetSpec, RunConfig
from zephyr_lite.data.chat_template import BOS, ZEPHYR, Example, resolve_template
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


def test_roles_follow_the_turns(show, chat_rows):
    code, out, err = show("sft", f"dataset={chat_rows}", "--from", "2", "--table")
    assert code == 0, err
    by_role: dict[str, str] = {}
    for token in table(out):
        by_role[token["role"]] = by_role.get(token["role"], "") + token["text"]
    assert by_role == {
        "system": "<|system|>⏎Answer␣in␣one␣line.</s>⏎",
        "user": "<|user|>⏎Who␣are␣you?</s>⏎",
        "assistant": "<|assistant|>⏎I␣am␣a␣small␣model␣that␣was␣trained␣in␣a␣test,␣and␣I␣answer␣in␣one␣line.</s>⏎",
    }
    assert "".join(t["text"] for t in table(out) if t["supervised"] == "yes").endswith("in␣one␣line.</s>")
    # a row without a system turn: the template writes one by itself
    _, out, _ = show("sft", f"dataset={chat_rows}", "--from", f"{chat_rows} row 1", "--table")
    own = "".join(t["text"] for t in table(out) if t["role"] == "template")
    assert own == "<|system|>⏎</s>⏎"


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


def test_cut_rows_say_how_much_was_cut(show, no_weights, pair_rows):
    words = ("dpo", f"dataset={pair_rows}", "max_length=40", "max_prompt_length=24", "--from", "1")
    code, out, err = show(*words)
    assert code == 0, err
    left = int(re.search(r"(\d+) tokens cut on the left", out)[1])
    ends = [int(n) for n in re.findall(r"(\d+) tokens cut at the end", out)]
    assert "positions 0–23; 24 tokens" in out and "positions 24–39" in out
    _, whole, _ = show("dpo", f"dataset={pair_rows}", "--from", "1", "--table")
    sizes = [len([t for t in table(whole) if t["segment"] == s]) for s in "123"]
    assert left == sizes[0] - 24 and ends == [sizes[1] - 16, sizes[2] - 16]


def test_the_view_has_every_token_above_its_id_and_brackets_around_what_is_supervised(show, pair_rows):
    words = ("dpo", f"dataset={pair_rows}", "--row", "3")
    tokens = table(show(*words, "--table")[1])
    _, out, _ = show(*words)
    lines = [line[19:] for line in out.split("── prompt", 1)[1].splitlines()[1:] if line and not line.startswith("──")]
    lines = [line for line in lines if line.strip() and "supervised" not in line]
    assert " ".join(lines[1::2]).split() == [t["id"] for t in tokens]
    cells = " ".join(lines[::2]).split()
    assert [cell.strip("⟦⟧") for cell in cells] == [t["text"] for t in tokens]
    inside = "".join(re.findall("⟦(.*?)⟧", " ".join(lines[::2]))).replace(" ", "")
    assert inside == "".join(t["text"] for t in tokens if t["supervised"] == "yes")


def test_a_packed_row_shows_two_conversations_in_80_columns_and_all_with_all(show, chat_rows):
    words = ("sft", f"dataset={chat_rows}", "max_length=512")
    short, whole = show(*words)[1], show(*words, "--all")[1]
    titles = [line for line in whole.splitlines() if line.startswith("── segment")]
    assert len(titles) > 3 and all(len(line) == 80 for line in titles if len(line.rstrip("─")) < 78)
    assert [line for line in short.splitlines() if line.startswith("──")] == titles[:2]
    assert f"\n… {len(titles) - 2} more conversations: --all shows them" in short and "… " not in whole


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--from", "3"), "rows.jsonl row 3 was left out: a turn's text contains the control token </s>"),
        (("--from", "30"), "--from 30: no row has this place"),
        (("--row", "99"), "row 99: the number of packed rows is 1."),
        (("--row", "1", "--from", "1"), "--row and --from"),
        (("--held-out",), "nothing is held out"),
    ],
)
def test_what_cannot_be_shown_is_said(show, tmp_path, chat_rows, words, says):
    rows = [json.loads(line) for line in chat_rows.read_text().splitlines()]
    rows[2]["messages"][0]["content"] = "a </s> within"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = show("sft", "dataset=rows.jsonl", *words)
    assert code == 2 and says in err, out + err


# -- tokens ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["byte level", "mistral"])
def tokenizer(request, tmp_path):
    if request.param == "byte level":
        return make_tokenizer(tmp_path)
    package = pytest.importorskip("mistral_common", reason="pip install zephyr-lite[dev]")
    shutil.copy(Path(package.__file__).parent / "data" / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    return AutoTokenizer.from_pretrained(tmp_path)


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


def test_a_template_that_refuses_a_system_turn_alone_joins_it_with_the_user(tmp_path):
    text = (
        "{% if messages[0]['role'] == 'system' and messages | length == 1 %}{{ raise_exception('alone') }}{% endif %}"
        + ZEPHYR.removeprefix(BOS)
    )
    template = resolve_template(text, make_tokenizer(tmp_path))
    turns = [{"role": r, "content": r[0]} for r in ("system", "user", "assistant")]
    assert list(dict.fromkeys(t.role for t in tokens_of(template, turns))) == ["system+user", "assistant"]


def test_a_plain_text_is_shown_as_one(show, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "Name three rivers."}\n')
    code, out, err = show("sft", "dataset=texts.jsonl", "--table")
    assert code == 0, err
    tokens = table(out)
    assert {t["role"] for t in tokens} == {"text"} and "".join(t["text"] for t in tokens) == "Name␣three␣rivers.</s>"
    assert [t["supervised"] for t in tokens] == ["no", *["yes"] * (len(tokens) - 1)]
