"""Words as arrays, near duplicates and contamination, each against plain Python."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from zephyr_lite.recipe.dedup import join_near, ngrams, read_eval_sets, signatures, similarity, words_of

TEXTS = [
    "The cat sat on the mat.",
    "",
    "the CAT, sat on:the mat",
    "Ünïcode “words” don’t break—here",
    "你好 世界",
    "a" * 70_000 + " after a long word",
    "x\ny\tz 1234 5six",
]


def plain_words(text: str) -> list[str]:
    text = re.sub("[‘’“”…—]", " ", text)
    return re.findall(r"[0-9a-z\u0080-\U0010ffff]+", re.sub("[A-Z]", lambda m: m.group().lower(), text))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ngrams_are_those_of_a_plain_split(n: int) -> None:
    words = words_of(TEXTS)
    hashes, first = ngrams(words, n)
    expected = [tuple(own[k : k + n]) for own in map(plain_words, TEXTS) for k in range(len(own) - n + 1)]
    assert [tuple(plain_words(words.text(int(f), n))) for f in first] == expected
    # equal ones have equal hashes, others have not
    assert len(set(zip(hashes.tolist(), expected))) == len(set(hashes.tolist())) == len(set(expected))


def varied(text: str, share: float, draw: random.Random) -> str:
    return " ".join(f"w{draw.random()}" if draw.random() < share else word for word in text.split())


def test_join_is_that_of_all_pairs() -> None:
    draw = random.Random(4)
    bases = [" ".join(f"word{draw.randrange(400)}" for _ in range(150)) for _ in range(12)]
    texts = [varied(draw.choice(bases), draw.choice((0, 0.002, 0.004, 0.5)), draw) for _ in range(60)]
    marks = signatures(words_of(texts))
    alive = [row for row in range(len(texts)) if draw.random() < 0.9]
    group = list(range(len(texts)))
    for b in alive:
        for a in alive:
            if a < b and similarity(marks[a], marks[b]) >= 0.8:
                group = [group[a] if g == group[b] else g for g in group]
    firsts = [group.index(g) for g in group]
    assert join_near(marks, np.array(alive), 0.8).tolist() == firsts
    assert sum(first != row for row, first in enumerate(firsts)) > 10


def test_contamination_says_which_words(tmp_path: Path) -> None:
    question = "Which of the old towers on the left bank of the wide river is the tallest one today?"
    (tmp_path / "set.txt").write_text(f"{question}\nIs a short question found?\nno\n")
    texts = ["nothing", f"So: {question.upper()}", "is a short question found", "is a short question found here"]
    found = read_eval_sets([str(tmp_path / "set.txt")]).find(words_of(texts))
    assert set(found) == {1, 2}
    assert found[1] == (str(tmp_path / "set.txt"), " ".join(question.upper().split()[:13]))
    assert read_eval_sets([]).find(words_of(texts)) == {}
