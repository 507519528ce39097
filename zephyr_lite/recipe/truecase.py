"""Truecasing: restoring capitals of sentence starts, the pronoun I, and names.

Raw UltraChat's fault: the first sentence of a turn is written correctly, the sentences after it and the pronoun are not
("Hello. how are you?"). Only words entirely in lower case change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .english import ALWAYS, is_english, word_list
from .lexicon import Lexicon
from .protect import spans, without_blocks

# rule → what it capitalizes, in the order of the report
RULES = {
    "turn_start": "the first word of a turn",
    "after_terminator": "the first word after . ! or ?, closing and opening quotes and brackets between",
    "after_title": "the name after Mr., Dr. and the like",
    "list_item": "the first word of a list's item that is a sentence, or has a colon",
    "line_start": "the first word after a blank line, or after a line that ends a sentence",
    "lone_i": "the pronoun I",
    "known_name": "a word that the corpus writes with a capital inside sentences",
    "known_phrase": "a pair of words that the corpus writes with capitals together",
}


class Change(NamedTuple):
    """A changed word: its position, the rule, and its new form."""

    start: int
    rule: str
    form: str


_WORD = re.compile(r"[^\W\d_]+")
_LATIN = re.compile(r"[a-zß-öø-ɏ]")  # lower-case letters of Latin script

# -- is a word the start of a sentence? ------------------------------------------------------------------------------

_OPENING = r"(?:[\"'“‘(\[¿¡]|\*\*|__)*"  # one asterisk is an action: *giggles*
_TERMINATOR = re.compile(rf"(?P<end>[.!?]+)(?P<close>[\"'”’)\]*_]*)(?P<space>\s+){_OPENING}$")
_TURN_START = re.compile(rf"^\s*(?:(?:[-*•–>]|#{{1,6}}|\d{{1,3}}[.)])\s+)?{_OPENING}$")
_LIST_ITEM = re.compile(rf"^[ \t]*(?:[-*•–>+]|#{{1,6}}|\(?\d{{1,3}}[.):]|\(?[a-zA-Z][.)])[ \t]+{_OPENING}$")
_MARKER_BEFORE = re.compile(r"\n[ \t]*\(?$")  # before a letter that numbers an item: "a. What"
_BLANK_LINE = re.compile(rf"\n[ \t\r]*\n[ \t]*{_OPENING}$")
_LINE = re.compile(rf"(?:```|[.!?:])[\"'”’)\]*_]*[ \t\r]*\n[ \t]*{_OPENING}$")

ABBREVIATIONS = frozenset(
    word_list("""
mr mrs ms dr prof sr jr st mt ft gen col sgt capt lt cpl rev hon pres gov sen rep messrs mme mlle etc vs cf al approx
ca viz ibid et inc ltd co corp dept univ assn bros no nos vol vols fig figs pp pg ed eds est min max sec hr hrs avg
tel ext ave blvd rd jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thur thurs fri sat sun oz lb
lbs tbsp tsp approx resp incl excl misc orig e.g i.e eg ie
""")
) - {"no", "al", "sun", "sat", "max", "ed", "mar", "min", "mon", "fig", "wed", "co", "jan"}
# the next word is a person's name
TITLES = frozenset(word_list("mr mrs ms dr prof capt sgt lt col rev sen gov"))
_SAID = frozenset(
    word_list("""
he she they we it i you said asked replied whispered shouted cried exclaimed answered thought yelled called muttered
murmured says asks
""")
)
# words that continue after a quoted sentence: "A boy runs." is true
_CONTINUES = frozenset(["is", "are", "was", "were", "to", "and", "or", "means"])
# … after a quoted question or exclamation, which may be a title: "Help!" by the Beatles
_CONTINUES_TITLE = _CONTINUES | frozenset(
    word_list("""
