"""The shipped chat templates, and which template a configuration names."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError
from ..io.text import is_file, read_text, shown

# None relies on Jinja's trim_blocks, so that servers with another Jinja write the same text

BOS = "{{ bos_token }}"  # removed by ``resolve_template`` for a tokenizer without one

# A system turn always comes first, empty if there is none: the published models were trained so, and a server that adds
# no system turn gets the same ids.
ZEPHYR = (
    BOS + "{% if not messages or messages[0]['role'] != 'system' %}{{ '<|system|>\\n' + eos_token + '\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CHATML = (
    BOS + "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    BOS + "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ (message['content'] | trim) + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
TEMPLATES = {"zephyr": ZEPHYR, "chatml": CHATML, "llama3": LLAMA3}
# put in front of a template (as Qwen3's) whose generation prompt then ends in the empty block of reasoning of training
NO_THINKING = "{%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}"
# tokens besides eos_token that a template writes, each of which the tokenizer must have
NEEDED_TOKENS = {
    "zephyr": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def find_template(choice: str, own: str | None = None) -> tuple[str, str]:
    """(a name for messages, the text) of the chat template that ``choice`` means (see ``resolve_template``).

    Args:
        own: the tokenizer's own.
    """
    path = Path(os.path.expanduser(choice))
    if choice == "auto" and own:
        return "the tokenizer's own", own
    if choice == "auto":
        return "zephyr", TEMPLATES["zephyr"]
    if choice in TEMPLATES:
        return choice, TEMPLATES[choice]
    if "{%" in choice or "{{" in choice:  # in the alignment handbook's YAML files
        return "of the configuration", choice
    if is_file(path):
        return choice, read_text(path, name=f"chat_template {choice}")
    raise UserError(
        f"chat_template {shown(repr(choice), 200)}: neither a template's name nor a file.",
        f"Choose auto, {', '.join(TEMPLATES)}, or a .jinja file.",
    )
