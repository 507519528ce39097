"""Rows and chat templates: what is supervised, what is said, what is refused."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trl

from tests.conftest import make_tokenizer
from tests.messages import Logged
from tests.train.test_train import words
from zephyr_lite.config.load import load_config
from zephyr_lite.data import chat_template
from zephyr_lite.data.chat_template import ChatTemplate, resolve_template
from zephyr_lite.data.messages import RowError
from zephyr_lite.data.templates import CHATML, LLAMA3, ZEPHYR
from zephyr_lite.train.sft import run_sft

TRL = {path.stem: path for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}
CONTROL = re.compile(
    r"<\|[^|>\n{}]{1,40}\|>|<｜[^｜>\n]{1,40}｜>|<(?:start_of_turn|end_of_turn|\|turn|turn\||end_of_utterance)>"
)
ENDS = (
    "<|endoftext|>",
    "<end_of_utterance>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<turn|>",
    "<｜end▁of▁sentence｜>",
)
TURNS = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four it is."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Five then."},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Ulm"}}}
CALLED = [
    {"role": "user", "content": "Weather in Ulm?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "seven degrees", "name": "get_weather"},
    {"role": "assistant", "content": "It is cold."},
]
THOUGHT = [
    {"role": "user", "content": "Is 91 prime?"},
    {"role": "assistant", "content": "No.", "reasoning_content": "91 is 7 times 13."},
    {"role": "user", "content": "Is 97?"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "No divisor up to 9."},
]
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LAST_SYSTEM = (  # Mistral's v0.3
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% set last = rest | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if m == last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
STRIPS_THINKING = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|' + m['role'] + '|>\n' + c + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CLOCK = ZEPHYR.replace("{{ bos_token }}", "{{ 'Today is ' + strftime_now('%H:%M') }}")
SPACE = (
    "{% for m in messages %}{{ 'User: ' if m['role'] == 'user' else 'Bot: ' }}{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}"
)


@pytest.fixture
def template_of(tmp_path):
    """A template on a small tokenizer that knows its control tokens."""

    def resolve(text: str, **given) -> ChatTemplate:
        tokenizer = make_tokenizer(tmp_path)
        words = sorted(set(CONTROL.findall(text)))
        tokenizer.add_special_tokens({"extra_special_tokens": words})
        tokenizer.eos_token = next((end for end in ENDS if end in words), tokenizer.eos_token)
        return resolve_template(text, tokenizer, **given)

    return resolve


def supervised(template: ChatTemplate, messages, tools=None, loss_on="assistant") -> list[str]:
    """The supervised tokens' texts, a run each."""
    ids, mask = template.encode(messages, loss_on, tools)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [template.tokenizer.decode(ids[first:end]) for first, end in zip(edges[::2], edges[1::2])]


@pytest.mark.parametrize("name", ["llama3", "llama3_training", "lfm2", "lfm2_training", "gemma", "gemma_training"])
def test_calls_that_a_template_does_not_write_are_refused(template_of, name):
    """Such a template renders a call's empty content; a content of None would be supervised as the word None."""
    with pytest.raises(RowError, match="does not write the tool calls"):
        template_of(TRL[name].read_text()).encode([*CALLED[:2], CALLED[0], CALLED[3]])


@pytest.mark.parametrize("name", ["qwen3_5_nothink", "qwen3_5_nothink_training"])
def test_reasoning_after_a_prompt_that_ends_in_empty_reasoning(template_of, name):
    row = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "<think>\nreason\n</think>\n\nyes"}]
    assert [text.strip() for text in supervised(template_of(TRL[name].read_text()), row)] == [
        "<think>\nreason\n</think>\n\nyes<|im_end|>"
    ]


def test_a_plain_text_begins_with_bos_once(template_of):
    template = template_of(ZEPHYR)
    template.bos_token_id = template.tokenizer.bos_token_id
    assert template.text_ids("<s>hello").tolist() == template.text_ids("hello").tolist()
    with pytest.raises(RowError, match="BOS, once"):
        template.text_ids("<s><s>hello")


