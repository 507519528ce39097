"""Claim 10: AlpacaEval's rates equal those of its own code; MT-Bench's grades are read as FastChat reads them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zephyr_lite.evaluate.judge import Grade, difference
from zephyr_lite.evaluate.mt_bench import model_scores, read_grade
from zephyr_lite.evaluate.win_rate import length_controlled, win_rate

NAN = math.nan


@pytest.mark.parametrize(
    ("preferences", "rate", "error", "discrete", "wins", "losses", "draws", "total"),
    [
        # computed with alpaca_eval 0.6.6 (get_winrate on pandas 2)
        ([1, 2, 1.5, 0, NAN, 2, 1], 50.0, 18.25741858350554, 50.0, 2, 2, 2, 6),
        ([1.2, 1.7, 2.0, 1.0, 1.5], 48.0, 17.720045146669346, 50.0, 2, 2, 1, 5),
        ([0, 0, 2], 66.66666666666666, 16.666666666666664, 66.66666666666666, 1, 0, 2, 3),
        # outside 1 to 2: left out of the rate, not of the discrete one
        ([0.7, 2.4, 1, 2, 3, -1, 0.5, -0.4, 2.5], 50.0, 50.0, 57.14285714285714, 1, 1, 0, 2),
        ([1], 0.0, NAN, 0.0, 0, 1, 0, 1),
        ([NAN, 2, NAN, 1.25], 62.5, 37.49999999999999, 50.0, 1, 1, 0, 2),
        # a tie by a hair is none
        ([1.5, 1.4999999, 1.50000001], 49.99999699999999, 3.511884585070188e-06, 50.0, 1, 1, 1, 3),
    ],
)
def test_the_win_rate_is_alpacaevals(preferences, rate, error, discrete, wins, losses, draws, total) -> None:
    found = win_rate(preferences)
    assert found.win_rate == pytest.approx(rate, abs=1e-9)
    assert found.standard_error == pytest.approx(error, abs=1e-9, nan_ok=True)
    assert found.discrete_win_rate == pytest.approx(discrete, abs=1e-9)
    assert (found.n_wins, found.n_wins_base, found.n_draws, found.n_total) == (wins, losses, draws, total)
    assert found.n_left_out == len(preferences) - total


def test_by_hand() -> None:
    """Three wins, one loss: 75 %, and the error of 1, 1, 1, 0 is sqrt(0.25 / 4)."""
    found = win_rate([2, 2, 2, 1])
    assert found.win_rate == 75 and found.standard_error == pytest.approx(25) and found.n_wins == 3
    with pytest.raises(ValueError):
        win_rate([NAN, 3, -1])


def test_length_is_controlled_for() -> None:
    """Two groups, longer and shorter by as much: the fit meets both rates, and the controlled log-odds lie between."""
    preferences = [2] * 8 + [1] * 2 + [2] * 3 + [1] * 7
    found = length_controlled(preferences, [100] * 20, [150] * 10 + [50] * 10)
    assert found is not None
    middle = (math.log(0.8 / 0.2) + math.log(0.3 / 0.7)) / 2
    assert found.win_rate == pytest.approx(100 / (1 + math.exp(-middle)), abs=1e-4)
    assert found.length_coefficient < 0  # of (baseline - model): what is longer wins
    # robust variance of a saturated fit, by hand: of each group's log-odds p(1-p)/n / (p(1-p))², halved and added
    variance = sum(p * (1 - p) / 10 / (p * (1 - p)) ** 2 for p in (0.8, 0.3)) / 4
    share = found.win_rate / 100
    assert found.standard_error == pytest.approx(100 * share * (1 - share) * math.sqrt(variance), rel=1e-3)
    # what does not count is not fitted; 0 is a tie
    more = length_controlled([*preferences, NAN, 5], [100] * 22, [150] * 10 + [50] * 10 + [100, 100])
    assert more is not None and more.win_rate == pytest.approx(found.win_rate, abs=0.5)
    assert length_controlled([2, 1, 2, 1], [9] * 4, [9] * 4) is None  # all of one length
    assert length_controlled([2, 1], [9, 9], [3, 12]) is None
    assert length_controlled([2, 2, 1] * 6, [9] * 18, list(range(18))) is None  # too few: any curve fits
    won = length_controlled([2] * 20, [10] * 20, list(range(20)))
    assert won is not None and 99 < won.win_rate <= 100 and math.isfinite(won.standard_error)


def test_difficulty_is_a_predictor_where_it_is_given() -> None:
    draw = np.random.default_rng(0)
    count = 4000
    shorter, hard = draw.normal(size=count) * 80, draw.normal(size=count)
    delta = np.round(shorter).astype(int)
    lengths_1, lengths_2 = 1000 + delta, np.full(count, 1000)
    spread = delta.std(ddof=1)
    odds = 0.7 - 1.1 * np.tanh(delta / spread) + 0.9 * hard
    wins = draw.random(count) < 1 / (1 + np.exp(-odds))
    found = length_controlled((wins + 1).tolist(), lengths_1.tolist(), lengths_2.tolist(), hard.tolist())
    expected = 100 * (1 / (1 + np.exp(-(0.7 + 0.9 * hard)))).mean()
    assert found is not None and found.with_difficulty and found.win_rate == pytest.approx(expected, abs=3 * 0.9)
    assert found.length_coefficient == pytest.approx(-1.1, abs=0.25) and 0.3 < found.standard_error < 1.2


def test_grades_are_read_as_fastchat_reads_them() -> None:
    for text, grade in (
        ("Rating: [[8]]", 8),
        ("Rating: [[7.5]] and, were it longer, [[9]]", 7.5),
        ("[3] would be mean. [[10]]", 10),
        ("arr[0] is fine. Rating: [6]", 6),
        ("[[rating]]: [4]", 4),
    ):
        assert read_grade(text) == grade, text
    for text in ("", "Rating: 8", "[[eight]]", "[[0]]", "[[11]]", "[[-3]]", "[0]"):
        with pytest.raises(ValueError):
            read_grade(text)


def test_scores_by_hand() -> None:
    grades = [
        Grade("1", "math", "m", 1, 4, ""),
        Grade("1", "math", "m", 2, 6, ""),
        Grade("2", "math", "m", 1, 9, ""),
        Grade("2", "math", "m", 2, None, "no grade"),
        Grade("3", "stem", "m", 1, 2, ""),
        Grade("3", "stem", "m", 2, 4, ""),
    ]
    scores = model_scores(grades)
    assert scores["score"] == 5.0 and scores["turn_1"] == 5.0 and scores["turn_2"] == 5.0
    assert scores["categories"]["math"] == {"score": pytest.approx(19 / 3, abs=1e-4), "turn_1": 6.5, "turn_2": 6.0}
    assert scores["graded"] == 5 and scores["not_graded"] == 1
    # means by question: 5, 9, 3; of their differences to 1 the same spread
    spread = (((5 - 17 / 3) ** 2 + (9 - 17 / 3) ** 2 + (3 - 17 / 3) ** 2) / 2 / 3) ** 0.5
    assert scores["standard_error"] == pytest.approx(spread, abs=1e-4)
    other = [Grade(g.question, g.category, "o", g.turn, 1.0, "") for g in grades]
    told = difference(grades, other)
    assert told["questions"] == 3 and told["difference"] == pytest.approx((4 + 8 + 2) / 3, abs=1e-4)
    assert told["standard_error"] == pytest.approx(spread, abs=1e-4)
