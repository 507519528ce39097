"""The bench of preparing rows at a tiny size: what it makes of real conversations, and what it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import prepare as bench
from tests.conftest import CONVERSATIONS, make_tokenizer
from zephyr_lite.data import dataset as module
from zephyr_lite.errors import UserError


def test_rows_are_drawn_anew_from_what_their_role_said(chat_rows):
    real = bench.conversations([chat_rows])
    assert len(real) == len(CONVERSATIONS)
    rows = list(bench.drawn(real, 40))
    assert rows == list(bench.drawn(real, 40)) != list(bench.drawn(real, 40, seed=1))
    assert all("system" not in [turn["role"] for turn in row[1:]] for row in rows)
    said = {turn["content"] for row in real for turn in row if turn["role"] == "assistant"}
    made = {turn["content"] for row in rows for turn in row if turn["role"] == "assistant"}
    assert len(made - said) > 20 and max(map(len, made)) < 2 * max(map(len, said))


def test_where_nothing_lies(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        bench.conversations([tmp_path / "nothing"])
    with pytest.raises(UserError, match="no conversations"):
        bench.conversations([tmp_path])


def test_one_measurement(tmp_path: Path, chat_rows, capsys, monkeypatch):
    make_tokenizer(tmp_path)
    for name in ("load_rows", "best_fit", "_fingerprint"):  # the bench wraps them for the rest of its process
        monkeypatch.setattr(module, name, getattr(module, name))
    bench.child(str(chat_rows), str(tmp_path), 256)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["conversations"] == len(CONVERSATIONS) and told["rows"] >= 1 and told["tokens"] > 100
    assert set(told["parts"]) == {"load_rows", "best_fit", "fingerprint", "tokenize and the rest"}
    assert told["seconds"] >= 0 and told["cpu_seconds"] >= 0 and len(told["fingerprint"]) == 16
