"""Truecasing: restoring capitals of sentence starts, the pronoun I, and names.

Raw UltraChat's fault: the first sentence of a turn is written correctly, the sentences after it and the pronoun are not
("Hello. how are you?"). Only words entirely in lower case change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .lexicon import ALWAYS, WORDS, Lexicon, is_english

# -- spans that are left alone: code, addresses, names of files, formulas, markup ---------------------------------------

# No repetition in the patterns is unbounded from every position: the time would grow with the square of a row's length.
# name → pattern, in order of precedence
KINDS = {
    "code_block": r"(?:```|~~~)[\s\S]*?(?:```|~~~|\Z)",
    "inline_code": r"`[^`\n]+`",
    "code_line": (
        r"(?m:^(?:[ \t]++|[$>%] |>>> )?(?:"
        r"(?:(?:def|class|import|from|return|public|private|static|void|const|let|var|function|elif|#include|using|"
        r"package|SELECT|select|INSERT|insert)\b[^.!?\n]*(?:[(){};=]|\bimport\b|\bfrom\b)[^\n]*)"
        r"|(?:import [\w.]+(?: as \w+)?)|(?:from [\w.]+ import [^\n]*)|(?:[^\n]*[;{}][ \t]*)|(?:[$][ ][^\n]+)|"
        r"(?:[A-Za-z_][\w.\[\]]*[ ]?[-+*/:]?=[ ]?[^=\n][^\n]*)|(?:package \w+)"
        r"|(?:(?:for|while|if|elif|else|try|except|with)\b[^.!?\n]*:[ \t]*)|(?://[^\n]*)|(?:(?:print|"
        r"console\.log)\([^\n]*)|(?:(?<=[ \t])(?:return|break|continue|pass|yield|raise)(?: [\w.\[\]()+*/%-]+)*)"
        r")\r?$)"
    ),
    "formula": (
        r"\$\$[\s\S]+?\$\$|\$(?=[^\s\d])[^$\n]{0,120}?[\\^_=+{}][^$\n]{0,120}?\$|"
        r"\\\((?:(?!\\\()[\s\S])+?\\\)|\\\[(?:(?!\\\[)[\s\S])+?\\\]"
    ),
    "html_tag": r"</?[A-Za-z][\w-]*(?:\s[^<>\n]*)?/?>",
    "url": (
        r"(?:[a-z][a-z0-9+.-]{0,20}://|www\.)[^\s<>\"”]*[^\s<>\"”.,;:!?)\]}'*]|\b(?:[a-z0-9-]{1,63}+\.){1,8}(?:com|org|net|io|"
        r"edu|gov|co|uk|de|ai|info|dev)\b(?:/(?:[^\s<>\"”]*[^\s<>\"”.,;:!?)\]}'*])?)?"
    ),
    "email": r"(?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)+",
    "handle": r"(?<![\w&])[@#][A-Za-z]\w*",
    "path": (
        r"(?<![\w/])(?:~|\.{1,2})?/(?:[\w.@+-]+/){0,32}[\w.@+-]*\w|\b[A-Za-z]:\\[^\s\"]+|\b\w++(?:[\\/][\w.-]+){2,}"
    ),
    "file_name": (
        r"\b[\w-]{1,120}+\.(?:py|js|ts|jsx|tsx|json|jsonl|csv|txt|md|html?|css|xml|ya?ml|toml|ini|sh|bat|exe|dll|so|"
        r"jar|java|"
        r"cpp|c|h|hpp|cs|go|rs|rb|php|sql|pdf|docx?|xlsx?|pptx?|png|jpe?g|gif|svg|mp[34]|wav|zip|tar|gz|log|cfg|conf|"
        r"ipynb|parquet)\b"
    ),
    "identifier": (
        r"\b[A-Za-z][^\W_]*+_\w+|\b[A-Za-z]++\d\w*|\b_\w+|\b\w++(?:::|->)\w[\w:>-]*|\b[A-Za-z_]\w*+\([^\s()]*\)|"
        r"(?<![\w-])--?[a-z][\w-]*|\b[a-z]++(?:\.[a-z_]++){1,8}\([^\n()]*\)|\b[a-z]++[A-Z]\w*"
    ),
    "variable": (
        r"(?<![\w'’])[a-zA-Z](?:\s*(?:[=<>+*/^]|≤|≥|!=|\+\+)\s*[\w(]|\[[^\]\n]{0,120}\])|(?<=[=<>+*/^\[] )[a-zA-Z](?!\w)|"
        r"(?<=[\w)][=<>+*/^])[a-zA-Z]\b(?!\*)|(?<=[=<>+*/^\[(])[a-zA-Z](?=[)\]\s,])|(?<![\w'’])[a-zA-Z](?:-th|th)\b"
    ),
}

_PROTECTED = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in KINDS.items()))
_BLOCK = re.compile(f"{KINDS['code_block']}|{KINDS['formula']}")


def spans(text: str) -> list[tuple[int, int, str]]:
    """The protected spans: (start, end, kind) of each, in order and without overlaps."""
    return [(m.start(), m.end(), m.lastgroup or "") for m in _PROTECTED.finditer(text) if m.end() > m.start()]


def without_blocks(text: str) -> str:
    """The text without code blocks and formulas."""
    return _BLOCK.sub(" ", text)


# -- changes -------------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A changed word: its position, the rule, and its new form.

    The rules: turn_start, after_terminator, after_title ("Mr. Smith"), list_item, line_start, lone_i, known_name (a word that the
    corpus writes with a capital inside sentences), known_phrase (a pair of such words).
    """

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
_MARKER = re.compile(r"\n[ \t]*\(?[^\W\d_]$")  # a letter that numbers an item: "a. What"
_LINE = re.compile(rf"(?:\n[ \t\r]*|(?:```|[.!?:])[\"'”’)\]*_]*[ \t\r]*)\n[ \t]*{_OPENING}$")
# an option ("- yes") is no sentence: that has four words, a colon or a full stop
_SENTENCE = re.compile(r"[^\n]*:|(?:[^ \n]* ){3}|[^\n]*[.!?][^\S\n]*(?:\n|\Z)")
# at an item's number, "n.d.", a variable ("x is small"), "doi:10", "and/or" no sentence starts
_NO_START = re.compile(
    r"[ivxl]+\)|[a-zA-Z](?:[.)](?=[\s.)])|\.[a-zA-Z])|(?![aio])[^\W\d_](?![^\W\d_]|-)|[^\W\d_]+(?::\S|[.!?]?/\w)"
)

