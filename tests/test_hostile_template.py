"""Chat templates are strangers' programs: what the trial in a child process stops, and what it lets through."""

from __future__ import annotations

import os
import pickle
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from zephyr_lite.data import chat, template_render, template_trial
from zephyr_lite.data.chat import resolve_template
from zephyr_lite.data.formats import RowError
from zephyr_lite.data.template_render import Renderer
from zephyr_lite.data.template_trial import try_template
from zephyr_lite.data.templates import BOS, TEMPLATES
from zephyr_lite.errors import UserError
from zephyr_lite.merge import merge
from zephyr_lite.model.peft_files import read_adapter
from zephyr_lite.model.tokenizer import load_tokenizer

from .conftest import make_tokenizer
from .malformed_weights import make_adapter

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def nothing_passed(monkeypatch):
    monkeypatch.setattr(template_trial, "_passed", set())


@pytest.fixture
def no_child(monkeypatch):
    """A trial that starts a process fails the test."""
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a process was started"))


@pytest.mark.parametrize("template", [t for own in TEMPLATES.values() for t in (own, own.removeprefix(BOS))])
def test_the_kits_own_need_no_trial(no_child, template):
    try_template(template, "own", TOKENS)


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}"
        "{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{% set n = namespace(x=1) %}{{ dict(a=n.x) }}",
        "{{ raise_exception('system turns are not supported') }}",
        "{{ messages + 1 }}",  # a template's own faults are said with the row, or by the probe
        "{% for %}",
        "{{ tools is none }}{{ documents is none }}{{ nothing }}{{ messages[-1]['content'] | trim }}",
    ],
)
def test_what_transformers_renders_or_refuses_by_itself_passes(template):
    try_template(template, "t", TOKENS)
    assert len(template_trial._passed) == 1


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ ''.__class__ }}", "reaches for the attribute '__class__' of a str"),
        ("{{ ''['__class__'] }}", "reaches for the attribute '__class__'"),
        ("{{ '' | attr('__class__') }}", "reaches for the attribute '__class__'"),
        ("{{ '{0.__class__}'.format('') }}", "reaches for the attribute '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "reaches for the attribute '__init__'"),
        ("{{ messages.append(1) }}", "reaches for the attribute 'append' of a list"),
        ("{{ [0] * 10 ** 10 }}", "asks for more than 512 MiB"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is nested too deeply"),
        (
            "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
            "cannot be compiled (SyntaxError: too many statically nested",
        ),
        ("{% for i in range(99999) %}{{ messages | tojson }}{% endfor %}", "writes more than 100,000 characters"),
        ("x" * (2**20 + 1), "is 1,048,577 characters long"),
        (["a"], "is a list and no text"),
    ],
)
def test_what_is_stopped(template, said):
    with pytest.raises(UserError) as caught:
        try_template(template, "chat template t.jinja", TOKENS)
    assert caught.value.message.startswith("chat template t.jinja: ") and said in caught.value.message
    assert "zephyr" in caught.value.hint and not template_trial._passed


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = (messages | length + 7) ** 99999999 %}",  # inside one call of C
    ],
)
def test_what_computes_for_ever_is_stopped_at_its_limit(template, monkeypatch):
    monkeypatch.setattr(template_trial, "SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"was stopped after 0\.3 s"):
        try_template(template, "t", TOKENS)
    assert time.monotonic() - start < 10


def test_a_template_is_tried_once(monkeypatch):
    try_template(PLAIN, "t", TOKENS)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("tried again"))
    try_template(PLAIN, "t", TOKENS)
    with pytest.raises(pytest.fail.Exception):  # with other tokens it is another text
        try_template(PLAIN, "t", {**TOKENS, "eos_token": "<end>"})


def test_no_secret_reaches_the_child(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = {}
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: seen.update(k) or run(*a, **k))
    try_template(PLAIN, "t", TOKENS)
    assert "hf_secret" not in str(seen) and set(seen["env"]) <= {*template_trial._KEPT} and "PATH" in os.environ


@pytest.mark.parametrize("broken", ["missing", "fails"])
def test_a_child_that_cannot_work_is_said(monkeypatch, broken, tmp_path):
    if broken == "missing":
        monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
        said = "cannot be started"
    else:
        monkeypatch.setattr(template_trial, "_LIBRARIES", [])
        said = "came to nothing (ModuleNotFoundError: No module named 'jinja2')"
    with pytest.raises(UserError) as caught:
        try_template(PLAIN, "t", TOKENS)
    assert said in caught.value.message


# Where templates are first rendered


LOOP = "{{ ''.__class__ }}"


def test_a_tokenizers_own_template_is_tried_and_its_folder_named(tmp_path):
    make_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(UserError, match=f"the tokenizer's own \\({tmp_path}\\): reaches for"):
        resolve_template("auto", load_tokenizer(tmp_path))


@pytest.mark.parametrize("choice", ["file", "text"])
def test_a_chosen_template_is_tried(tmp_path, choice):
    tokenizer = make_tokenizer(tmp_path)
    (tmp_path / "t.jinja").write_text(LOOP)
    with pytest.raises(UserError, match="reaches for the attribute"):
        resolve_template(str(tmp_path / "t.jinja") if choice == "file" else LOOP, tokenizer)


