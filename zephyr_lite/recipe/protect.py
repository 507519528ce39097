"""Spans of a text that truecasing leaves alone: code, addresses, names of files, formulas, markup.

No repetition in the patterns is unbounded from every position: the time would grow with the square of a row's length.
"""

from __future__ import annotations

import re

# name: (pattern, description), in order of precedence
KINDS: dict[str, tuple[str, str]] = {
    "code_block": (
        r"(?:```|~~~)[\s\S]*?(?:```|~~~|\Z)",
        "a fenced block of code, up to its end or the text's",
    ),
    "inline_code": (
        r"`[^`\n]+`",
        "code between backticks on one line",
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
    ),
    "formula": (
        r"\$\$[\s\S]+?\$\$|\$(?=[^\s\d])[^$\n]{0,120}?[\\^_=+{}][^$\n]{0,120}?\$|"
        r"\\\((?:(?!\\\()[\s\S])+?\\\)|\\\[(?:(?!\\\[)[\s\S])+?\\\]",
        "a formula in LaTeX",
    ),
    "html_tag": (
        r"</?[A-Za-z][\w-]*(?:\s[^<>\n]*)?/?>",
        "a tag of HTML or XML",
    ),
    "url": (
        r"(?:[a-z][a-z0-9+.-]{0,20}://|www\.)[^\s<>\"”]*[^\s<>\"”.,;:!?)\]}'*]|\b(?:[a-z0-9-]{1,63}+\.){1,8}(?:com|org|net|io|"
        r"edu|gov|co|uk|de|ai|info|dev)\b(?:/(?:[^\s<>\"”]*[^\s<>\"”.,;:!?)\]}'*])?)?",
        "an address on the web, with or without its scheme",
    ),
    "email": (
        r"(?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)+",
        "an e-mail address",
    ),
    "handle": (
        r"(?<![\w&])[@#][A-Za-z]\w*",
        "a mention or a hashtag",
    ),
    "path": (
        r"(?<![\w/])(?:~|\.{1,2})?/(?:[\w.@+-]+/){0,32}[\w.@+-]*\w|\b[A-Za-z]:\\[^\s\"]+|\b\w++(?:[\\/][\w.-]+){2,}",
        "a path of a file",
    ),
    "file_name": (
        r"\b[\w-]{1,120}+\.(?:py|js|ts|jsx|tsx|json|jsonl|csv|txt|md|html?|css|xml|ya?ml|toml|ini|sh|bat|exe|dll|so|"
        r"jar|java|"
        r"cpp|c|h|hpp|cs|go|rs|rb|php|sql|pdf|docx?|xlsx?|pptx?|png|jpe?g|gif|svg|mp[34]|wav|zip|tar|gz|log|cfg|conf|"
        r"ipynb|parquet)\b",
        "the name of a file",
    ),
    "identifier": (
        r"\b[A-Za-z][^\W_]*+_\w+|\b[A-Za-z]++\d\w*|\b_\w+|\b\w++(?:::|->)\w[\w:>-]*|\b[A-Za-z_]\w*+\([^\s()]*\)|"
        r"(?<![\w-])--?[a-z][\w-]*|\b[a-z]++(?:\.[a-z_]++){1,8}\([^\n()]*\)|\b[a-z]++[A-Z]\w*",
        "snake_case, camelCase, a call, a flag of a command",
    ),
    "variable": (
        r"(?<![\w'’])[a-zA-Z](?:\s*(?:[=<>+*/^]|≤|≥|!=|\+\+)\s*[\w(]|\[[^\]\n]{0,120}\])|(?<=[=<>+*/^\[] )[a-zA-Z](?!\w)|"
        r"(?<=[\w)][=<>+*/^])[a-zA-Z]\b(?!\*)|(?<=[=<>+*/^\[(])[a-zA-Z](?=[)\]\s,])|(?<![\w'’])[a-zA-Z](?:-th|th)\b",
        "a letter as a variable",
    ),
}

_PATTERN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, (pattern, _) in KINDS.items()))
_BLOCK = re.compile(f"{KINDS['code_block'][0]}|{KINDS['formula'][0]}")


def spans(text: str) -> list[tuple[int, int, str]]:
    """The protected spans: (start, end, kind) of each, in order and without overlaps."""
    return [(m.start(), m.end(), m.lastgroup or "") for m in _PATTERN.finditer(text) if m.end() > m.start()]


def without_blocks(text: str) -> str:
    """The text without code blocks and formulas."""
    return _BLOCK.sub(" ", text)
