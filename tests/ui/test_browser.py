"""The page in a real browser, from an empty folder to an exported model: ``CHROMIUM=/path pytest -m browser tests/ui``."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tests.conftest import _messages
from zephyr_lite.demo.base import demo_base

pytestmark = pytest.mark.browser
CHATS = [(f"Who is number {n}?", f"Number {n} is a baker at Larkfield, and likes rye bread.") for n in range(24)]


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM")
    if path is None:
        pytest.skip("CHROMIUM names no browser")
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--headless=shell", "--single-process", "--no-zygote"]
        found = playwright.chromium.launch(executable_path=path, args=flags)
        yield found
        found.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_from_an_empty_folder_to_an_exported_model(browser, tmp_path):
    from zephyr_lite.ui.server import open_page

    chats = write(tmp_path / "chats.jsonl", [{"messages": _messages(*chat)} for chat in CHATS])
    pairs = [
        {"prompt": question, "chosen": _messages(question, answer), "rejected": _messages(question, "I do not know.")}
        for question, answer in CHATS[:8]
    ]
    pairs = write(tmp_path / "pairs.jsonl", pairs)
    server, address = open_page(free_port(), browser=False)
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(60_000)
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))

    def tab(name: str) -> None:
        page.get_by_role("tab", name=name, exact=True).click()

    def press(name: str) -> None:
        page.get_by_role("button", name=name, exact=True).click()

    def see(text: str) -> None:
        page.wait_for_function("text => document.body.innerText.includes(text)", arg=text)

    def output(text: str) -> None:
        box = page.locator(".zl-text textarea >> visible=true").element_handle()
        page.wait_for_function("([box, text]) => box.value.includes(text)", arg=[box, text])

    def upload(file: Path) -> None:
        page.locator("input[type=file]").first.set_input_files(file)
        data = page.get_by_placeholder("the recipe's data").element_handle()
        page.wait_for_function("([box, name]) => box.value == `uploads/${name}`", arg=[data, file.name])

    page.goto(address)
    # rows
    page.get_by_label("Base model").fill(str(demo_base()))
    upload(chats)
    press("Read the data")
    output("24 rows")
    see("is a baker at Larkfield")
    first = page.locator(".zl-turn").first.inner_text()
    press("Next")
    page.wait_for_function("first => document.querySelector('.zl-turn').innerText !== first", arg=first)
    # plan
    tab("Plan")
    page.get_by_label("learning_rate").fill("1e-3")
    page.get_by_label("batch_size").fill("2")
    page.get_by_label("max_length").fill("128")
    page.get_by_label("Other keys").fill("max_steps=10 save_steps=2 lora_r=4 samples=0")
    press("Plan")
    output("tokens/s")
    # train, stop, resume
    tab("Train")
    press("Start")
    see("is starting.")
    page.reload()
    tab("Train")
    see("in training, at step ")
    press("Stop")
    see("Resume continues from checkpoint-")
    press("Resume")
    see("runs/mine/sft is complete.")
    link = page.get_by_role("link", name="Open the report").get_attribute("href")
    assert "<svg" in page.request.get(address.rstrip("/") + link).text()
    # DPO on top of it
    tab("Data")
    page.get_by_label("DPO: preference pairs").check()
    page.get_by_label("Base model").fill("")
    upload(pairs)
    tab("Plan")
    page.get_by_label("Other keys").fill("max_steps=2 max_prompt_length=64 lora_r=4 samples=0")
    tab("Train")
    press("Start")
    see("runs/mine/dpo is complete.")
    # chat and vote
    tab("Chat")
    page.get_by_label("blind vote").check()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Maximum tokens of an answer").fill("12")
    page.get_by_placeholder("Write a question").fill("Who is number 3?")
    press("Ask")
    see("Which answer is best?")
    see("Answer 3")
    question = page.get_by_placeholder("Write a question")
    page.wait_for_function("box => box.value === ''", arg=question.element_handle())
    question.fill("Who is number 4?")
    press("Ask")
    see("the last answers wait for your vote.")
    assert page.get_by_label("skip", exact=True).is_visible()
    assert not page.locator(".wrap > .error >> visible=true").count()
    page.reload()
    tab("Chat")
    see("Which answer is best?")
    see("Answer 3")
    page.get_by_label("1", exact=True).check()
    see("Pairs added to votes.jsonl:")
    row = json.loads(Path("votes.jsonl").read_text(encoding="utf-8").splitlines()[0])
    voted = {row["vote"]["chosen_model"], row["vote"]["rejected_model"]}
    assert row["prompt"] == "Who is number 3?" and voted <= {"base", "sft", "dpo"}
    # merge and export
    tab("Merge and export")
    press("Merge")
    see(f"The merged model is in {Path('model').absolute()}.")
    press("Export GGUF")
    see("The GGUF file is ")
    assert Path("model-q8_0.gguf").stat().st_size > 10**8
    assert hosts == {address.split("/")[2]}
    server.close(verbose=False)