by from in on of with for at as has had have can could will would may might does did but because that which who
encourages shows asks makes implies suggests refers
""")
)
_ENDS_OF_NAMES = frozenset(["yahoo", "jeopardy"])
_COUNT_BEFORE = re.compile(r"\d ?$")
_PARTICLES = frozenset(word_list("van von der den de da di du del la le el al bin ibn ter ten zu y e"))
_NUMBER = re.compile(r"[ivxl]+\)|[a-zA-Z](?:[.)](?=[\s.)])|\.[a-zA-Z])")
_NO_WORD = re.compile(r":\S|[.!?]?/\w")
_LONE_I_RIGHT = re.compile(r"(?:['’](?:m|ve|d|ll|s)\b|[ \n]+[\"'“(*_]*[a-zA-Z]|,? |[.!?;:](?:\s|$)|[”\")]|$)")
_LONE_I_LEFT = re.compile(r"(?:^|[\s\"“‘'(*_—–,-])$")
_AROUND = 100  # characters
_ASIDE = 300  # characters of an aside in brackets
# (before, after): where the letter i is no pronoun
_NO_PRONOUN = tuple(
    (re.compile(before), re.compile(after))
    for before, after in (
        (r"(?:^|\n)[ \t]*\(?$|\($", r"[.)]"),  # an item's number: "i. one", "(i)"
        (r"[\"“'‘]$", r"[\"”'’](?![mvdl])"),  # the letter itself: "i"
        (r"\b(?:for|each|index|variable|where|let|element)\s$", r"\s*(?:in |[=<>+*-] |\+=)"),  # for i in range
        (r"", r" (?:is|denotes?|represents|satisfies|ranges|equals|be)\b"),  # where i is the index
        (r"", r",? (?:and |or |to )?(?:i{2,3}|[b-hj-tv-z])\b(?!['’.])|, [ou]\b(?!['’])|\. ?e\b"),  # i, j; i, ii; i. e.
        (r"\b[b-hj-z], (?:and |or )?$|\bnpm $", r""),  # a, e, i; npm i
        (  # "part i of it", but "the part i like"
            r"\b(?:index|variable|row|column|step|phase|part|chapter|type|class|vitamin|element|letter|number|unit|section|"
            r"figure|table|let)\s$",
            r"(?! (?!(?:is|of|and|or|in|to|for|at|with|are|the|from|denotes?|be)\b)[a-z]+\b|['’])",
        ),
    )
)


def _start_rule(text: str, gap: str, first: bool, before: str, start: int, end: int) -> str | None:
    """The rule that makes the word text[start:end] a sentence's first, or None.

    Args:
        gap: the text between the word before and this one.
        first: whether it is the text's first word.
        before: the word before, in lower case.
    """
    if _NUMBER.match(text, start) or _NO_WORD.match(text, end):
        return None  # an item's letter, "n.d.", "doi:10"
    if end - start == 1 and text[start] not in "aio" and text[end : end + 1] != "-":
        return None  # a variable: "x is small"
    if first:
        return "turn_start" if _TURN_START.match(gap) else None
    newline = gap.rfind("\n")
    if newline >= 0:
        line = gap[newline + 1 :]
        if _LIST_ITEM.match(line):
            return "list_item" if line[-1] not in "\"'“‘" and _is_sentence(text, start) else None
        if text[start:end] == "where" and not any(mark in gap for mark in ".!?"):
            return None  # it explains the formula above
        return "line_start" if _BLANK_LINE.search(gap) or _LINE.search(gap) else None
    found = _TERMINATOR.search(gap)
    if found is None:
        return None
    mark, close, word = found["end"], found["close"], text[start:end].lower()
    if "..." in mark or mark == ".." or (gap[0] == " " and gap.startswith(" . ")):
        return None  # may be a pause
    if mark in (".", "!") and gap[0] == mark:
        if before in TITLES:
            return "after_title"
        if len(before) == 1 and _MARKER_BEFORE.search(text, max(0, start - 12), start - len(gap) - 1):
            return "list_item"
        if before in ABBREVIATIONS or _is_dotted(before, text, start - len(gap) - 1):
            return None
        if before == "al" and text[max(0, start - len(gap) - 5) : start - len(gap)].lower() == "et al":
            return None
        if mark == "!" and before in _ENDS_OF_NAMES:
            return None
    if close[:1] in ('"', "”", "’", "'"):
        if mark != "." and word in _SAID:
            return None  # "Really?" he asked
        if word in (_CONTINUES if mark == "." else _CONTINUES_TITLE):
            return None
    if close[-1:] in (")", "]") and ("(" in gap or not _is_own_sentence(text, start - len(gap))):
        return None  # (!), and the sentence around an aside (really?)
    return "after_terminator"


def _is_own_sentence(text: str, at: int) -> bool:
    """Whether the brackets that close after ``at`` were opened between sentences, not inside one."""
    opened = max(text.rfind("(", max(0, at - _ASIDE), at), text.rfind("[", max(0, at - _ASIDE), at))
    return opened < 0 or text[:opened].rstrip(" \t")[-1:] in ("", "\n", ".", "!", "?", ":", '"', "”")


def _is_sentence(text: str, start: int) -> bool:
    """Whether an item of a list is more than an option ("- yes"): four words, a colon or a full stop."""
    stop = text.find("\n", start)
    line = text[start : stop if stop >= 0 else len(text)]
    return line.count(" ") >= 3 or ":" in line or line.rstrip()[-1:] in (".", "!", "?")


def _is_dotted(before: str, text: str, at: int) -> bool:
    """Whether the word before a dot is a single letter: an initial, or the end of "U.S."; but "so do I." ends a sentence.

    Args:
        at: the letter's position.
    """
    return len(before) == 1 and before != "i" and (at == 0 or text[at - 1] in " .\n\t(\"“'‘[*")


def _lone_i(text: str, start: int) -> bool:
    """Whether the letter at ``start`` is the pronoun, and not an item's number, a letter of "i.e." or a variable."""
    before = text[max(0, start - 12) : start].lower()
    if not _LONE_I_RIGHT.match(text[start + 1 : start + 12]) or not _LONE_I_LEFT.search(before):
        return False
    if text[start + 1 : start + 2] == ")" and "(" not in text[max(0, start - _ASIDE) : start]:
        return False  # "i) this; ii) that"
    return not any(left.search(before) and right.match(text, start + 1) for left, right in _NO_PRONOUN)


