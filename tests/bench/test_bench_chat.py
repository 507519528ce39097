"""The bench of ``zephyr-lite data chat`` at a tiny size: its measures against texts whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.chat_data import main
from bench.truecasing import fault, lowered, measure
from zephyr_lite.errors import UserError

PARTS = ("The road to Ouagadougou is long, but it is worth it.", "I went there with Anna last year, and we liked it.")


def rows(count: int) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": f"Is question {n} hard? I ask you about it."},
            {"role": "assistant", "content": f"{PARTS[0]} {PARTS[1]} It was in 19{n:02d}."},
        ]
        for n in range(count)
    ]


def test_what_is_taken_away() -> None:
    low, taken = lowered("Hello. I met Anna at `Foo. Bar` on the way to the sea. We left: The end was near.")
    assert low == "hello. i met anna at `Foo. Bar` on the way to the sea. we left: the end was near."
    assert list(taken.values()) == ["turn or line start", "I", "name", "sentence start", "after a colon, quote or dash"]
    assert fault("Hello. How is Anna? I ask.") == "Hello. how is Anna? i ask."


def test_measure_counts() -> None:
    score, counted = measure(rows(40))
    table = score.table()
    assert counted["dialogues"] == 40 and counted["flagged, untouched"] == 0
    assert counted["flagged, with the fault of UltraChat"] == counted["sides with the fault of UltraChat"] == 80
    assert table["precision overall"] == 1.0
    for category, taken in (("sentence start", 40), ("I", 80), ("name", 80), ("turn or line start", 80)):
        assert table["recall"][category] == [1.0, taken]


def test_the_bench_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "set"
    data.mkdir()
    (data / "train_sft.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows(60)))
    result = main(
        [str(data), "--turns", "400", "--growth", "2", "--dir", str(tmp_path), "--out", str(tmp_path / "o.json")]
    )
    as_json = json.loads(json.dumps(result))
    assert json.loads((tmp_path / "o.json").read_text()) == json.loads(capsys.readouterr().out) == as_json
    assert [round(part["turns"], -1) for part in result["speed"]] == [200, 400]
    for part in result["speed"]:
        assert part["kept"] and part["turns_per_second"] > 0 and part["anonymous_mib"] > 10
    with pytest.raises(UserError, match="no such folder"):
        main([str(tmp_path / "nothing")])
