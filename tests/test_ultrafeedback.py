"""Raw UltraFeedback rows to pairs."""

from __future__ import annotations

import random

from zephyr_lite.data.ultrafeedback import to_pairs


def completion(response: str, ratings: list[object], overall: float | None = 5.0) -> dict:
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    return {
        "response": response,
        "annotations": {aspect: {"Rating": rating} for aspect, rating in zip(aspects, ratings)},
        "overall_score": overall,
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


def test_the_schema_is_ultrafeedback_binarizeds():
    pairs, counts = to_pairs([row("Hi", completion("bad", ["1"] * 4), completion("good", ["5", "4", "N/A", "5"]))])
    (pair,) = pairs
    assert pair["chosen"] == [{"content": "Hi", "role": "user"}, {"content": "good", "role": "assistant"}]
    assert pair["rejected"][1]["content"] == "bad" and pair["messages"] == pair["chosen"]
    assert pair["prompt"] == "Hi" and len(pair["prompt_id"]) == 64
    assert (pair["score_chosen"], pair["score_rejected"]) == (14 / 3, 1.0)  # N/A counts as no rating, not as 0
    assert counts == {"rows": 1, "pairs": 1}


def test_a_score_of_ten_that_should_be_one_is_repaired():
    raw = [row("Hi", completion("wrong", ["1", "2", "1", "2"], 10.0), completion("right", ["4"] * 4, 7.5))]
    pairs, counts = to_pairs(raw, chosen_by="overall")
    assert pairs[0]["chosen"][1]["content"] == "right" and pairs[0]["score_rejected"] == 1.0
    assert counts["overall score repaired"] == 1
    pairs, counts = to_pairs(
        [row("Hi", completion("best", ["5"] * 4, 10.0), completion("right", ["4"] * 4, 7.5))], "overall"
    )
    assert pairs[0]["chosen"][1]["content"] == "best" and "overall score repaired" not in counts


def test_what_teaches_nothing_is_dropped_and_counted():
    raw = [
        row("tie", completion("a", ["3"] * 4), completion("b", ["3"] * 4)),
        row("truth", completion("a", ["1"] * 4), completion("b", ["3"] * 4), source="truthful_qa"),
        row("alone", completion("a", ["N/A"] * 4), completion("b", ["3"] * 4), completion(" ", ["5"] * 4)),
        row(" ", completion("a", ["1"] * 4), completion("b", ["3"] * 4)),
        row("same", completion("a", ["1"] * 4), completion("a ", ["3"] * 4)),
    ]
    pairs, counts = to_pairs(raw)
    assert pairs == []
    assert counts == {
        "rows": 5,
        "pairs": 0,
        "equal scores": 1,
        "source is truthful_qa": 1,
        "fewer than two rated completions": 1,
        "no instruction": 1,
        "equal responses": 1,
    }


def test_the_rejected_one_is_random_or_worst():
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
