"""Words as arrays and near duplicates, each against plain Python."""

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
    "…",
    "the CAT, sat on:the mat",
    "Ünïcode “words” don’t break—here",
    "你好 世界",
    "one",
    "a" * 70_000 + " after a long word, more than a piece",
    "x\ny\tz 1234 5six",
]


def plain_words(text: str) -> list[str]:
    text = re.sub("[‘’“”…—]", " ", text)
    return re.findall(r"[0-9a-z\u0080-\U0010ffff]+", re.sub("[A-Z]", lambda m: m.group().lower(), text))


def test_words_are_those_of_a_plain_split() -> None:
    words = words_of(TEXTS)
    expected = [plain_words(text) for text in TEXTS]
    assert np.diff(words.offsets).tolist() == [len(own) for own in expected]
    flat = [word for own in expected for word in own]
    assert [words.text(n, 1).lower() for n in range(len(flat))] == [word.lower() for word in flat]
    # equal words have equal hashes, others have not
    ids = {word: n for n, word in enumerate(sorted(set(flat)))}
    by_hash: dict[int, int] = {}
    for word, value in zip(flat, words.hashes.tolist()):
        assert by_hash.setdefault(value, ids[word]) == ids[word]
    assert len(by_hash) == len(ids)
    assert np.array_equal(np.concatenate([words_of([text]).hashes for text in TEXTS]), words.hashes)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_ngrams_stay_inside_their_text(n: int) -> None:
    words = words_of(TEXTS)
    hashes, first = ngrams(words, n)
    expected = [tuple(own[k : k + n]) for own in map(plain_words, TEXTS) for k in range(len(own) - n + 1)]
    assert len(hashes) == len(expected)
    assert [tuple(plain_words(words.text(int(f), n))) for f in first] == expected
    assert len(set(hashes.tolist())) == len(set(expected))
    assert len(ngrams(words.joined(np.array([0, len(TEXTS)])), n)[0]) == len(words.hashes) - n + 1


def varied(text: str, share: float, draw: random.Random) -> str:
    return " ".join(f"w{draw.random()}" if draw.random() < share else word for word in text.split())


def test_signatures_estimate_the_similarity_of_shingles() -> None:
    draw = random.Random(1)
    base = " ".join(f"word{draw.randrange(500)}" for _ in range(400))
    for share in (0.0, 0.01, 0.03, 0.1):
        other = varied(base, share, draw)
        sets = [{tuple(own[k : k + 5]) for k in range(len(own) - 4)} for own in (base.split(), other.split())]
        true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        marks = signatures(words_of([base, other.replace(".", "")]))
        assert abs(similarity(marks[0], marks[1]) - true) < 0.13
    # groups of texts are one text; short ones and empty ones have a signature too
    halves = [base[:900], base[900:], "two words", "", "words two"]
    marks = signatures(words_of(halves).joined(np.array([0, 2, 3, 4, 5])))
    assert marks.shape == (4, 128) and marks.dtype == np.uint16
    assert similarity(marks[1], marks[3]) == 1 and similarity(marks[0], marks[2]) < 0.1


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
    sets = read_eval_sets([str(tmp_path / "set.txt")])
    words = words_of(
        ["nothing", f"So: {question.upper()}", "is a short question found", "is a short question found here"]
    )
    found = sets.find(words)
    assert set(found) == {1, 2}
    assert found[1] == (str(tmp_path / "set.txt"), " ".join(question.upper().split()[:13]))
    assert read_eval_sets([]).find(words) == {}
