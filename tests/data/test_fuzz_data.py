"""Random configurations, files, conversations and lengths: what comes of them is right, or an error in words.

A few examples run here, always the same; ``FUZZ_FACTOR=50`` in the environment tries fifty times as many, and others.
"""

from __future__ import annotations

import io
import json
import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_tokenizer
from zephyr_lite.config.compat import ACCEPTED, ALIASES, REFUSED, TRANSLATED
from zephyr_lite.config.load import DatasetSpec, Loaded, RunConfig, dump_config, load_config
from zephyr_lite.data.chat_template import ChatTemplate, resolve_template
from zephyr_lite.data.formats import RowError, normalise
from zephyr_lite.data.load import Rows, load_rows
from zephyr_lite.errors import UserError

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))


def examples(count: int) -> Any:
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


# -- configurations ----------------------------------------------------------------------------------------------------

OTHERS = [
    "dataset.path",
    "dataset.columns.prompt",
    "dataset.",
    "memory.vram",
    "memory.x.y",
    "eval_dataset.limit",
]
KEYS = st.sampled_from([*RunConfig.model_fields, *ALIASES, *TRANSLATED, *ACCEPTED, *REFUSED, *OTHERS])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.sampled_from(["train", "a/b", "-1", "1e999", "no", "epoch", "8GiB", "none", "all-linear", "x" * 200]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(
                    ["path", "split", "weight", "limit", "columns", "vram", "datasets", "id", "test_size", "data_files"]
                ),
                st.text(max_size=5),
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)


def resolved(**arguments: Any) -> None:
    """A configuration that is taken is of the schema and comes back from its file; one that is not is refused in words."""
    try:
        loaded = load_config(**arguments)
    except UserError as error:
        refused = error.message
    else:
        refused = ""
        assert isinstance(loaded, Loaded)
        assert RunConfig.model_validate(yaml.safe_load(dump_config(loaded.config))) == loaded.config
    assert len(refused) < 4000


@examples(120)
@given(
    values=st.dictionaries(st.one_of(KEYS, st.text(max_size=6)), VALUES, max_size=5),
    method=st.sampled_from(["sft", "dpo"]),
)
def test_configurations_of_any_values(values, method, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    resolved(method=method, file=str(path))


@examples(120)
@given(
    st.one_of(
        st.binary(max_size=60), st.text(alphabet="ab:-[]{}&*!#|>'\"%@`,?\n \t1.~<=e_/", max_size=60).map(str.encode)
    )
)
def test_configurations_of_any_bytes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(data)
    resolved(method="sft", file=str(path))


@examples(120)
@given(
    st.lists(
        st.one_of(
            st.tuples(KEYS, st.one_of(st.text(max_size=10), VALUES.map(lambda v: json.dumps(v, default=str)))).map(
                "=".join
            ),
            st.text(max_size=10),
            KEYS.map(lambda key: f"--{key}"),
        ),
        max_size=4,
    )
)
def test_words_of_any_letters(words):
    resolved(method="dpo", overrides=words)


# -- files of rows -----------------------------------------------------------------------------------------------------


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def _lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _parquet(columns: dict[str, Any], compression: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression=compression)
    return buffer.getvalue()


FILES = [
    ("sft", "a.jsonl", _lines({"messages": turns("a", "b", "c", "d")}, {"messages": turns("höhö", 'x\n{}[]"')})),
    ("sft", "b.jsonl", _lines({"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "output": "d"})),
    ("sft", "c.json", json.dumps([{"prompt": "a", "completion": "b"}] * 2).encode()),
    ("dpo", "d.jsonl", _lines({"prompt": "q", "chosen": turns("q", "a"), "rejected": turns("q", "b")})),
    ("sft", "e.csv", b'prompt,completion\n"a, ""b""",b\nc,d\n'),
    ("sft", "f.parquet", _parquet({"messages": [turns("a", "b"), turns("c", "d")]}, "snappy")),
    ("sft", "g.parquet", _parquet({"prompt": ["a"] * 20, "completion": ["b"] * 20}, "none")),
]
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"null",
    b"NaN",
    b"1e999",
    b"\\u0000",
    b"\\ud800",
    b"\xff",
    b"\0",
    b"\n",
    b"\r",
    b"\xef\xbb\xbf",
    b'"messages":',
    b'"role"',
    b'"content":5',
    b"[]",
    b'{"role":"user","content":"z"}',
    b"PAR1",
    b"[" * 30_000,
]
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.one_of(st.sampled_from(PIECES), st.binary(max_size=2))),
    min_size=1,
    max_size=3,
)


@examples(50)
@given(file=st.sampled_from(FILES), edits=EDITS)
def test_files_with_something_changed(file, edits, tmp_path_factory):
    """At each place some bytes are taken out and others put in. A crash of a parser would end the tests."""
    method, name, data = file
    for where, taken, put in edits:
        place = round(where * len(data))
        data = data[:place] + put + data[place + taken :]
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / name).write_bytes(data)
    try:
        rows = load_rows([DatasetSpec(path=str(folder / name))], method, seed=1)
    except UserError as error:
        place = error.message
    else:
        place = name
        check_rows(rows, method)
    assert name in place


