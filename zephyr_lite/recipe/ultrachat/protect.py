"""Spans of a text in which nothing may change: code, addresses, names of files, formulas, markup.

One pass of one regular expression finds them all; each kind is a named group, and a rule with examples. No repetition may
run to the end of a row from every place of it: the time would grow with the square of its length.
"""

from __future__ import annotations

import re
from functools import partial

from .rules import Rule

Span = tuple[int, int]

# In the order in which they are tried at a place: what may contain others comes first.
_KINDS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "code_block": (
        r"(?:```|~~~)[\s\S]*?(?:```|~~~|\Z)",
        "a fenced block of code, up to its end or the text's",
        ("Run it:\n```python\nprint(1). i = 2\n```", "~~~\nls. cd\n~~~", "```\nnever closed. i"),
        ("No code here. none at all.", "Two ticks `` are not a fence."),
    ),
    "inline_code": (
        r"`[^`\n]+`",
        "code between backticks on one line",
        ("Call `i = paris()`. then stop.",),
        ("It is 5` long.", "An `open tick\nends` nowhere"),
    ),
    "code_line": (
        r"(?m:^(?:[ \t]++|[$>%] |>>> )?(?:"
        r"(?:(?:def|class|import|from|return|public|private|static|void|const|let|var|function|elif|#include|using|"
        r"package|SELECT|select|INSERT|insert)\b[^.!?\n]*(?:[(){};=]|\bimport\b|\bfrom\b)[^\n]*)"
        r"|(?:import [\w.]+(?: as \w+)?)|(?:from [\w.]+ import [^\n]*)|(?:[^\n]*[;{}][ \t]*)|(?:[$][ ][^\n]+)|"
        r"(?:[A-Za-z_][\w.\[\]]*[ ]?[-+*/:]?=[ ]?[^=\n][^\n]*)|(?:package \w+)"
        r"|(?:(?:for|while|if|elif|else|try|except|with)\b[^.!?\n]*:[ \t]*)|(?://[^\n]*)|(?:(?:print|"
        r"console\.log)\([^\n]*)|(?:(?<=[ \t])(?:return|break|continue|pass|yield|raise)(?: [\w.\[\]()+*/%-]+)*)"
        r")\r?$)",
        "a line that is code without a fence",
        (
            "import numpy as np",
            "for i in range(10):",
            "x = i + 1",
            "int main() {",
            "$ pip install zephyr",
            "    return i;",
            "    return total",
            " n := f(2)",
            "package main",
            "for i in range(10):\r\n",
        ),
        ("For me, it is clear.", "I import cars. they sell.", "if you ask me, no.", "We will class it: later (maybe)."),
    ),
    "formula": (
        r"\$\$[\s\S]+?\$\$|\$(?=[^\s\d])[^$\n]{0,120}?[\\^_=+{}][^$\n]{0,120}?\$|"
        r"\\\((?:(?!\\\()[\s\S])+?\\\)|\\\[(?:(?!\\\[)[\s\S])+?\\\]",
        "a formula in LaTeX",
        (r"Let $x_i = 2$. then", r"\(i < n\) holds", "$$\ni. e\n$$"),
        ("It costs $5. they ask $10.",),
    ),
    "html_tag": (
        r"</?[A-Za-z][\w-]*(?:\s[^<>\n]*)?/?>",
        "a tag of HTML or XML",
        ("<p>hello. there</p>", 'See <a href="x. y">this</a>'),
        ("a < b and c > d",),
    ),
    "url": (
        r"(?:[a-z][a-z0-9+.-]{0,20}://|www\.)[^\s<>\"”]*[^\s<>\"”.,;:!?)\]}'*]|\b(?:[a-z0-9-]{1,63}+\.){1,8}(?:com|org|net|io|"
        r"edu|gov|co|uk|de|ai|info|dev)\b(?:/(?:[^\s<>\"”]*[^\s<>\"”.,;:!?)\]}'*])?)?",
        "an address on the web, with or without its scheme",
        ("See https://example.com/paris?i=1 now", "at www.london.org", "on wikipedia.org or bbc.co.uk/news"),
        ("I came. com is nothing.", "the end.then"),
    ),
    "email": (
        r"(?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)+",
        "an e-mail address",
        ("Write to anna.smith@example.org. thanks",),
        ("Meet @ noon.",),
    ),
    "handle": (
        r"(?<![\w&])[@#][A-Za-z]\w*",
        "a mention or a hashtag",
        ("Thanks @anna and #paris", "#travel"),
        ("We are #1.", "# Heading"),
    ),
    "path": (
        r"(?<![\w/])(?:~|\.{1,2})?/(?:[\w.@+-]+/){0,32}[\w.@+-]*\w|\b[A-Za-z]:\\[^\s\"]+|\b\w++(?:[\\/][\w.-]+){2,}",
        "a path of a file",
        ("in /usr/bin/python", "~/docs/i", r"C:\Users\anna", "src/lib/paris"),
        ("and/or", "he/she. they"),
    ),
    "file_name": (
        r"\b[\w-]{1,120}+\.(?:py|js|ts|jsx|tsx|json|jsonl|csv|txt|md|html?|css|xml|ya?ml|toml|ini|sh|bat|exe|dll|so|"
        r"jar|java|"
        r"cpp|c|h|hpp|cs|go|rs|rb|php|sql|pdf|docx?|xlsx?|pptx?|png|jpe?g|gif|svg|mp[34]|wav|zip|tar|gz|log|cfg|conf|"
        r"ipynb|parquet)\b",
        "the name of a file",
        ("open report.txt and main.py", "in setup.cfg. then"),
        ("the end. py is short", "the U.S. and"),
    ),
    "identifier": (
        r"\b[A-Za-z][^\W_]*+_\w+|\b[A-Za-z]++\d\w*|\b_\w+|\b\w++(?:::|->)\w[\w:>-]*|\b[A-Za-z_]\w*+\([^\s()]*\)|"
        r"(?<![\w-])--?[a-z][\w-]*|\b[a-z]++(?:\.[a-z_]++){1,8}\([^\n()]*\)|\b[a-z]++[A-Z]\w*",
        "snake_case, camelCase, a call, a flag of a command",
        ("set my_name to", "myName is", "call paris() now", "with --version", "std::string", "np.array(i)", "x1 is"),
        ("my name. is", "well-known", "a pause - then", "Paris (the city)"),
    ),
    "variable": (
        r"(?<![\w'’])[a-zA-Z](?:\s*(?:[=<>+*/^]|≤|≥|!=|\+\+)\s*[\w(]|\[[^\]\n]{0,120}\])|(?<=[=<>+*/^\[] )[a-zA-Z](?!\w)|"
        r"(?<=[\w)][=<>+*/^])[a-zA-Z]\b(?!\*)|(?<=[=<>+*/^\[(])[a-zA-Z](?=[)\]\s,])|(?<![\w'’])[a-zA-Z](?:-th|th)\b",
        "a letter that stands for a number",
        ("if i = 3 then", "a[i] and i + 1", "the i-th row", "(i) first", "41*i."),
        ("so i think", "i, too", "and i'm"),
    ),
}

