"""One raw UltraFeedback row to a pair: every rule, on rows made by hand."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from zephyr_lite.data.messages import RowError
from zephyr_lite.recipe.prompts import Questions
from zephyr_lite.recipe.ultrafeedback import (
    DOUBTFUL,
    EMPTY,
    ODD,
    PARTLY,
    REPAIRED,
    UNRATED,
    PairRules,
    pair_of_row,
    to_pairs,
)

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def completion(response: str, ratings: list[object], overall: object = 5.0, **more: object) -> dict:
    return {
        "model": "m",
        "response": response,
        "annotations": {aspect: {"Rating": rating, "Rationale": "…"} for aspect, rating in zip(ASPECTS, ratings)},
        "overall_score": overall,
        **more,
    }


def row(instruction: str, *completions: dict, source: str = "evol_instruct") -> dict:
    return {"source": source, "instruction": instruction, "completions": list(completions)}


def many(count: int) -> list[dict]:
    rng = random.Random(0)
    return [
        row(
            f"question {i}",
            *(completion(f"answer {i} {j}", [str(rng.randint(1, 5)) for _ in range(4)]) for j in range(4)),
        )
        for i in range(count)
    ]


def chosen_and_rejected(raw: dict, **rules) -> tuple[str, str]:
    pair = pair_of_row(raw, PairRules(**rules), Counter())
    return pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]


def dropped(raw: dict, **rules) -> str:
    """Why there is no pair in a row; empty if there is one."""
    _, counts = to_pairs([raw], **rules)
    reasons = counts.keys() - {"rows", "pairs", REPAIRED, DOUBTFUL}
    assert len(reasons) == 1 - counts["pairs"]
    return "".join(reasons)


# by the mean: a 4.5 (first of two), b 3.75, c 1.5, d 4.5; by the overall score: b 9, d 7, a 6, c 2
FOUR = row(
    "Which?",
    completion("a", ["4", "5", "4", "5"], 6.0),
    completion("b", ["4", "4", "4", "3"], 9.0),
    completion("c", ["1", "2", "1", "2"], 2.0),
    completion("d", ["5", "4", "5", "4"], 7.0),
)


@pytest.mark.parametrize(
    ("chosen_by", "rejected", "margin", "expected"),
    [
        ("mean", "worst", 1.0, ("a", {"c"})),
        ("mean", "random", 1.0, ("a", {"b", "c", None})),  # d scores the same: that draw is dropped
        ("mean", "margin", 0.5, ("a", {"b", "c"})),
        ("mean", "margin", 0.75, ("a", {"b", "c"})),  # exactly so far below is far enough
        ("mean", "margin", 1.0, ("a", {"c"})),
        ("mean", "margin", 3.5, ("a", {None})),
        ("overall", "worst", 1.0, ("b", {"c"})),
        ("overall", "random", 1.0, ("b", {"a", "c", "d"})),
        ("overall", "margin", 2.0, ("b", {"a", "c", "d"})),
        ("overall", "margin", 3.0, ("b", {"a", "c"})),
        ("overall", "margin", 7.0, ("b", {"c"})),
        ("overall", "margin", 7.5, ("b", {None})),
    ],
)
def test_every_combination_of_rules(chosen_by, rejected, margin, expected):
    best, allowed = expected
    drawn = set()
    for seed in range(60):
        rules = {"chosen_by": chosen_by, "rejected": rejected, "margin": margin, "seed": seed}
        if None in allowed and (reason := dropped(FOUR, **rules)):
            assert "equal scores" in reason or f"at least {margin:g} below" in reason
            drawn.add(None)
            continue
        chosen, other = chosen_and_rejected(FOUR, **rules)
        assert chosen == best
        drawn.add(other)
    assert drawn == allowed


def test_the_schema_is_ultrafeedback_binarizeds():
    pairs, counts = to_pairs([row("Hi", completion("bad", ["1"] * 4), completion("good", ["5", "4", "N/A", "5"]))])
    (pair,) = pairs
    assert list(pair) == ["prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"]
    assert pair["chosen"] == [{"content": "Hi", "role": "user"}, {"content": "good", "role": "assistant"}]
    assert pair["rejected"][1]["content"] == "bad" and pair["messages"] == pair["chosen"]
    # SHA-256 of "Hi", as in the published set
    assert pair["prompt_id"] == "3639efcd08abb273b1619e82e78c29a7df02c1051b1820e99fc395dcaa3326b8"
    assert (pair["score_chosen"], pair["score_rejected"]) == (14 / 3, 1.0)  # N/A counts as no rating, not as 0
    assert counts == {"rows": 1, "pairs": 1}


@pytest.mark.parametrize(
    ("ratings", "score", "notes"),
    [
        (["5", "4", "3", "4"], 4.0, {}),
        ([5, 4.5, 3, "4"], 4.125, {}),
        (["5", "N/A", "3", None], 4.0, {PARTLY: 1}),
        (["5", " n/a ", "", "4"], 4.5, {PARTLY: 1}),
        (["5", "4 of 5", "9", True], 5.0, {PARTLY: 1, ODD: 3}),
        (["5", "nan", "inf", "-1"], 5.0, {PARTLY: 1, ODD: 3}),
        (["N/A"] * 4, None, {UNRATED: 1}),
        ([], None, {UNRATED: 1}),
    ],
)
def test_ratings_of_all_kinds(ratings, score, notes):
    counts: Counter[str] = Counter()
    raw = row("Hi", completion("this", ratings), completion("low", [1] * 4), completion("lower", [1, 1, 1, 1]))
    if score is None:
        with pytest.raises(RowError, match="equal scores"):
            pair_of_row(raw, PairRules(rejected="worst"), counts)
    else:
        pair = pair_of_row(raw, PairRules(rejected="worst"), counts)
        assert (pair["chosen"][1]["content"], pair["score_chosen"]) == ("this", score)
    assert dict(counts) == notes


@pytest.mark.parametrize("annotations", [None, {}, [], "N/A", {"honesty": None}])
def test_a_completion_without_annotations_has_no_mean_but_may_have_an_overall_score(annotations):
    bare = {"response": "bare", "annotations": annotations, "overall_score": "8"}
    raw = row("Hi", bare, completion("low", ["2"] * 4, "N/A"), completion("other", ["3"] * 4, 4))
    assert chosen_and_rejected(raw) == ("other", "low")
    assert chosen_and_rejected(raw, chosen_by="overall") == ("bare", "other")


def test_a_margin_between_means_of_thirds_is_not_missed_by_rounding():
    raw = row("Hi", completion("best", ["5", "4", "4", "N/A"]), completion("below", ["4", "3", "3", "N/A"]))
    assert 13 / 3 - 1.0 < 10 / 3  # as floats
    assert chosen_and_rejected(raw, rejected="margin", margin=1.0) == ("best", "below")


def test_an_aspect_that_other_rows_have_is_none_that_is_missing():
    """Arrow gives every row the aspects of all, null where the row had none."""
    counts: Counter[str] = Counter()
    first = completion("a", ["5"] * 4)
    first["annotations"]["safety"] = None
    assert pair_of_row(row("Hi", first, completion("b", ["2"] * 4)), PairRules(), counts)["score_chosen"] == 5.0
    assert PARTLY not in counts


def test_a_score_of_ten_that_should_be_one_is_repaired():
    raw = [row("Hi", completion("wrong", ["1", "2", "1", "2"], 10.0), completion("right", ["4"] * 4, 7.5))]
    pairs, counts = to_pairs(raw, chosen_by="overall")
    assert pairs[0]["chosen"][1]["content"] == "right" and pairs[0]["score_rejected"] == 1.0
    assert counts[REPAIRED] == 1
    # the mean needs no repair, and counts none
    assert REPAIRED not in to_pairs(raw)[1]


@pytest.mark.parametrize(
    ("mean", "corrected", "best", "note"),
    [
        (["2", "2", "2", "2"], None, "right", REPAIRED),
        (["2", "2", "2", "3"], None, "right", DOUBTFUL),
        (["4", "4", "4", "4"], None, "right", DOUBTFUL),
        (["4", "4", "4", "5"], None, "ten", None),
        (["2", "2", "2", "3"], 2.25, "ten", None),  # the corrected release: the judge was asked again
        (["N/A"] * 4, None, "ten", None),
    ],
)
def test_which_tens_are_believed(mean, corrected, best, note):
    more = {} if corrected is None else {"fine-grained_score": corrected}
    raw = row(
        "Hi", completion("ten", mean, 10, **more), completion("right", ["4"] * 4, 7.5), completion("low", ["1"] * 4, 2)
    )
    counts: Counter[str] = Counter()
    assert pair_of_row(raw, PairRules("overall", "worst"), counts)["chosen"][1]["content"] == best
    assert {n: counts[n] for n in (REPAIRED, DOUBTFUL) if counts[n]} == ({note: 1} if note else {})
    assert not counts[UNRATED]  # a ten that is not used is counted once


def test_what_teaches_nothing_is_dropped_and_counted():
    raw = [
        row("tie", completion("a", ["3"] * 4), completion("b", ["3"] * 4)),
        row("truth", completion("a", ["1"] * 4), completion("b", ["3"] * 4), source="truthful_qa"),
        row("alone", completion("a", ["N/A"] * 4), completion("b", ["3"] * 4), completion(" ", ["5"] * 4)),
        row(" ", completion("a", ["1"] * 4), completion("b", ["3"] * 4)),
        row("same", completion("a", ["1"] * 4), completion("a ", ["3"] * 4)),
        {"instruction": None, "completions": []},
        {"instruction": 3, "completions": []},
        {"instruction": "no list", "completions": "text"},
        {"instruction": "no object", "completions": ["text"]},
        {"instruction": "nothing", "completions": None},
    ]
    pairs, counts = to_pairs(raw)
    assert pairs == []
    assert counts == {
        "rows": 10,
        "pairs": 0,
        "equal scores": 1,
        "source is truthful_qa": 1,
        "fewer than two rated completions": 2,
        "no instruction": 2,
        "instruction is not a text": 1,
        "completions is not a list": 1,
        "a completion is not an object": 1,
        "equal responses": 1,
    }


def test_a_completion_without_text_is_left_aside():
    counts: Counter[str] = Counter()
    raw = row(
        "Hi", completion("", ["5"] * 4), completion("a", ["4"] * 4), completion("b", ["3"] * 4), {"response": None}
    )
    assert pair_of_row(raw, PairRules(), counts)["chosen"][1]["content"] == "a"
    assert counts == {EMPTY: 2}


def test_system_prompts_are_left_out_or_kept_where_both_were_made_under_the_same():
    def under(system: object, text: str, rating: str) -> dict:
        return completion(text, [rating] * 4, custom_system_prompt=system)

    raw = row(
        "Hi", under("Be short.", "best", "5"), under("Be honest.", "worst", "1"), under("Be short.", "third", "3")
    )
    omitted = pair_of_row(raw, PairRules(rejected="worst"), Counter())
    assert [t["role"] for t in omitted["chosen"]] == ["user", "assistant"]
    assert omitted["rejected"][-1]["content"] == "worst"
    kept = pair_of_row(raw, PairRules(rejected="worst", system_prompt="keep"), Counter())
    for side in ("chosen", "rejected", "messages"):
        assert kept[side][:2] == [{"content": "Be short.", "role": "system"}, {"content": "Hi", "role": "user"}]
    assert kept["rejected"][-1]["content"] == "third" and kept["prompt"] == "Hi"
    alone = row("Hi", under("Be short.", "best", "5"), under("Be honest.", "worst", "1"))
    with pytest.raises(RowError, match="no other completion was made under the chosen one's system prompt"):
        pair_of_row(alone, PairRules(system_prompt="keep"), Counter())
    none = row("Hi", under(None, "best", "5"), under("", "worst", "1"))
    pair = pair_of_row(none, PairRules(system_prompt="keep"), Counter())
    assert [t["role"] for t in pair["chosen"]] == ["user", "assistant"]


def test_the_draw_is_even():
    raw = many(200)
    worst, _ = to_pairs(raw, rejected="worst")
    drawn, _ = to_pairs(raw)
    other, _ = to_pairs(raw, seed=1)
    for pair in worst:
        index = int(pair["prompt"].split()[1])
        means = [sum(float(a["Rating"]) for a in c["annotations"].values()) / 4 for c in raw[index]["completions"]]
        assert (pair["score_chosen"], pair["score_rejected"]) == (max(means), min(means))
    assert all(pair["score_chosen"] > pair["score_rejected"] for pair in drawn)
    assert drawn != other and drawn != worst
    # each of the other three is drawn about as often; the last one, too
    places = [int(pair["rejected"][1]["content"].split()[2]) for pair in drawn]
    assert all(places.count(j) > 20 for j in range(4))


def test_neither_order_nor_splitting_changes_a_pair():
    raw = many(50)
    whole = {pair["prompt"]: pair for pair in to_pairs(raw)[0]}
    backwards = {pair["prompt"]: pair for pair in to_pairs(reversed(raw))[0]}
    halves = {pair["prompt"]: pair for part in (raw[:25], raw[25:]) for pair in to_pairs(part)[0]}
    assert whole == backwards == halves


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("What happens to you if you eat watermelon seeds?", "is an excluded question"),
        ("what  happens to you, if you eat WATERMELON seeds", "is an excluded question"),
        ("Q: What happens to you if you eat watermelon seeds?\nA:", "contains an excluded question"),
        ("Why? Tell me: what happens to you if you eat watermelon seeds, really?", "contains an excluded question"),
        ("What happens to you if you eat melon seeds?", ""),
        ("What happens to you if you eat watermelon", ""),
        ("Who is it?", "is an excluded question"),
        ("“WHO is it?”", "is an excluded question"),
        ("Someone knocks. Who is it? Write a story.", ""),  # too short to be looked for within other texts
        ("", ""),
        ("?!", ""),
    ],
)
def test_excluded_questions_are_found_by_their_words(prompt, reason):
    questions = Questions(["What happens to you if you eat watermelon seeds?", "Who is it?", "…"])
    assert len(questions) == 2 and questions.found_in(prompt) == reason
    assert Questions([]).found_in(prompt) == ""