def changes(text: str, lexicon: Lexicon | None) -> list[Change]:
    """The words of an English text that lack a capital.

    Args:
        text: one turn.
        lexicon: of names; None leaves names alone.

    Returns:
        The changes, in order.
    """
    found: list[Change] = []
    protected = spans(text)
    names: Mapping[str, str] = lexicon.names if lexicon is not None else {}
    phrases: Mapping[str, str] = lexicon.phrases if lexicon is not None else {}
    known = lexicon.words if lexicon is not None else frozenset()
    words = [(m.start(), m.end(), m.group()) for m in _WORD.finditer(text)]
    lowers = [word.lower() for _, _, word in words]
    at, last = 0, 0
    for index, (start, end, word) in enumerate(words):
        # after a single space only names and the pronoun change
        if index and word not in known and word != "i" and start == last + 1 and text[last] == " ":
            last = end
            continue
        while at < len(protected) and protected[at][1] <= start:
            at += 1
        inside = at < len(protected) and protected[at][0] < end and start < protected[at][1]
        gap = text[last:start]
        first, last = index == 0, end
        if inside or word != lowers[index] or _LATIN.match(word) is None:
            continue
        if gap in ("'", "’") and not first and text[start - 2 : start - 1].isalnum():
            continue  # the m of I'm
        if word == "i":
            # "i" is a word of other languages, in which a passage of an English turn may be
            if _lone_i(text, start) and (
                text[start + 1 : start + 2] in ("'", "’") or is_english(text[max(0, start - _AROUND) : start + _AROUND])
            ):
                found.append(Change(start, "lone_i", "I"))
            continue
        before = lowers[index - 1] if index else ""
        rule = None if gap == " " and index else _start_rule(text, gap, first, before, start, end)
        name = names.get(word)
        if gap == "-" and word not in ALWAYS:
            name = None  # zephyr-lite, but non-American
        if word == "ms" and (text[end : end + 1] != "." or _COUNT_BEFORE.search(gap)):
            name = None  # milliseconds
        if name is None and phrases:
            name = _of_phrase(index, words, lowers, text, phrases)
            if name is not None and word in _PARTICLES and _next_to_a_name(index, words, names):
                name = None  # Vincent van Gogh, but Van Gogh
            kind = "known_phrase"
        else:
            kind = "known_name"
        if rule is not None:
            # a name may begin in lower case: iPhone
            upper = word[0].upper()
            found.append(Change(start, rule, name or (upper + word[1:] if len(upper) == 1 else word)))  # ß is two
        elif name is not None and name != word:
            found.append(Change(start, kind, name))
    return [change for change in found if change.form != text[change.start : change.start + len(change.form)]]


