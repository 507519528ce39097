"""A template that writes an empty block of reasoning before answers, and leaves it out of the generation prompt (Qwen3's)."""

import json
import shutil
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from tests.train.test_train import words
from zephyr_lite.chat import load_chat
from zephyr_lite.config.load import load_config
from zephyr_lite.data.templates import NO_THINKING
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import run_sft

HI = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def base(tiny_base, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(folder)
    return folder


def loaded(base, tmp_path, *answers):
    rows = [{"messages": [*HI, {"role": "assistant", "content": answer}]} for answer in answers]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"max_steps": 1, "batch_size": 1, "load_in_4bit": "false", "samples": 0}
    return load_config("sft", None, words(base, tmp_path / "run", tmp_path / "rows.jsonl", **small))


def test_the_prompt_of_a_model_that_never_reasons_is_that_of_training(base, tmp_path):
    run_sft(loaded(base, tmp_path, "A model.", "A small one."))
    chat = load_chat(tmp_path / "run")
    ids = chat.template.encode([*HI, {"role": "assistant", "content": "A model."}])[0]
    prompt, decode = chat.prompt_ids(HI), chat.template.tokenizer.decode
    assert prompt.tolist() == ids[: len(prompt)].tolist() and decode(prompt).endswith("\n\n</think>\n\n")
    assert not chat.template.notes  # nothing is to be set by hand
    assert decode(chat.prompt_ids(HI, {"enable_thinking": True})).endswith("assistant\n")
    chat.template.variables = {"enable_thinking": True}
    assert decode(chat.prompt_ids(HI)).endswith("assistant\n")


def test_a_template_stays_where_an_answer_reasons(base, tmp_path):
    rows = ("A model.", "<think>\nWho indeed?\n</think>\n\nA small one.")
    template = setup_stage("sft", loaded(base, tmp_path, *rows), claim=False).template
    assert NO_THINKING not in template.text and any("enable_thinking=false" in note for note in template.notes)
