"""Spans of a text that truecasing leaves alone: code, addresses, names of files, formulas, markup.

No repetition in the patterns is unbounded from every position: the time would grow with the square of a row's length.
"""

from __future__ import annotations

import re

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

_PATTERN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in KINDS.items()))
_BLOCK = re.compile(f"{KINDS['code_block']}|{KINDS['formula']}")


def spans(text: str) -> list[tuple[int, int, str]]:
    """The protected spans: (start, end, kind) of each, in order and without overlaps."""
    return [(m.start(), m.end(), m.lastgroup or "") for m in _PATTERN.finditer(text) if m.end() > m.start()]


def without_blocks(text: str) -> str:
    """The text without code blocks and formulas."""
    return _BLOCK.sub(" ", text)