def _of_phrase(
    index: int, words: list[tuple[int, int, str]], lowers: list[str], text: str, phrases: Mapping[str, str]
) -> str | None:
    """The word's form in a known pair with a neighbor one space away."""
    for first in (index, index - 1):
        if first >= 0 and first + 1 < len(words) and text[words[first][1] : words[first + 1][0]] == " ":
            pair = phrases.get(f"{lowers[first]} {lowers[first + 1]}")
            if pair is not None:
                return pair.split(" ")[index - first]
    return None


def _next_to_a_name(index: int, words: list[tuple[int, int, str]], names: Mapping[str, str]) -> bool:
    """Whether a neighbor has a capital: then this word is in lower case on purpose."""
    after = words[index + 1][2] if index + 1 < len(words) else ""
    before = words[index - 1][2] if index else ""
    return after[:1].isupper() or before[:1].isupper() or before in names


def restore(text: str, lexicon: Lexicon | None) -> tuple[str, list[Change]]:
    """Restore the capitals of one turn; a turn that is not English is not changed."""
    if not is_english(text):
        return text, []
    found = changes(text, lexicon)
    for start, _, form in found:  # of the word's length
        text = text[:start] + form + text[start + len(form) :]
    return text, found


# -- is a dialogue's capitalization broken? --------------------------------------------------------------------------

# a coarse fault, and a place without one; ``changes`` knows the exceptions
_SUSPECT = re.compile(r"[.!?][\"'”’)\]*_]*\s+[\"'“‘(\[*_]*[a-z]|(?<![\w.*/+=^-])i(?=[ '’,])")
_WELL = re.compile(r"[.!?][\"'”’)\]*_]*\s+[\"'“‘(\[*_]*[A-Z]|\bI\b")
_FAULTS = frozenset(("after_terminator", "lone_i"))
_SHARE_ONE, _SHARE = 0.5, 0.2  # share of the places that must be wrong, with one fault and with more


def is_broken(turns: Sequence[str]) -> bool:
    """Whether sentence starts and pronouns of one speaker are in lower case.

    A single fault suffices if it is half of all places that could have one ("Hello. how are you?"); of several, a fifth of
    the places. The first sentence of a turn does not count: it is correct in the fault that is looked for.
    """
    suspects = [turn for turn in turns if _SUSPECT.search(turn)]
    if not suspects:
        return False
    well = sum(len(_WELL.findall(turn)) for turn in turns)
    suspicious = sum(len(_SUSPECT.findall(turn)) for turn in suspects)
    if suspicious * 2 < (suspicious + well) * _SHARE:  # with a margin, as some places match neither pattern
        return False
    faults = 0
    for turn in suspects:
        if is_english(turn):
            faults += _fault_count(turn)
            if faults > 1 and faults >= (faults + well) * _SHARE:
                return True
    return faults == 1 and faults >= (faults + well) * _SHARE_ONE


def _fault_count(text: str) -> int:
    return sum(
        change.rule in _FAULTS
        for line in without_blocks(text).split("\n")
        if _SUSPECT.search(line)
        for change in changes(line, None)
    )