_PATTERN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, (pattern, *_) in _KINDS.items()))
# What may go over several lines is looked for in the whole text, the rest in lines that have a sign of it.
_BLOCKS = re.compile("|".join(f"(?P<{name}>{_KINDS[name][0]})" for name in ("code_block", "formula")))
_SIGN = re.compile(
    r"[`~$<>@#\\_={};^|/\[.(+*:A-Z0-9-](?:(?<=[`~$<>@#\\_={};^|/\[])|(?<=\.)[A-Za-z]|(?<=\w\()|(?<=\()[A-Za-z]\W|"
    r"(?<=[+*]) ?[A-Za-z]\b|"
    r"(?<=[-:])[-:>]|(?<=:)$|(?<=-)th\b|(?<=[a-z][A-Z0-9])|(?<=[a-z] [+*]))"
)
_CODE_START = re.compile(r"[ \t]{4}|\t|(?:import|package) |[ \t]*(?:def|class|return|print)\b")


def spans(text: str) -> list[tuple[int, int, str]]:
    """Where nothing may change.

    Returns:
        (start, end, rule) of each, in order and without overlaps.
    """
    found: list[tuple[int, int, str]] = []
    if _has_block(text):
        found = [(m.start(), m.end(), m.lastgroup or "") for m in _BLOCKS.finditer(text)]
    blocks = len(found)
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        if _SIGN.search(text, start, end) or _CODE_START.match(text, start, end):
            found += [
                (m.start(), m.end(), m.lastgroup or "")
                for m in _PATTERN.finditer(text, start, end)
                if m.end() > m.start()
            ]
        start = end + 1
    if not blocks:
        return found
    # lines within blocks are the blocks'
    found.sort(key=lambda span: (span[0], -span[1]))
    kept: list[tuple[int, int, str]] = []
    for span in found:
        if not kept or span[0] >= kept[-1][1]:
            kept.append(span)
        elif span[1] > kept[-1][1]:
            kept[-1] = (kept[-1][0], span[1], kept[-1][2])
    return kept


def without_blocks(text: str) -> str:
    """The text without what may go over several lines."""
    return _BLOCKS.sub(" ", text) if _has_block(text) else text


def _has_block(text: str) -> bool:
    return "```" in text or "~~~" in text or "$$" in text or "\\[" in text


def _found(name: str, text: str) -> bool:
    return any(rule == name for _, _, rule in spans(text))


PROTECT_RULES: tuple[Rule[str], ...] = tuple(
    Rule(name, f"{does}: untouched", partial(_found, name), positive, negative)
    for name, (_, does, positive, negative) in _KINDS.items()
)
