"""The chat templates that travel with the package, as the text that tokenizers save.

Each starts with BOS; ``chat.resolve_template`` leaves it out where the tokenizer has none. None relies on Jinja's
``trim_blocks``, so that servers with another Jinja read the same.
"""

BOS = "{{ bos_token }}"

# A system turn always comes first, empty if there is none: the published models saw that, and a server that adds no
# system turn then gets the ids that training saw.
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

# what a template writes besides eos_token, and a tokenizer must therefore know as one token each
NEEDED_TOKENS = {
    "zephyr": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