def check_rows(rows: Rows, method: str) -> None:
    left_out = sum(len(places) for places in rows.dropped.values())
    assert len(rows.dataset) + left_out == rows.read > 0
    for row in rows.values():
        for column in ("messages",) if method == "sft" else ("chosen", "rejected"):
            assert row[column] and row[column][-1]["role"] == "assistant"
            assert all(turn["content"].strip() for turn in row[column] if turn["role"] != "system")


# -- conversations -----------------------------------------------------------------------------------------------------

SNIPPETS = [
    "<s>",
    "</s>",
    "<|assistant|>\n",
    "<|user|>",
    "\n\n",
    "\0",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "e\u0301",
    "👩\u200d🚀",
    "\r\n",
    "",
]
TEXT = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=6)), max_size=4).map("".join)
ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool"])
CONVERSATIONS = st.one_of(
    st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXT}), max_size=5),
    st.lists(st.tuples(TEXT, TEXT).map(lambda pair: turns(*pair)), min_size=1, max_size=3).map(
        lambda pairs: [turn for pair in pairs for turn in pair]
    ),
)


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> list[ChatTemplate]:
    return [resolve_template("zephyr", make_tokenizer(tmp_path_factory.mktemp(f"tokenizer-{i}"))) for i in range(1)]


@examples(150)
@given(messages=CONVERSATIONS, loss_on=st.sampled_from(["assistant", "last", "all"]))
def test_conversations_of_any_text(messages, loss_on, templates):
    """The ids are the whole text's, an answer with its end token is supervised, and nothing else is."""
    (template,) = templates
    tokenizer = template.tokenizer
    try:
        known = normalise({"messages": messages}, "sft").value["messages"]
        if any(turn["role"] == "tool" for turn in known):
            return
        ids, mask = template.encode(known, loss_on)
        rendered = template.render(known)
        text, spans = rendered.text, list(rendered.spans.values())
    except RowError:
        return
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape and not mask[0]
    assert tokenizer.decode(ids) == text
    # one a turn, of which the first is the system's, written or not: none came out of a turn's own text
    assert (ids == tokenizer.eos_token_id).sum() == len(known) + (known[0]["role"] != "system")
    asked = next((i for i, turn in enumerate(known) if turn["role"] == "user"), None)
    if asked is None:
        asked = 0 if known[0]["role"] == "system" else len(known)
    answers = [turn["content"] for turn in known[asked + 1 :] if turn["role"] == "assistant"]
    assert [text[span.start : span.end] for span in spans] == [answer + tokenizer.eos_token for answer in answers]
    if loss_on == "all":
        assert mask[1:].all()
        return
    wanted = "".join(text[span.start : span.end] for span in (spans[-1:] if loss_on == "last" else spans))
    found = tokenizer.decode(ids[mask], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert found == wanted