@pytest.mark.parametrize("name", sorted(TRL))
def test_every_template_of_trl_is_trained(template_of, name):
    template = template_of(TRL[name].read_text())
    rendered = template.render(TURNS)
    plain = template.tokenizer.apply_chat_template(
        [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
        if template.content_parts
        else TURNS,
        tokenize=False,
    )
    assert rendered.text in (plain, f"{plain}<|user|>")  # GLM's answers end with the next turn's tag
    assert list(rendered.spans)[-1] == 3
    if 1 not in rendered.spans:
        assert rendered.notes == [
            "the chat template writes earlier answers otherwise than the last one: they are not supervised"
        ]
    ids, _ = template.encode(TURNS)
    for turn, span in rendered.spans.items():
        answer = rendered.text[span.start : span.end]
        end = answer[answer.index(TURNS[turn]["content"]) + len(TURNS[turn]["content"]) :]
        before = answer[: answer.index(TURNS[turn]["content"])]
        assert re.fullmatch(r"(<\|channel\|>final<\|message\|>| to=user<\|message\|>| )?", before)
        assert (
            re.fullmatch(rf"({CONTROL.pattern}|</s>|\n)+", end)
            and template.tokenizer.encode(end, add_special_tokens=False)[-1] in ids
        )
        if not rendered.notes:
            prompt = template.prompt_ids(TURNS[:turn])
            assert ids[: len(prompt)].tolist() == prompt.tolist() or "think" in template.text
    assert "".join(supervised(template, TURNS)) == "".join(rendered.text[a:b] for a, b in rendered.spans.values())


CASES = {
    # name: (template, messages, tools, supervised runs, notes or the refusal)
    "a turn of weight 0": (
        ZEPHYR,
        [TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:]],
        None,
        ["Five then.</s>"],
        [],
    ),
    "a system turn that the template drops": (
        DROPS_SYSTEM,
        [{"role": "system", "content": "Be brief."}, *TURNS],
        None,
        None,
        "does not write the system turn",
    ),
    "a system turn with the last question only": (
        LAST_SYSTEM,
        [{"role": "system", "content": "Be brief."}, *TURNS],
        None,
        [" Five then.</s>"],
        ["the chat template writes the system turn with the last user turn only: earlier answers are not supervised"],
    ),
    "no system turn": (LAST_SYSTEM, TURNS, None, [" Four it is.</s>", " Five then.</s>"], []),
    "a greeting answers nothing": (
        ZEPHYR,
        [{"role": "assistant", "content": "Hello!"}, *TURNS[:2]],
        None,
        ["Four it is.</s>"],
        [],
    ),
    "an answer to a system turn": (
        ZEPHYR,
        [{"role": "system", "content": "Be brief."}, TURNS[1]],
        None,
        ["Four it is.</s>"],
        [],
    ),
    "reasoning that is dropped": (
        STRIPS_THINKING,
        [TURNS[0], {"role": "assistant", "content": "<think>\nIt adds up.\n</think>\n\nFour."}],
        None,
        ["\n\nFour.</s>"],
        ["the chat template does not write the reasoning of the last answer"],
    ),
    "reasoning in the text": (
        ZEPHYR,
        [TURNS[0], {"role": "assistant", "content": "<think>\nIt adds up.\n</think>\n\nFour."}],
        None,
        ["<think>\nIt adds up.\n</think>\n\nFour.</s>"],
        [],
    ),
    "reasoning: history as at inference": (
        TRL["qwen3"].read_text(),
        THOUGHT,
        None,
        ["<think>\nNo divisor up to 9.\n</think>\n\nYes.<|im_end|>"],
        ["the chat template writes earlier answers otherwise than the last one: they are not supervised"],
    ),
    "reasoning that the training variant keeps": (
        TRL["qwen3_training"].read_text(),
        THOUGHT,
        None,
        [
            "<think>\n91 is 7 times 13.\n</think>\n\nNo.<|im_end|>",
            "<think>\nNo divisor up to 9.\n</think>\n\nYes.<|im_end|>",
        ],
        [],
    ),
    "an empty block of reasoning": (
        TRL["qwen3"].read_text(),
        TURNS,
        None,
        ["Four it is.<|im_end|>", "Five then.<|im_end|>"],
        [],
    ),
    "reasoning that a template has no place for": (
        ZEPHYR,
        THOUGHT,
        None,
        ["No.</s>", "Yes.</s>"],
        [
            "the chat template does not write the reasoning of an earlier answer",
            "the chat template does not write the reasoning of the last answer",
        ],
    ),
    "reasoning of an earlier answer only": (
        ZEPHYR,
        [*THOUGHT[:2], *TURNS[2:]],
        None,
        ["No.</s>", "Five then.</s>"],
        ["the chat template does not write the reasoning of an earlier answer"],
    ),
    "reasoning without an opening tag": (
        STRIPS_THINKING,
        [TURNS[0], {"role": "assistant", "content": "It adds up.</think>Four."}],
        None,
        ["Four.</s>"],
        ["the chat template does not write the reasoning of the last answer"],
    ),
    "text before the reasoning, which the template cuts": (
        TRL["qwen3"].read_text(),
        [TURNS[0], {"role": "assistant", "content": "Use <think>a</think> tags."}],
        None,
        ["<think>\na\n</think>\n\n tags.<|im_end|>"],
        ["the chat template does not write all of the text of the last answer"],
    ),
    "the row's own empty block of reasoning": (
        ZEPHYR,
        [TURNS[0], {"role": "assistant", "content": "<think>\n\n</think>\n\nFour."}, *TURNS[2:]],
        None,
        ["<think>\n\n</think>\n\nFour.</s>", "Five then.</s>"],
        [],
    ),
    "the row's own empty block of reasoning, cut from history": (
        TRL["qwen3"].read_text(),
        [TURNS[0], {"role": "assistant", "content": "<think>\n\n</think>\n\nFour."}, *TURNS[2:]],
        None,
        ["Four.<|im_end|>", "Five then.<|im_end|>"],
        [],
    ),
    "spaces behind the template's empty block of reasoning": (
        TRL["qwen3"].read_text(),
        [TURNS[0], {"role": "assistant", "content": "  Four."}],
        None,
        ["  Four.<|im_end|>"],
        [],
    ),
    "an empty block that the template adds before the row's tags": (
        TRL["qwen3_8"].read_text(),
        [TURNS[0], {"role": "assistant", "content": "Use <think>a</think> tags."}],
        None,
        ["Use <think>a</think> tags.<|im_end|>"],
        [],
    ),
    "the next turn's tag ends an answer whose reasoning is cut from history": (
        TRL["glm4moe"].read_text(),
        THOUGHT[:2],
        None,
        ["\n<think>91 is 7 times 13.</think>\nNo.<|user|>"],
        [],
    ),
    "the next turn's tag ends an answer and a call, with tools": (
        TRL["glm4moe"].read_text(),
        CALLED,
        [WEATHER],
        [
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Ulm</arg_value>\n</tool_call><|observation|>",
            "It is cold.<|user|>",
        ],
        [],
    ),
    "an answer that is part of a tag's name": (
        TRL["deepseek_r1_distill"].read_text(),
        [TURNS[0], {"role": "assistant", "content": "A"}],
        None,
        ["A<｜end▁of▁sentence｜>"],
        ["the generation prompt ends in '<think>\\n', which the template does not write before an answer"],
    ),
    "the row's own empty block of reasoning, begun by the generation prompt": (
        TRL["qwen3_5_think"].read_text(),
        [TURNS[0], {"role": "assistant", "content": "<think>\n\n</think>\n\nFour."}],
        None,
        ["Four.<|im_end|>"],
        [],
    ),
    "a control token inside a call does not end it": (
        TRL["gemma4"].read_text(),
        CALLED[:2],
        [WEATHER],
        None,
        "no end token after an answer",
    ),
    "calls are supervised, results are not": (
        TRL["qwen2_5"].read_text(),
        CALLED,
        [WEATHER],
        [
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>',
            "It is cold.<|im_end|>",
        ],
        [],
    ),
    "calls without reasoning": (
        TRL["qwen3"].read_text(),
        CALLED,
        [WEATHER],
        [
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>',
            "It is cold.<|im_end|>",
        ],
        [],
    ),
    "arguments as text": (
        TRL["deepseekv3_training"].read_text(),
        CALLED[:2],
        None,
        [
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Ulm"}\n```'
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        ],
        ["the generation prompt ends in '<think>\\n', which the template does not write before an answer"],
    ),
    "tools that a template does not write": (ZEPHYR, TURNS, [WEATHER], None, "does not write the tools"),
    "calls that a template does not write": (CHATML, CALLED[:2], None, None, "does not write the tool calls"),
    "a role that a template does not know": (ZEPHYR, CALLED, None, None, "roles are system, user and assistant"),
    "an end of text after the last turn only": (
        TRL["phi3"].read_text().replace("eos_token", "'<|endoftext|>'"),
        TURNS,
        None,
        ["Four it is.<|end|>", "Five then.<|end|>\n<|endoftext|>"],
        [],
    ),
    "a generation prompt that ends in a space": (SPACE, TURNS, None, ["Four it is.</s>", "Five then.</s>"], []),
    "one word behind a space": (SPACE, [TURNS[0], {"role": "assistant", "content": "the"}], None, ["the</s>"], []),
    "the answer begins with a newline": (
        ZEPHYR,
        [TURNS[0], {"role": "assistant", "content": "\nthe"}],
        None,
        ["\nthe</s>"],
        [],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows(template_of, name):
    text, messages, tools, wanted, said = CASES[name]
    template = template_of(text)
    if wanted is None:
        with pytest.raises(RowError, match=said):
            template.encode(messages, tools=tools)
        return
    assert supervised(template, messages, tools) == wanted
    assert template.render(messages, tools).notes == said


def test_a_turn_that_is_not_trained_is_left_out_of_all_tokens_too(template_of):
    template = template_of(CHATML)
    whole = supervised(template, [TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:]], loss_on="all")
    assert "Four it is." not in "".join(whole) and "And three?" in "".join(whole)
    assert supervised(template, TURNS, loss_on="last") == ["Five then.<|im_end|>"]
    with_last = [*TURNS[:3], {**TURNS[3], "train": False}]
    assert supervised(template, with_last, loss_on="last") == []


def test_the_prompt_of_a_pair_is_what_inference_feeds(template_of):
    template = template_of(SPACE)
    answers = ([{"role": "assistant", "content": word}] for word in ("the fox", "this"))
    pair = template.encode_pair(TURNS[:1], *answers)
    assert pair.prompt_ids.tolist() == template.prompt_ids(TURNS[:1]).tolist()
    assert pair.chosen_mask.all() and pair.rejected_mask.all()
    assert template.tokenizer.decode(pair.chosen_ids) == "the fox</s>"
    pair = template.encode_pair(TURNS[:3], TURNS[1:2], TURNS[3:])
    prompt = template.prompt_ids(TURNS[:3]).tolist()
    assert pair.prompt_ids.tolist() == prompt  # with an earlier answer, which is context
    for row, loss_on in (([TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:]], "assistant"), (TURNS, "last")):
        assert template.encode(row, loss_on)[0][: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("text", [ZEPHYR, CHATML, LLAMA3], ids=["zephyr", "chatml", "llama3"])
def test_ids_are_those_of_the_whole_text(template_of, text):
    template = template_of(text)
    for content in ("Yes", " Yes", "é 日本", "a\n\nb", "x" * 400):
        row = [TURNS[0], {"role": "assistant", "content": content}]
        ids, _ = template.encode(row)
        whole = template.tokenizer(template.text_of(row), add_special_tokens=False)["input_ids"]
        assert ids.tolist() == whole


def test_the_date_of_a_run_is_fixed(template_of):
    then = datetime.datetime(2026, 3, 4, 5, 6)
    template = template_of(CLOCK, now=then)
    assert template.text_of(TURNS).startswith("Today is 05:06")
    assert template.fingerprint == template_of(CLOCK, now=then).fingerprint
    assert template.fingerprint != template_of(CLOCK, now=then + datetime.timedelta(days=1)).fingerprint
    assert template_of(ZEPHYR, now=then).fingerprint == template_of(ZEPHYR).fingerprint


def test_a_run_is_resumed_on_another_day(tiny_base, chat_rows, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(step, metrics):
        if step == 2:
            raise Killed

    clock = tmp_path / "clock.jinja"
    clock.write_text(CLOCK)
    config = load_config("sft", None, words(tiny_base, tmp_path / "run", chat_rows, chat_template=clock, save_steps=1))
    with pytest.raises(Killed):
        run_sft(config, observers=[Logged(kill)])
    time = json.loads((tmp_path / "run/sft/stage.json").read_text())["template_time"]
    later = datetime.datetime.fromisoformat(time) + datetime.timedelta(days=1, hours=1)
    monkeypatch.setattr(chat_template, "datetime", SimpleNamespace(datetime=SimpleNamespace(now=lambda: later)))
    run_sft(config)
    info = json.loads((tmp_path / "run/sft/stage.json").read_text())
    assert info["status"] == "complete" and info["template_time"] == time
