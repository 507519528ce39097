"""The cleaning's rules on their own examples, and what truecasing may never do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zephyr_lite.errors import UserError
from zephyr_lite.recipe.ultrachat.casing import restore
from zephyr_lite.recipe.ultrachat.casing_rules import CASING_RULES, DETECTION_RULES
from zephyr_lite.recipe.ultrachat.counting import WordCounts, count_words
from zephyr_lite.recipe.ultrachat.english import ALWAYS
from zephyr_lite.recipe.ultrachat.lexicon import Lexicon
from zephyr_lite.recipe.ultrachat.protect import PROTECT_RULES, spans
from zephyr_lite.recipe.ultrachat.refusals import REFUSAL_RULES, first_refusal, refusal
from zephyr_lite.recipe.ultrachat.rules import Rule
from zephyr_lite.recipe.ultrachat.words import words_of

TABLES: tuple[Rule[Any], ...] = (*PROTECT_RULES, *CASING_RULES, *DETECTION_RULES, *REFUSAL_RULES)
POSITIVE = [pytest.param(rule, e, id=f"{rule.name}-{n}") for rule in TABLES for n, e in enumerate(rule.positive)]
NEGATIVE = [pytest.param(rule, e, id=f"{rule.name}-{n}") for rule in TABLES for n, e in enumerate(rule.negative)]


def lexicon_of(*dialogues: str) -> Lexicon:
    return Lexicon.of([count_words(words_of(dialogues), np.ones(len(dialogues), bool))])


@pytest.mark.parametrize(("rule", "example"), POSITIVE)
def test_holds(rule: Rule[Any], example: Any) -> None:
    assert rule.holds(example)


@pytest.mark.parametrize(("rule", "example"), NEGATIVE)
def test_does_not_hold(rule: Rule[Any], example: Any) -> None:
    assert not rule.holds(example)


def test_rules_are_named_once_and_have_examples() -> None:
    assert len({rule.name for rule in TABLES}) == len(TABLES)
    assert all(rule.positive and rule.negative and rule.does for rule in TABLES)


@pytest.mark.parametrize("rule", REFUSAL_RULES, ids=lambda rule: rule.name)
def test_no_other_refusal_rule_takes_a_negative_example(rule: Rule[tuple[str, str]]) -> None:
    assert [refusal(*example) for example in rule.negative] == [None] * len(rule.negative)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Hello. how are you? i'm fine.", "Hello. How are you? I'm fine."),
        ("I met Dr. smith, e.g. in the U.S. army. he left.", "I met Dr. Smith, e.g. in the U.S. army. He left."),
        (
            "Sure! here:\n```python\nfor i in x: print(i). so\n```\nthat is all. i hope.",
            "Sure! Here:\n```python\nfor i in x: print(i). so\n```\nThat is all. I hope.",
        ),
        (
            "See https://a.example/i?b. it works on myVar and my_var. call `i. x`.",
            "See https://a.example/i?b. It works on myVar and my_var. Call `i. x`.",
        ),
        ("It was 3.5 km... maybe four. ok, so be it.", "It was 3.5 km... maybe four. Ok, so be it."),
        ("Well. été is summer in French. élan too.", "Well. Été is summer in French. Élan too."),
        ("I ask on monday. he came in july.", "I ask on Monday. He came in July."),
        ("Privet. привет. как дела?", "Privet. привет. как дела?"),
        ("Das ist gut. und das ist nicht gut. i wo.", "Das ist gut. und das ist nicht gut. i wo."),
        (
            "Use iPhone and eBay. they are the same. macOS is it.",
            "Use iPhone and eBay. They are the same. macOS is it.",
        ),
    ],
)
def test_restores(before: str, after: str) -> None:
    assert restore(before, Lexicon())[0] == after


def test_only_case_changes_and_nothing_in_protected_spans() -> None:
    for rule in TABLES:
        for example in (*rule.positive, *rule.negative):
            for text in example if isinstance(example, tuple) else (example,):
                after, changes = restore(text, Lexicon())
                assert len(after) == len(text) and after.lower() == text.lower()
                assert restore(after, Lexicon())[0] == after  # nothing is left to do
                for start, end, _ in spans(text):
                    assert after[start:end] == text[start:end]
                assert all(after[change.start :].startswith(change.form) for change in changes)


def test_lexicon_learns_names_inside_sentences_by_dialogue() -> None:
    name = "We went to see Ouagadougou in the spring of the year."
    lexicon = lexicon_of(*[name] * 3, "It is the best Book of all in this library.", "She has a book in her old bag.")
    assert lexicon.names()["ouagadougou"] == "Ouagadougou"
    assert "book" not in lexicon.names()
    # ten times in one dialogue is one vote
    assert "ouagadougou" not in lexicon_of("\n".join([name] * 10)).names()
    # a sentence's first word, a heading and shouting say nothing
    assert not set(lexicon_of(*["Rivers flow. My Great Long Title\nWE GO UP AND AWAY NOW"] * 5).names()) - set(ALWAYS)


def test_lexicon_knows_pairs_where_the_words_alone_are_common() -> None:
    house = ["He was in the White House for the whole week."] * 4
    common = ["A white wall and a small house with a red roof."] * 6
    lexicon = lexicon_of(*house, *common)
    assert "white" not in lexicon.names() and lexicon.phrases()["white house"] == "White House"
    assert (
        restore("I saw the white house. the house is white.", lexicon)[0]
        == "I saw the White House. The house is white."
    )
    # the pair in lower case often enough
    assert "white house" not in lexicon_of(*house, *["He has a white house in the small town."] * 6).phrases()


def test_the_corpus_overrules_the_built_in_names() -> None:
    assert "lima" not in ALWAYS and ALWAYS["turkish"] == "Turkish"
    counted = lexicon_of(
        *["They sat on the turkish carpet all day long."] * 6, "She likes the Turkish coffee of this town."
    )
    assert "turkish" not in counted.names()


def test_lexicon_does_not_depend_on_the_blocks() -> None:
    texts = [
        f"They met {name} in the old town of {place} today." for name in ("Anna", "Otto") for place in ("Bonn", "anna")
    ] * 3
    parts = [
        count_words(words_of(texts[s : s + 4]), np.ones(len(texts[s : s + 4]), bool)) for s in range(0, len(texts), 4)
    ]
    assert Lexicon.of(parts) == lexicon_of(*texts)
    assert Lexicon.of([WordCounts.unpack(part.pack()) for part in parts]) == lexicon_of(*texts)


def test_lexicon_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zephyr_lite.recipe.ultrachat.lexicon.LIMIT", 20)
    blocks = [
        count_words(
            words_of([f"We have seen Xa{n:x}bc and the Common Thing there near q{n:x}z often."] * 2), np.ones(2, bool)
        )
        for n in (10, 11, 12, 13, 14, 15, 170, 171, 172, 173)
    ]
    found = Lexicon.of(blocks * 3)
    assert max(map(len, (found.forms, found.pairs, found.both))) <= 20


def test_lexicon_file(tmp_path: Path) -> None:
    lexicon = lexicon_of(*["We went to see Ouagadougou in the White House."] * 3)
    lexicon.save(tmp_path / "lexicon.txt")
    assert Lexicon.load(tmp_path / "lexicon.txt").names() == lexicon.names()
    (tmp_path / "bad.txt").write_text('{"format": "other"}')
    for name in ("bad.txt", "none.txt"):
        with pytest.raises(UserError, match=name):
            Lexicon.load(tmp_path / name)


def test_first_refusal_looks_at_assistant_turns_only() -> None:
    refused = "As an AI language model, I don't have opinions."
    assert first_refusal(["user", "assistant"], [refused, "Fine."]) is None
    found = first_refusal(["user", "assistant", "user", "assistant"], ["Hi.", "Hello.", "Which?", refused])
    assert found is not None and found[:2] == (3, "as_an_ai")
    assert refused[found[2] : found[3]].startswith("As an AI")
