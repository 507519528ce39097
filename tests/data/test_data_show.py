"""``zephyr-lite data show``: what it prints is what training gets, token by token."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import make_tokenizer
from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import DatasetSpec, RunConfig
from zephyr_lite.data.chat_template import CHATML, Example, resolve_template
from zephyr_lite.data.dataset import prepare
from zephyr_lite.data.preview import example_segments, token_reader

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

    def run(*words: object) -> tuple[int, str, str]:
        code = cli.run(["data", "show", *map(str, words), f"model_name_or_path={no_weights}"])
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


def test_a_plain_text_is_shown_as_one(show, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "Name three rivers."}\n')
    code, out, err = show("sft", "dataset=texts.jsonl", "--table")
    assert code == 0, err
    tokens = table(out)
    assert {t["role"] for t in tokens} == {"text"} and "".join(t["text"] for t in tokens) == "Name␣three␣rivers.</s>"
    assert [t["supervised"] for t in tokens] == ["no", *["yes"] * (len(tokens) - 1)]


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


def test_the_view_has_every_token_above_its_id_and_brackets_around_what_is_supervised(show, pair_rows):
    words = ("dpo", f"dataset={pair_rows}", "--row", "3")
    _, listed, _ = show(*words, "--table")
    code, out, err = show(*words)
    assert code == 0, err
    lines = [line[19:] for line in out.split("── prompt", 1)[1].splitlines()[1:] if line and not line.startswith("──")]
    lines = [line for line in lines if line.strip() and "supervised" not in line]
    tokens = table(listed)
    assert " ".join(lines[1::2]).split() == [t["id"] for t in tokens]
    # a pipe has no colour: brackets are closed in every line
    inside, found = False, []
    for line in lines[::2]:
        assert line.count("⟦") == line.count("⟧")
        for cell in line.split():
            inside = inside or cell.startswith("⟦")
            found.append((cell.strip("⟦⟧"), inside))
            inside = inside and not cell.endswith("⟧")
        assert not inside
    assert found == [(t["text"], t["supervised"] == "yes") for t in tokens]


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


def test_what_cannot_be_shown_is_said(show, tmp_path, chat_rows):
    rows = [json.loads(line) for line in chat_rows.read_text().splitlines()]
    rows[2]["messages"][0]["content"] = "a </s> within"
    rows[3]["messages"] = [{"role": "user", "content": "no answer"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    data = ("sft", "dataset=rows.jsonl")
    for words, says in (
        ((*data, "--from", "3"), "rows.jsonl row 3 was left out: a turn's text contains the control token </s>"),
        ((*data, "--from", "rows.jsonl row 4"), "row 4 was left out: no assistant turn"),
        ((*data, "--from", "30"), "--from 30: no row has this place"),
        ((*data, "--row", "99"), "row 99: the number of packed rows is 1."),
        ((*data, "--row", "1", "--from", "1"), "--row and --from"),
        ((*data, "--held-out"), "nothing is held out"),
        (data[1:], "which stage's rows?"),
        (("sft", "dataset=nowhere.jsonl"), "nowhere.jsonl"),
    ):
        code, out, err = show(*words)
        assert code == 2 and says in err, out + err


# -- tokens ----------------------------------------------------------------------------------------------------------------


def sentencepiece_like(folder: Path) -> PreTrainedTokenizerFast:
    """Mistral's kind: spaces are ▁, one is put in front, and what the vocabulary lacks is bytes."""
    words = ["▁", "▁the", "▁cat", "th", "e", "c", "a", "t", "\n", "<", ">", "|", "▁I", "user", "assistant", "system"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_the_tokens_bytes_are_the_text(tmp_path):
    text = "I am — 你好 🙂 \t<b>\n\n  the cat e\u0301\u200b"
    byte_level = make_tokenizer(tmp_path)
    pieces = sentencepiece_like(tmp_path)
    for tokenizer, before in ((byte_level, ""), (pieces, " ")):
        read = token_reader(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        raw = b"".join(read(i)[0] for i in ids)
        assert raw.decode() == before + text
        assert read(tokenizer.eos_token_id) == (b"</s>", True)
        assert not any(read(i)[1] for i in ids)
    assert token_reader(byte_level)(10**6) == (b"[1000000]", False)


def test_mistrals_own_tokenizer(tmp_path):
    package = pytest.importorskip("mistral_common", reason="pip install zephyr-lite[dev]")
    shutil.copy(Path(package.__file__).parent / "data" / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    template = resolve_template("zephyr", AutoTokenizer.from_pretrained(tmp_path))
    turns = [{"role": "user", "content": "Où est\n 東京 🙂?"}, {"role": "assistant", "content": "Là-bas."}]
    ids, mask = template.encode(turns)
    (segment,) = example_segments(template, Example(ids, mask, "x row 1", 0), {"messages": turns})
    tokens = segment.tokens
    assert b"".join(t.raw for t in tokens).decode() == template.text_of(turns)
    text = {
        role: b"".join(t.raw for t in tokens if t.role == role).decode() for role in ("template", "user", "assistant")
    }
    assert text == {
        "template": "<s><|system|>\n</s>\n",
        "user": "<|user|>\nOù est\n 東京 🙂?</s>\n",
        "assistant": "<|assistant|>\nLà-bas.</s>\n",
    }
    assert b"".join(t.raw for t in tokens if t.supervised).decode() == "Là-bas.</s>"
    assert [t.text for t in tokens if t.special] == ["<s>", "</s>", "</s>", "</s>"]


def test_characters_in_several_tokens_and_ones_that_cannot_be_seen(tmp_path):
    template = resolve_template("zephyr", make_tokenizer(tmp_path))
    turns = [{"role": "user", "content": "你\u202e\x1b"}, {"role": "assistant", "content": "ok"}]
    ids, mask = template.encode(turns)
    (segment,) = example_segments(template, Example(ids, mask, "x row 1", 0), {"messages": turns})
    texts = [token.text for token in segment.tokens]
    assert "\\xa0" in texts  # its last byte
    assert "\\u001b" in texts and "\x1b" not in "".join(texts)
    assert "\\xae" in texts and "\u202e" not in "".join(texts)
    assert sum(map(len, (t.raw for t in segment.tokens))) == len(template.text_of(turns).encode())


def test_a_template_that_refuses_a_system_turn_alone_joins_it_with_the_user(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    text = (
        "{% if messages[0]['role'] == 'system' and messages | length == 1 %}{{ raise_exception('alone') }}{% endif %}"
        + CHATML.replace("<|im_start|>", "[")
        .replace("<|im_end|>\\n", "]' + eos_token + '")
        .replace("{{ bos_token }}", "")
    )
    path = tmp_path / "own.jinja"
    path.write_text(text)
    template = resolve_template(str(path), tokenizer)
    turns = [{"role": r, "content": r[0]} for r in ("system", "user", "assistant")]
    ids, mask = template.encode(turns)
    (segment,) = example_segments(template, Example(ids, mask, "x row 1", 0), {"messages": turns})
    assert list(dict.fromkeys(token.role for token in segment.tokens)) == ["system+user", "assistant"]
