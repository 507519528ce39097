"""The cleaning's rules on examples, and what truecasing may never do."""

from pathlib import Path

import pytest
import yaml

from zephyr_lite.recipe import refusals, truecase
from zephyr_lite.recipe.lexicon import ALWAYS, Lexicon, is_english
from zephyr_lite.recipe.refusals import refusal
from zephyr_lite.recipe.truecase import changes, is_broken, restore, spans

EXAMPLES = yaml.safe_load(Path(__file__).with_name("rule_examples.yaml").read_text(encoding="utf-8"))
WORDS = ("Anna", "Toulouse", "PyTorch", "iPad", "bank", "white", "house", "may", "May", "rose", "Rose")


def lexicon_of(*dialogues: str) -> Lexicon:
    lexicon = Lexicon()
    lexicon.learn(dialogues)
    return lexicon


def example_lexicon() -> Lexicon:
    """Four dialogues with each of these."""
    lexicon = Lexicon()
    for _ in range(4):
        lexicon.forms.update(WORDS)
        lexicon.pairs.update(("White House", "Van Gogh"))
        lexicon.both.update(("white house", "van gogh"))
    return lexicon


def applies(group: str, rule: str, example) -> bool:
    if group == "protect":
        return any(kind == rule for _, _, kind in spans(example))
    if group == "truecase":
        return any(change.rule == rule for change in changes(example, example_lexicon()))
    if group == "refusals":
        found = refusal(*example)
        text = refusals._QUOTED.sub(" ", example[1].lower().replace("’", "'"))
        return found is not None and refusals._PATTERNS[rule].search(text) is not None
    return is_english(example) if rule == "english" else is_broken(example)


@pytest.mark.parametrize(("group", "rule"), [(group, rule) for group in EXAMPLES for rule in EXAMPLES[group]])
def test_rules_apply_to_their_examples_and_no_others(group, rule):
    for example in EXAMPLES[group][rule]["positive"]:
        assert applies(group, rule, example), example
    for example in EXAMPLES[group][rule]["negative"]:
        assert not applies(group, rule, example), example
        assert group != "refusals" or refusal(*example) is None, example


def test_every_rule_has_examples():
    tables = {"protect": truecase.KINDS, "refusals": refusals.REFUSALS}
    assert {group: list(EXAMPLES[group]) for group in tables} == {group: list(table) for group, table in tables.items()}


RESTORED = {
    "I met Dr. smith, e.g. in the U.S. army. he left.": "I met Dr. Smith, e.g. in the U.S. army. He left.",
    "Sure! here:\n```python\nfor i in x: print(i). so\n```\nthat is all. i'm": (
        "Sure! Here:\n```python\nfor i in x: print(i). so\n```\nThat is all. I'm"
    ),
    "See https://a.example/i?b. it works on my_var. call `i. x`.": "See https://a.example/i?b. It works on my_var. Call `i. x`.",
    "Well. été is summer in French. élan too.": "Well. Été is summer in French. Élan too.",
    "Privet. привет. как дела?": "Privet. привет. как дела?",
    "Das ist gut. und das ist nicht gut. i wo.": "Das ist gut. und das ist nicht gut. i wo.",
    "Use iPhone and eBay. they are the same. macOS is it.": "Use iPhone and eBay. They are the same. macOS is it.",
}


@pytest.mark.parametrize("before", RESTORED)
def test_restores(before: str):
    assert restore(before, Lexicon())[0] == RESTORED[before]


def test_only_case_changes_and_nothing_in_protected_spans():
    for rule in (rule for group in EXAMPLES.values() for rule in group.values()):
        for example in (*rule["positive"], *rule["negative"]):
            for text in example if isinstance(example, list) else (example,):
                after, changes = restore(text, Lexicon())
                assert len(after) == len(text) and after.lower() == text.lower()
                assert restore(after, Lexicon())[0] == after  # nothing is left to do
                assert all(after[start:end] == text[start:end] for start, end, _ in spans(text))
                assert all(after[change.start :].startswith(change.form) for change in changes)


def test_lexicon_learns_names_inside_sentences_by_dialogue():
    name = "We went to see Ouagadougou in the spring of the year."
    lexicon = lexicon_of(*[name] * 3, "It is the best Book of all in this library.", "She has a book in her old bag.")
    assert lexicon.names["ouagadougou"] == "Ouagadougou"
    assert "book" not in lexicon.names
    # ten times in one dialogue is one vote
    assert "ouagadougou" not in lexicon_of("\n".join([name] * 10)).names
    # a sentence's first word, a heading and shouting say nothing
    assert not set(lexicon_of(*["Rivers flow. My Great Long Title\nWE GO UP AND AWAY NOW"] * 5).names) - set(ALWAYS)


def test_lexicon_knows_pairs_where_the_words_alone_are_common():
    house = ["He was in the White House for the whole week."] * 4
    common = ["A white wall and a small house with a red roof."] * 6
    lexicon = lexicon_of(*house, *common)
    assert "white" not in lexicon.names
    restored = restore("I saw the white house. the house is white.", lexicon)[0]
    assert restored == "I saw the White House. The house is white."
    # the pair in lower case often enough
    assert "white house" not in lexicon_of(*house, *["He has a white house in the small town."] * 6).phrases
