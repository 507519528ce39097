"""Regular expressions on long rows: a tokenizer's that fails is the row's error; truecasing's take linear time."""

from __future__ import annotations

import json

import pytest

from tests.conftest import make_tokenizer
from zephyr_lite.cli import app as cli
from zephyr_lite.recipe.truecase import restore, spans

BACKTRACKS = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_a_row_on_which_the_tokenizer_panics_is_left_out_and_named(tiny_base, tmp_path, capsys, part):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in tiny_base.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "tokenizer.json").unlink()
    make_tokenizer(tmp_path / "tokenizer")
    told = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    if part == "pre_tokenizer":
        told[part] = {"type": "Sequence", "pretokenizers": [BACKTRACKS, told[part]]}
    else:
        told[part] = {"type": "Replace", "pattern": BACKTRACKS["pattern"], "content": "y"}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    rows = tmp_path / "rows.jsonl"
    texts = ("Fine.", "x" * 60, "Fine too.")
    rows.write_text("".join(json.dumps({"prompt": "Well?", "completion": text}) + "\n" for text in texts))
    code = cli.run(["data", "stats", "sft", f"model_name_or_path={folder}", f"dataset={rows}", "max_length=64"])
    out = capsys.readouterr().out
    assert code == 0 and "the tokenizer fails on it: Onig" in out and "rows.jsonl row 2" in out, out


@pytest.mark.parametrize("seed", ["a.", "a-b.", "-/", "[a", "x[", "\\(", "-\u00e9_\u00e9", " ", "a.b-"])
def test_long_rows_of_one_sign_are_truecased(seed):
    """With time that grows with the square of the length, this would take many minutes."""
    text = seed * (200_000 // len(seed))
    assert restore(text, None)[0].lower() == text.lower()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("See docs.python.org/3/library for it", "url"),
        ("a.b.c.d.e.f.g.h.example.com", "url"),
        ("call np.linalg.norm(x) now", "identifier"),
        ("a[i + 1] is", "variable"),
        ("in /usr/local/lib/python3/x", "path"),
        (r"so \(x \le y\) holds", "formula"),
        ("open my-long-file-name.tar now", "file_name"),
    ],
)
def test_what_they_protected_before_they_protect_still(text, rule):
    assert rule in [name for _, _, name in spans(text)]
