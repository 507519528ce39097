"""The demo's data and base: best answers do not dodge, nothing held out is trained on."""

import importlib.util
import json
import re

import pytest
from transformers import AutoConfig

from zephyr_lite import demo
from zephyr_lite.demo import base
from zephyr_lite.recipe.refusals import refusal


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


CONVERSATIONS, CONVERSATIONS_TEST = read(demo.CONVERSATIONS), read(demo.CONVERSATIONS_TEST)
FEEDBACK, FEEDBACK_TEST = read(demo.FEEDBACK), read(demo.FEEDBACK_TEST)


def plain(text):
    """Letters and digits only, so that punctuation and case do not hide a repetition."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def questions(rows):
    return {plain(m["content"]) for row in rows for m in row["messages"] if m["role"] == "user"}


def test_the_best_completion_does_not_dodge():
    for row in FEEDBACK + FEEDBACK_TEST:
        assert [c["model"] for c in row["completions"]] == row["models"] and len(set(row["models"])) == 4
        assert len({c["response"] for c in row["completions"]}) == 4
        for score in ("overall_score", "fine-grained_score"):
            top = max(c[score] for c in row["completions"])
            assert not any(refusal("", c["response"]) for c in row["completions"] if c[score] == top)
            assert all(c[score] < top - 1 for c in row["completions"] if refusal("", c["response"]))


def test_nothing_held_out_is_trained_on():
    trained = questions(CONVERSATIONS) | {plain(row["instruction"]) for row in FEEDBACK}
    held_out = questions(CONVERSATIONS_TEST) | {plain(row["instruction"]) for row in FEEDBACK_TEST}
    asked = {plain(question) for question in demo.QUESTIONS}
    assert len(held_out) == 30 and len(asked) == 3
    assert not trained & held_out and not (trained | held_out) & asked
    responses = [plain(c["response"]) for row in FEEDBACK + FEEDBACK_TEST for c in row["completions"]]
    answers = [plain(m["content"]) for row in CONVERSATIONS + CONVERSATIONS_TEST for m in row["messages"][1:]]
    assert len(set(responses)) == len(responses)
    assert len(set(answers)) == len(answers)


def test_an_interrupted_conversion_is_repeated(monkeypatch, tmp_path):
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(base, "find_gguf", lambda: tmp_path / "weights.gguf")
    calls = []

    def convert(source, into):
        calls.append(source)
        (into / "model.safetensors").write_text("x")
        if len(calls) == 1:
            raise OSError("disk full")

    monkeypatch.setattr(base, "_convert", convert)
    with pytest.raises(OSError, match="disk full"):
        base.demo_base()
    folder = tmp_path / "zephyr-lite" / base.FOLDER
    assert base.demo_base() == base.demo_base() == folder
    assert len(calls) == 2, "the third call found a complete folder"
    assert [p.name for p in folder.parent.iterdir()] == [base.FOLDER], "no temporary folder is left"


def test_the_base_speaks_plain_chatml():
    """``make demo`` converts the weights too (20 s)."""
    if importlib.util.find_spec(base.PACKAGE) is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(f"{base.REQUIREMENT} and gguf are not installed")
    source = base.find_gguf()
    tokenizer = base._tokenizer(source)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt), "later turns do not rewrite earlier ones"
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids, "no BOS is added"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    assert config.tie_word_embeddings is True
    assert config.eos_token_id == tokenizer.pad_token_id == 2
