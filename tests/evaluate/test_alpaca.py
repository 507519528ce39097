"""`zephyr-lite eval alpaca`: published files scored as AlpacaEval scores them, and the job against a real HTTP server."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import Act, ChatServer, Seen, ok
from zephyr_lite.cli import app as cli
from zephyr_lite.evaluate.alpaca_eval import (
    is_swapped,
    judge_messages,
    rates,
    read_annotations,
    read_verdict,
)
from zephyr_lite.evaluate.win_rate import win_rate

JUDGE = ["--judge", "http://127.0.0.1:1/v1#j"]


def run(*arguments: Any) -> int:
    return cli.run(["eval", "alpaca", *map(str, arguments)])


def annotation(number: int, preference: Any, **changes: Any) -> dict[str, Any]:
    texts = {"instruction": f"Do {number}.", "output_1": "x" * (5 + number), "output_2": "y" * 9}
    names = {"generator_1": "old", "generator_2": "new", "annotator": "weighted"}
    return {**texts, **names, "preference": preference, **changes}


def write(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_published_files_are_scored(tmp_path: Path, capsys) -> None:
    values = [1, 2, 1.5, 0, None, "2", 1.25, 2.5]
    verdicts = write(tmp_path / "annotations.json", [annotation(n, value) for n, value in enumerate(values)])
    # published outputs lack a few of the annotated instructions
    outputs = [{"instruction": f"Do {n}.", "output": "y" * 9, "generator": "new", "dataset": "d"} for n in range(4)]
    own = write(tmp_path / "model_outputs.json", outputs)
    assert run("--outputs", own, "--annotations", verdicts, "--out", tmp_path / "out") == 0
    body = json.loads((tmp_path / "out" / "alpaca.json").read_text())["models"]["new"]
    expected = win_rate([1, 2, 1.5, 0, 2, 1.25])
    assert body["win_rate"] == expected.win_rate == pytest.approx(100 * (0 + 1 + 0.5 + 0.5 + 1 + 0.25) / 6)
    assert body["standard_error"] == expected.standard_error and body["n_left_out"] == 2 and body["n_draws"] == 2
    assert f"{body['win_rate']:.2f} %" in capsys.readouterr().out
    # difficulties by the rows' places
    table = tmp_path / "difficulty.csv"
    table.write_text("index,instruction_difficulty\n" + "".join(f"{n},{n / 10}\n" for n in range(8)))
    assert run("--annotations", verdicts, "--difficulty", table) == 0
    for content, row in (("", 0), ("i,d\n0,1\n", 1), ("i,d\n0,nan\n1,inf\n", 0)):
        table.write_text(content)
        assert run("--annotations", verdicts, "--difficulty", table) == 2
        assert f"{table}: has no difficulty for row {row}" in capsys.readouterr().err


OTHER = [{"instruction": "Do 0.", "output": "else", "generator": "g"}]


@pytest.mark.parametrize(
    ("option", "rows", "more", "found"),
    [
        ("--annotations", [annotation(0, "much")], [], "row 1: could not convert string to float"),
        ("--annotations", [annotation(0, 1, output_2=None)], [], "row 1: output_2 is not a text"),
        ("--annotations", [annotation(0, 2)], ["--outputs", "other.json"], "its output_2 is not among the outputs"),
        ("--annotations", [annotation(0, 2)], JUDGE, "--judge changes nothing"),
        ("--instructions", OTHER, [], "no judge is given"),
    ],
)
def test_files_that_are_something_else_are_refused(option, rows, more, found, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "other.json", OTHER)
    if rows is not None:
        write(tmp_path / "a.json", rows)
    assert run(option, "a.json", *more) == 2
    assert found in " ".join(capsys.readouterr().err.split())


# -- the judge -------------------------------------------------------------------------------------------------------


def test_verdicts_know_where_the_model_stood() -> None:
    assert read_verdict("[[A]]", swapped=False) == 1 and read_verdict("[[A]]", swapped=True) == 2
    assert read_verdict("[[B]]", swapped=False) == 2 and read_verdict("so: [b] no, [[ b ]]", swapped=True) == 1
    assert read_verdict("I may say [[A]] or [[C]]. [[C]]", swapped=True) == 1.5 == read_verdict("[C]", False)
    for text in ("", "A", "[[D]]", "[a] footnote"):
        with pytest.raises(ValueError):
            read_verdict(text, False)
    for swapped in (False, True):
        told = judge_messages("Do.", "BASE", "MODEL", swapped)[1]["content"]
        assert (told.index("MODEL") < told.index("BASE")) == swapped
    draws = [is_swapped(str(n), 42) for n in range(1000)]
    assert 440 < sum(draws) < 560 and draws == [is_swapped(str(n), 42) for n in range(1000)]
    assert draws != [is_swapped(str(n), 43) for n in range(1000)]


def shown(seen: Seen) -> list[str]:
    return re.findall(r"<<\w{8} answer [AB]>>\n(.*?)\n<<\w{8} end>>", seen.question, re.DOTALL)


def worth(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 5


def script(seen: Seen) -> Act:
    """The judge has a taste of its own, wherever an answer stands; the models say something of their own."""
    if seen.body["model"] == "judge":
        first, second = map(worth, shown(seen))
        return ok(f"One is better. [[{'A' if first > second else 'B' if second > first else 'C'}]]")
    return ok(hashlib.sha256((seen.body["model"] + seen.question).encode()).hexdigest()[: 5 + worth(seen.question)])


def baseline(folder: Path, count: int = 12) -> Path:
    rows = [{"instruction": f"Do {n}.", "output": f"done {n}" + "!" * n, "generator": "old"} for n in range(count)]
    return write(folder / "baseline.json", rows)


def test_a_job_from_answers_to_rates(tmp_path: Path, capsys) -> None:
    out, places = tmp_path / "out", []

    def judged(seen: Seen) -> Act:
        if seen.body["model"] == "judge":
            places.append(shown(seen)[0].startswith("done"))
        return script(seen)

    with ChatServer(judged) as server:
        words = ["--judge", f"{server.url}#judge", "--model", f"{server.url}#a", "--model", f"{server.url}#b"]
        words += ["--instructions", baseline(tmp_path), "--out", out]
        assert run(*words, "--dry-run") == 0 and not server.seen and "judge: 24 requests" in capsys.readouterr().out
        assert run(*words) == 0
        assert len(server.seen) == 12 * 2 * 2 and 0 < sum(places) < len(places)
        of_models = [seen.body for seen in server.seen if seen.body["model"] != "judge"]
        assert {(body["temperature"], body["max_tokens"]) for body in of_models} == {(0.7, 2048)}
        found = json.loads((out / "alpaca.json").read_text())
        assert run(*words) == 0 and run(*words, "--limit", 5) == 0 and len(server.seen) == 48  # the log has it all
    assert json.loads((out / "alpaca-limit-5.json").read_text())["models"]["a"]["n_total"] == 5
    for name in ("a", "b"):
        folder = out / "alpaca" / name
        rows = json.loads((folder / "annotations.json").read_text())
        assert len(rows) == 12
        for row in rows:
            one, two = worth(row["output_1"]), worth(row["output_2"])
            assert row["preference"] == (1.5 if one == two else 2 if two > one else 1)
        assert found["models"][name]["win_rate"] == win_rate([row["preference"] for row in rows]).win_rate
        # the files are AlpacaEval's: they are scored again to the same
        assert run("--annotations", folder / "annotations.json", "--outputs", folder / "model_outputs.json") == 0
        again = rates(read_annotations(folder / "annotations.json"))
        assert {k: found["models"][name][k] for k in again} == again
    told = found["differences"]["a - b"]
    assert told["difference"] == pytest.approx(found["models"]["a"]["win_rate"] - found["models"]["b"]["win_rate"])
    assert found["settings"]["baseline"] == "old" and "leaderboard" in found["notes"][0]