def test_merging_tries_the_template_before_it_asks_how_an_answer_ends(tiny_base, tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(LOOP)
    adapter = read_adapter(make_adapter(tmp_path / "a"))
    with pytest.raises(UserError, match="tokenizer: the chat template: reaches for"):
        merge(tiny_base, [adapter], tmp_path / "out", tokenizer_from=tmp_path / "tokenizer")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("does", "error", "said"),
    [
        ("{{ 'x' * 10 ** 6 }}", RowError, r"makes more than 100,... characters of 8"),
        ("{{ raise_exception('no\\nsesame') }}", RowError, r"refuses the row: no\\nsesame"),
        ("{{ 1 + '' }}", RowError, "refuses the row: TypeError: unsupported operand"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            UserError,
            "stopped after 0.3 s",
        ),
        ("{% set x = (messages | length + 6) ** 99999999 %}", UserError, "stopped after 0.3 s"),
        ("{{ ('a' | center(10 ** 10)) | length }}", UserError, "asks for more than 512 MiB for a conversation"),
        (
            "{{ messages | tojson(indent=10 ** 9) | length }}",
            UserError,
            "asks for more than 512 MiB for a conversation",
        ),
        ("{{ ''.__class__ }}", UserError, "reaches for the attribute '__class__'"),
    ],
)
def test_a_template_that_behaves_in_the_trial_only(tmp_path, monkeypatch, does, error, said):
    """It misbehaves on a row that holds a word: it does so in the child, under limits, and the next row is rendered."""
    tokenizer = make_tokenizer(tmp_path)
    trap = PLAIN + "{% if 'sesame' in messages[0].content %}" + does + "{% endif %}"
    template = resolve_template(trap, tokenizer)
    monkeypatch.setattr(template_render, "SECONDS", 0.3)
    monkeypatch.setattr(template_trial, "SECONDS", 0.3)
    template._renderer._stop()
    with pytest.raises(error, match=said):
        template.encode([{"role": "user", "content": "sesame"}, {"role": "assistant", "content": "ok"}])
    ids, mask = template.encode([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "ok"}])
    assert len(ids) and mask.any()


def test_the_probe_is_rendered_by_a_child_too(tmp_path):
    trap = PLAIN + "{% if messages[0].content == 'question one' %}{{ [0] * 10 ** 10 }}{% endif %}"
    with pytest.raises(UserError, match="asks for more than 512 MiB"):
        resolve_template(trap, make_tokenizer(tmp_path))


TURNS = [
    {"role": "system", "content": " <b>&'\"\\ é ☃ \x00\x1b\u2028 {{ 1 }}\n"},
    {"role": "user", "content": "\r\n\t"},
    {"role": "assistant", "content": ""},
]


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "  {% for m in messages %}\n  {%- if loop.first %}{{ bos_token }}{% continue %}{%"
        " endif %}\n{{ m | tojson }}\n{% endfor %}\n\n",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n"
        " }}{{ m['content'] | trim }}{% endfor %}",
        "{% generation %}{{ messages[0].content | e }}{% endgeneration %}{{ nothing }}{{ tools }}{{ add_generation_prompt }}",
        "{{ messages | tojson(indent=2) }}{{ dict(a=1) }}{{ messages | map(attribute='role')"
        " | join(',') }}{{ pad_token is defined }}",
        "{% macro f(m) %}<{{ m.role }}>{{ caller() }}{% endmacro %}{% for m in messages %}{%"
        " call f(m) %}x{% endcall %}{% endfor %}\n",
    ],
)
@pytest.mark.parametrize("prompt", [False, True])
def test_the_child_writes_what_transformers_does(tmp_path, text, prompt):
    tokenizer = make_tokenizer(tmp_path)
    own = tokenizer.apply_chat_template(TURNS, chat_template=text, tokenize=False, add_generation_prompt=prompt)
    assert Renderer(text, "t", tokenizer.special_tokens_map).render(TURNS, prompt, 10_000) == own


def test_a_renderer_goes_to_other_processes_and_ends_its_child(tmp_path):
    renderer = Renderer(PLAIN, "t", TOKENS)
    text = renderer.render(TURNS, True, 1000)
    child = renderer._child
    assert pickle.loads(pickle.dumps(renderer)).render(TURNS, True, 1000) == text
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        assert pool.submit(renderer.render, TURNS, True, 1000).result() == text
    assert renderer.render(TURNS, True, 1000) == text and renderer._child is child
    del renderer
    assert child.poll() is not None


def test_a_row_longer_than_any_conversation_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "LONGEST_ROW", 1000)
    template = resolve_template("zephyr", make_tokenizer(tmp_path))
    template.encode([{"role": "user", "content": "x" * 990}, {"role": "assistant", "content": "ok"}])
    with pytest.raises(RowError, match="longer than 1,000 characters"):
        template.encode([{"role": "user", "content": "x" * 1000}, {"role": "assistant", "content": "ok"}])
