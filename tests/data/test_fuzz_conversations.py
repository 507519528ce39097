"""Random conversations: their ids are those of the text, or the row is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_tokenizer
from zephyr_lite.data.chat_template import ChatTemplate, resolve_template
from zephyr_lite.data.formats import normalise
from zephyr_lite.data.messages import RowError


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


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
def template(tmp_path_factory) -> ChatTemplate:
    return resolve_template("zephyr", make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=CONVERSATIONS, loss_on=st.sampled_from(["assistant", "last", "all"]))
def test_conversations_of_any_text(messages, loss_on, template):
    """The ids are the whole text's, an answer with its end token is supervised, and nothing else is."""
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
