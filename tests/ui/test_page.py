"""What the page's buttons call, with tiny models."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import httpx
import pytest
from gradio_client import Client

from tests.ui.test_browser import free_port, write
from zephyr_lite.errors import UserError
from zephyr_lite.ui import jobs, page, rows
from zephyr_lite.ui import server as server_module
from zephyr_lite.ui.talk import Talk


def fields(base, data, more: str = "", run: str = "runs/t") -> list:
    return [str(base), str(data), None, run, None, None, None, None, more]


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_rows_show_what_is_trained_on(tiny_base, tmp_path):
    chat = [{"role": "user", "content": "Is 1 < 2?"}, {"role": "assistant", "content": "Yes & no."}]
    data = write(tmp_path / "chats.jsonl", [{"messages": chat}] * 2)
    found, report, number, html = rows.read_rows("sft", "", *fields(tiny_base, data))
    assert "2 conversations" in report and number == 1
    assert '<span class="zl-on ">Yes &amp; no.</span><span class="zl-on zl-special">&lt;/s&gt;</span>' in html
    assert '<span class=" ">' in html and "Is 1 &lt; 2?" in html and "chats.jsonl row 1" in html
    assert rows.show_row(found, 2)[0] == 2 and rows.show_row(found, 9)[0] == 2
    assert "chats.jsonl row 2" in rows.show_row(found, 2)[1]
    assert rows.show_row(found, None)[0] == 1 and rows.show_row(found, 1, by=1)[0] == 2
    assert "rejected" not in html


def test_training_is_started_stopped_found_again_and_resumed(tiny_base, chat_rows):
    more = "load_in_4bit=false max_length=64 max_steps=60 lora_r=4 batch_size=2"
    folder = jobs.start("sft", None, jobs.words_of(*fields(tiny_base, chat_rows, more)))
    assert folder == Path("runs/t/sft") and page.look(str(folder))[0] == "**runs/t/sft** is starting."
    assert page.look(str(folder))[-2].value == page.SECONDS
    with pytest.raises(UserError, match="runs/t is being trained"):
        jobs.start("sft", None, jobs.words_of(*fields(tiny_base, chat_rows, more, "runs/other")))
    assert jobs.stages() == [str(folder)] and page.look(None)[-1].value == str(folder)  # as after a reload
    wait_for((folder / "metrics.jsonl").exists)
    child = jobs._children.pop(folder)  # as after a new start of the server
    assert jobs.process_of(folder.parent).pid == child.pid and jobs.in_training() == [folder.parent]
    jobs.stop(folder)
    assert child.wait(60) == 130 and jobs.process_of(folder.parent) is None
    text, loss, *_, log, timer, _ = page.look(str(folder))
    assert "was stopped at step" in text and "Resume continues from checkpoint-" in text and timer.value == page.IDLE
    assert loss.visible
    assert "SIGTERM: stopped after step" in log
    jobs.resume(folder)
    wait_for(lambda: jobs.process_of(folder.parent) is None)
    assert page.look(str(folder))[0].startswith("**runs/t/sft** is complete.")
    assert jobs.log_of(folder).read_text().count("$ zephyr-lite sft ") == 2 and jobs.runs() == ["runs/t"]


def test_three_models_answer_and_a_vote_makes_pairs(talk_run):
    talk = Talk()
    *growing, html = talk.ask(str(talk_run), "compare", "Who are you?", "votes.jsonl", 0.0, 6, True)
    assert "Loading the model" in growing[0] and all(f"<h4>{name}</h4>" in html for name in ("base", "sft", "dpo"))
    assert html.count("Who are you?") == 3 and not talk.choices and not Path("votes.jsonl").exists()

    ask = (str(talk_run), "vote", "Name three rivers.", "votes.jsonl", 0.0, 6, False)
    *_, html = talk.ask(*ask)
    assert talk.choices == ["1", "2", "3", "tie", "skip"] and "<h4>Answer 3</h4>" in html and "<h4>sft</h4>" not in html
    shown = talk.html()
    for mode in ("vote", "compare"):
        with pytest.raises(UserError, match="wait for your vote"):
            list(talk.ask(str(talk_run), mode, *ask[2:]))
    assert talk.choices and talk.html() == shown
    assert "Pairs added to votes.jsonl: " in talk.vote("2", "votes.jsonl")
    pairs = [json.loads(line) for line in Path("votes.jsonl").read_text().splitlines()]
    assert pairs and all(pair["prompt"] == "Name three rivers." for pair in pairs)
    assert {"chosen_model", "rejected_model", "source"} <= pairs[0]["vote"].keys()
    assert talk.html().count("Name three rivers.") == 1 and pairs[0]["chosen"][-1]["content"].strip() != ""
    list(talk.ask(*ask[:4], None, None, False))  # empty numbers keep the last ones
    assert talk.vote("skip", "votes.jsonl").startswith("Skipped") and talk.html().count("Name three rivers.") == 1
    talk.unload()
    assert talk.html() == "" and talk.asked == "Name three rivers."
    clear = [each.fn for each in page.build(talk).fns.values() if each.fn and each.trigger_only_on_success][-1]
    assert (
        clear("Name three rivers.") == "" and clear("And in Asia?") == page.gr.skip()
    )  # written while the answer grew


def test_the_page_is_served_here_with_its_reports(talk_run):
    port = free_port()
    server, address = server_module.open_page(port, browser=False)
    try:
        assert address == f"http://127.0.0.1:{port}/"
        with pytest.raises(UserError, match=f"port {port} is taken"):
            server_module.open_page(port, browser=False)
        assert httpx.get(address).status_code == httpx.get(f"http://localhost:{port}/").status_code == 200
        assert httpx.get(address, headers={"Host": f"evil.example:{port}"}).status_code == 400
        client = Client(address, verbose=False)
        assert "is complete." in client.predict(str(talk_run / "sft"), api_name="/look")[0]
        with pytest.raises(Exception, match="no_such_key"):
            client.predict("sft", "", *[""] * 8, "no_such_key=1", api_name="/start")
        assert httpx.get(f"{address}report", params={"stage": str(talk_run)}).status_code == 404
        copy = Path(shutil.copytree(talk_run / "sft", "runs/t/sft"))
        (copy / "report.html").write_text("<p>the report</p>")
        assert httpx.get(f"{address}report", params={"stage": str(copy)}).text == "<p>the report</p>"
    finally:
        server.close(verbose=False)
