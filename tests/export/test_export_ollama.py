"""Modelfiles: Go's template, rendered by a small renderer of our own, gives the text of training's template."""

import json
import re

import gguf
import jinja2
import pytest
from transformers import AutoTokenizer

from tests.contract.test_gguf import model_dir
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.errors import UserError
from zephyr_lite.export.gguf import write_gguf
from zephyr_lite.export.ollama import turns_of, write_modelfile

SAID = [
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "system", "content": "Be brief.\nVery."}, {"role": "user", "content": 'Hi {{ .Content }} #\\n"'}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two\n\nthree"},
        {"role": "user", "content": "<|user|> four"},
    ],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
]


def render_go(template: str, messages: list[dict]) -> str:
    """Go's text/template as far as the Modelfiles use it (range, if, else if, and, or, eq, ne, fields, strings), as Jinja."""
    blocks, text = [], ""
    for place, piece in enumerate(re.split(r"\{\{ (.*?) \}\}", template, flags=re.S)):
        if place % 2 == 0:
            text += "{% raw %}" + piece + "{% endraw %}"
        elif piece == "range $i, $_ := .Messages":
            blocks.append("for")
            text += "{% for m in messages %}"
        elif piece == "end":
            text += "{% end" + blocks.pop() + " %}"
        elif piece.startswith(("if ", "else if ")):
            blocks += ["if"] if piece.startswith("if ") else []
            piece = piece.replace("(index $.Messages 0).Role", "messages[0].role")
            piece = re.sub(r"\b(eq|ne) (\S+) ([^\s)]+)", r"\2 \1 \3", piece)
            piece = re.sub(r"(and|or) (\(.*?\)) (\(.*?\))", r"\2 \1 \3", piece)
            pairs = {" eq ": " == ", " ne ": " != ", "$i": "loop.index0", ".Role": "m.role", "else if": "elif"}
            for go, own in pairs.items():
                piece = piece.replace(go, own)
            text += "{% " + piece + " %}"
        else:
            text += "{{ " + piece.replace(".Content", "m.content") + " }}"
    return jinja2.Template(text, keep_trailing_newline=True).render(messages=messages)


def modelfile_template(text: str) -> str:
    found = re.search(r'^TEMPLATE """(.*?)"""\n', text, re.S | re.M)
    return found[1]


@pytest.mark.parametrize("name", ["zephyr", "chatml", "llama3"])
@pytest.mark.parametrize("bos", [True])
def test_go_renders_what_training_saw(tmp_path, name, bos):
    folder = model_dir(tmp_path / "My Model", bos=bos, template=None, num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    needed = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": needed})
    template = resolve_template(name, tokenizer)
    tokenizer.save_pretrained(folder)
    file = write_gguf(folder, tmp_path / "files" / "m.gguf").out
    lines = write_modelfile(folder, file, tmp_path / "Modelfile", temperature=0.5)
    text = (tmp_path / "Modelfile").read_text()
    go = modelfile_template(text)
    for messages in SAID:
        assert render_go(go, messages) == template.text_of(messages, True)
    assert go.startswith("<s>") is bos
    end = {"zephyr": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[name]
    assert text.startswith("FROM ./files/m.gguf\n") and f'PARAMETER stop "{end}"\n' in text
    assert text.endswith("PARAMETER temperature 0.5\n")
    assert any("strips white space" in line for line in lines) is (name == "llama3")
    assert lines[-1] == f"Next: ollama create my-model -f {tmp_path / 'Modelfile'}"


def test_templates_that_are_no_turns_in_a_row_are_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir(tmp_path / "m", template=None, num_hidden_layers=1))
    for odd in (
        # the system turn goes into the last of the user's
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}{% if loop.last and "
        "messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}",
        # turns are counted
        "{{ bos_token }}{% for m in messages %}{{ loop.index ~ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ (messages | length + 1) ~ 'assistant: ' }}{% endif %}",
    ):
        tokenizer.chat_template = odd
        with pytest.raises(UserError, match="not made of turns in a row"):
            turns_of(resolve_template("auto", tokenizer))


def test_the_gguf_file_has_to_be_this_models(tmp_path):
    folder = model_dir(tmp_path / "m", num_hidden_layers=1)
    other = model_dir(tmp_path / "other", template=None, num_hidden_layers=1)
    out = tmp_path / "Modelfile"
    file = write_gguf(other, tmp_path / "other.gguf").out
    with pytest.raises(UserError, match="another chat template"):
        write_modelfile(folder, file, out)
    with pytest.raises(UserError, match="no chat template"):
        write_modelfile(other, file, out)
    (tmp_path / "junk.gguf").write_bytes(b"GGUFjunk" * 10)
    for name in ("junk.gguf", "none.gguf"):
        with pytest.raises(UserError, match="no GGUF file that can be read") as error:
            write_modelfile(folder, tmp_path / name, out)
        assert "export gguf" in error.value.hint
    assert not out.exists()
    # as many tokens, other ones
    strange = model_dir(tmp_path / "strange", num_hidden_layers=1)
    told = json.loads((strange / "tokenizer.json").read_text())
    a, b = list(told["model"]["vocab"])[-2:]
    told["model"]["vocab"][a], told["model"]["vocab"][b] = told["model"]["vocab"][b], told["model"]["vocab"][a]
    (strange / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="another tokenizer"):
        write_modelfile(strange, write_gguf(folder, tmp_path / "m.gguf").out, out)


def test_bos_stands_once_whoever_writes_it(tmp_path):
    """A model without a template of its own: a server adds BOS to what its file holds, so the Go template must not."""
    bare = model_dir(tmp_path / "bare", template=None, num_hidden_layers=1)
    file, out = write_gguf(bare, tmp_path / "bare.gguf").out, tmp_path / "Modelfile"
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.add_bos_token"].contents() is True
    lines = write_modelfile(bare, file, out, chat_template="zephyr")
    tokenizer = AutoTokenizer.from_pretrained(bare)
    trained = resolve_template("zephyr", tokenizer).text_of(SAID[3], True)
    assert trained.startswith("<s>") and "<s>" + render_go(modelfile_template(out.read_text()), SAID[3]) == trained
    assert any("BOS is left out" in line for line in lines)
    # training saw none, and the server would add one
    without = model_dir(tmp_path / "without", bos=False, template=None, num_hidden_layers=1)
    with pytest.raises(UserError, match="server add BOS, and the chat template writes none"):
        write_modelfile(without, file, out, chat_template="zephyr", overwrite=True)