# an abbreviation, an initial or the end of "U.S."; but "so do I." ends a sentence
_ABBREVIATED = re.compile(
    rf"(?<![^\W\d_])(?:{'|'.join(WORDS['abbreviations'])}|et al)$|(?:^|(?<=[ .\n\t(\"“'‘\[*]))(?!i)[^\W\d_]$",
    re.IGNORECASE,
)
_TITLES, _PARTICLES = frozenset(WORDS["titles"]), frozenset(WORDS["particles"])
_CONTINUES = frozenset(WORDS["continues"])
_CONTINUES_TITLE = _CONTINUES.union(WORDS["continues_title"])
_ENDS_OF_NAMES = frozenset(["yahoo", "jeopardy"])
_NEAR = 16  # characters


def _start_rule(text: str, word: str, start: int, last: int, before: str) -> str | None:
    """The rule that makes a word at ``start`` a sentence's first, or None.

    Args:
        last: the end of the word before, or 0.
        before: the word before, in lower case, or "".
    """
    gap = text[last:start]
    if _NO_START.match(text, start):
        return None
    if not before:
        return "turn_start" if _TURN_START.match(gap) else None
    newline = gap.rfind("\n")
    if newline >= 0:
        if _LIST_ITEM.match(gap[newline + 1 :]):
            return "list_item" if gap[-1] not in "\"'“‘" and _SENTENCE.match(text, start) else None
        if word == "where" and not any(mark in gap for mark in ".!?"):
            return None  # it explains the formula above
        return "line_start" if _LINE.search(gap) else None
    found = _TERMINATOR.search(gap)
    if found is None or "..." in found["end"] or found["end"] == ".." or gap.startswith(" . "):
        return None  # the last three may be a pause
    mark, close = found["end"], found["close"]
    if gap[0] == mark and mark in (".", "!"):
        if before in _TITLES:
            return "after_title"
        if _MARKER.search(text, max(0, last - _NEAR), last):
            return "list_item"
        if _ABBREVIATED.search(text, max(0, last - _NEAR), last):
            return None
    if mark == "!" and before in _ENDS_OF_NAMES:
        return None
    if close[:1] in ('"', "”", "’", "'") and word in (_CONTINUES if mark == "." else _CONTINUES_TITLE):
        return None  # "Really?" he asked
    if close[-1:] in (")", "]") and ("(" in gap or mark != "."):
        return None  # (!), and the sentence around an aside (really?)
    return "after_terminator"


# -- the pronoun -----------------------------------------------------------------------------------------------------

_LONE_I = re.compile(
    r"(?<![^\s\"“‘'(*_—–,-])i(?:['’](?:m|ve|d|ll|s)\b|[ \n]+[\"'“(*_]*[a-zA-Z]|,? |[.!?;:](?:\s|$)|[”\")]|$)"
)
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


def _is_pronoun(text: str, start: int) -> bool:
    """Whether the letter i is the pronoun, and not an item's number, a letter of "i.e.", a variable, or a word of another
    language, in which a passage of an English turn may be."""
    if not _LONE_I.match(text, start):
        return False
    following = text[start + 1 : start + 2]
    if following == ")" and "(" not in text[max(0, start - _ASIDE) : start]:
        return False  # "i) this; ii) that"
    before = text[max(0, start - 12) : start].lower()
    if any(left.search(before) and right.match(text, start + 1) for left, right in _NO_PRONOUN):
        return False
    return following in ("'", "’") or is_english(text[max(0, start - _AROUND) : start + _AROUND])


# -- all words of a turn ---------------------------------------------------------------------------------------------

_COUNT_BEFORE = re.compile(r"\d ?$")


def changes(text: str, lexicon: Lexicon | None) -> list[Change]:
    """The words of an English turn that lack a capital, in order; without a lexicon names are left alone."""
    found: list[Change] = []
    protected = bytearray(len(text))
    for start, end, _ in spans(text):
        protected[start:end] = b"\1" * (end - start)
    known = lexicon.words if lexicon is not None else frozenset()
    words = [(m.start(), m.end(), m.group()) for m in _WORD.finditer(text)]
    for index, (start, end, word) in enumerate(words):
        last = words[index - 1][1] if index else 0
        gap = text[last:start]
        within = index > 0 and gap == " "  # where only names and the pronoun change
        if within and word not in known and word != "i":
            continue
        if word != word.lower() or _LATIN.match(word) is None or 1 in protected[start:end]:
            continue
        if gap in ("'", "’") and index and text[start - 2].isalnum():
            continue  # the m of I'm
        if word == "i":
            if _is_pronoun(text, start):
                found.append(Change(start, "lone_i", "I"))
            continue
        rule, form = _name(text, words, index, lexicon) if lexicon is not None and word in known else ("", word)
        if not within:
            start_rule = _start_rule(text, word, start, last, words[index - 1][2].lower() if index else "")
            if start_rule is not None:
                rule = start_rule
                if form == word and len(word[0].upper()) == 1:  # ß is two; a name may be iPhone
                    form = word[0].upper() + word[1:]
        if form != word:
            found.append(Change(start, rule, form))
    return found


def _name(text: str, words: list[tuple[int, int, str]], index: int, lexicon: Lexicon) -> tuple[str, str]:
    """(rule, form) of a word that is a name, or a part of a known pair with a neighbor one space away; else ("", word)."""
    start, end, word = words[index]
    gap = text[words[index - 1][1] if index else 0 : start]
    is_part = gap == "-" and word not in ALWAYS  # zephyr-lite, but non-American
    is_milliseconds = word == "ms" and (text[end : end + 1] != "." or _COUNT_BEFORE.search(gap))
    if word in lexicon.names and not is_part and not is_milliseconds:
        return "known_name", lexicon.names[word]
    for first in (index, index - 1):
        pair = words[max(first, 0) : first + 2]
        if len(pair) < 2 or text[pair[0][1] : pair[1][0]] != " ":
            continue
        form = lexicon.phrases.get(f"{pair[0][2]} {pair[1][2]}".lower())
        if form is not None:
            neighbors = [words[at][2] for at in (index - 1, index + 1) if 0 <= at < len(words)]
            beside_name = any(neighbor[0].isupper() for neighbor in neighbors)
            if word in _PARTICLES and (beside_name or (index and neighbors[0].lower() in lexicon.names)):
                return "", word  # Vincent van Gogh, but Van Gogh
            return "known_phrase", form.split(" ")[index - first]
    return "", word


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
_SHARE_ONE, _SHARE = 0.5, 0.2  # share of the places that must be wrong, with one fault and with more


def is_broken(turns: Sequence[str]) -> bool:
    """Whether sentence starts and pronouns of one speaker are in lower case.

    A single fault suffices if it is half of all places that could have one ("Hello. how are you?"); of several, a fifth of
    the places. The first sentence of a turn does not count: it is correct in the fault that is looked for.
    """
    well = sum(len(_WELL.findall(turn)) for turn in turns)
    suspects = [turn for turn in turns if _SUSPECT.search(turn) and is_english(turn)]
    lines = [line for turn in suspects for line in without_blocks(turn).split("\n") if _SUSPECT.search(line)]
    faults = sum(change.rule in ("after_terminator", "lone_i") for line in lines for change in changes(line, None))
    return faults >= max(1, (faults + well) * (_SHARE if faults > 1 else _SHARE_ONE))
