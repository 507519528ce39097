"""A local folder as an endpoint: batches, a seed for each request, and the same request log and budget."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.client.test_client import ask_all, run
from zephyr_lite.chat import Chat, load_chat
from zephyr_lite.chat.generate import RowSampler, Sampling
from zephyr_lite.client.client import Request, RequestFailed
from zephyr_lite.client.endpoints import EndpointSpec
from zephyr_lite.client.request_log import Reply

QUESTIONS = [
    "Name three rivers.",
    "Who are you?",
    "Tell me a joke about a fox and a dog.",
    "What is two plus two?",
    "Hi",
]


def local(path: Path, **settings: Any) -> EndpointSpec:
    return EndpointSpec(**{"path": str(path), "name": "m", "max_tokens": 12, "concurrency": 8, **settings})


def ask(text: str, **settings: Any) -> Request:
    return Request(f"key/{text}", "m", ({"role": "user", "content": text},), **settings)


async def ask_with_seeds(client: Any) -> list[Any]:
    asked = [ask(text, seed=place, max_tokens=6 + 3 * place) for place, text in enumerate(QUESTIONS)]
    return await asyncio.gather(*(client.ask(request) for request in asked), return_exceptions=True)


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """The sizes of the batches that are run."""
    sizes: list[int] = []
    sample = Chat.sample

    def counted(self: Chat, prompt_ids: Any, rows: Any, **settings: Any) -> Any:
        sizes.append(len(rows))
        return sample(self, prompt_ids, rows, **settings)

    monkeypatch.setattr(Chat, "sample", counted)
    return sizes


def test_answers_do_not_depend_on_the_batch_and_are_paid_for_once(tmp_path, tiny_base, batches):
    together, totals = run([local(tiny_base)], tmp_path / "together", ask_with_seeds)
    assert all(isinstance(reply, Reply) for reply in together), together
    assert batches == [5]
    alone, _ = run([local(tiny_base, concurrency=1)], tmp_path / "alone", ask_with_seeds)
    assert alone == together and batches[1:] == [1] * 5
    assert len({reply.text for reply in together}) > 1
    resumed, totals_after = run([local(tiny_base)], tmp_path / "together", ask_with_seeds)
    assert resumed == together and len(batches) == 6
    assert totals_after.requests == totals.requests == 5 and totals_after.from_log == 5


def test_a_batch_that_does_not_fit_into_memory_is_halved(tmp_path, tiny_base, batches, monkeypatch):
    sample = Chat.sample
    expected, _ = run([local(tiny_base)], tmp_path / "whole", ask_with_seeds)
    batches.clear()

    def small(self: Chat, prompt_ids: Any, rows: Any, **settings: Any) -> Any:
        if len(rows) > 1:
            batches.append(-len(rows))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(self, prompt_ids, rows, **settings)

    monkeypatch.setattr(Chat, "sample", small)
    replies, _ = run([local(tiny_base)], tmp_path / "halves", ask_with_seeds)
    assert replies == expected and batches == [-5, -2, 1, 1, -3, 1, -2, 1, 1]

    def none(self: Chat, *args: Any, **settings: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Chat, "sample", none)
    (reply,), _ = run([local(tiny_base)], tmp_path / "none", lambda d: ask_all(d, ["Hi"]))
    assert isinstance(reply, RequestFailed) and "do not fit" in str(reply)


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    for temperature, top_p in ((1.0, None), (0.5, None), (2.0, 0.8)):
        rows = [Sampling(1, temperature, top_p, seed) for seed in range(6000)]
        counts = Counter(RowSampler(rows).choose(logits.expand(6000, 5)).tolist())
        expected = torch.softmax(logits.double() / temperature, -1)
        if top_p is not None:  # at temperature 2 the first three have 0.82
            expected[3:] = 0
            expected /= expected.sum()
        for token, share in enumerate(expected.tolist()):
            assert abs(counts[token] / 6000 - share) < 4.5 * (share * (1 - share) / 6000) ** 0.5 + 1e-9, (token, counts)
    extreme = [Sampling(1, 0.0), Sampling(1, 1e-6, None, 5), Sampling(1, 1e6, 1e-9, 5), Sampling(1, 1.0, 1.0, 7)]
    chosen = RowSampler(extreme).choose(torch.tensor([[1.0, 3.0, -float("inf"), 2.0]] * 4)).tolist()
    assert chosen[:3] == [1, 1, 1] and chosen[3] != 2


def test_a_stage_of_a_run_answers_with_its_adapter_on(tmp_path, tiny_base, chat_rows):
    from tests.train.test_train import words
    from zephyr_lite.config.load import load_config
    from zephyr_lite.train.sft import run_sft

    run_folder = tmp_path / "run"
    settings = {"load_in_4bit": "false", "num_train_epochs": 3, "learning_rate": 0.05}
    run_sft(load_config("sft", None, words(tiny_base, run_folder, chat_rows, **settings)))
    specs = [
        local(tiny_base, name="base", temperature=0.0),
        local(run_folder, name="run", temperature=0.0),
        local(run_folder / "sft", name="stage", temperature=0.0),
    ]

    async def work(client):
        turns = ({"role": "user", "content": "Who are you?"},)
        return [(await client.ask(Request("k", spec.name, turns))).text for spec in specs]

    (base, run_text, stage), totals = run(specs, tmp_path / "job", work)
    assert run_text == stage != base and totals.requests == 3
    assert load_chat(run_folder).ask(["Who are you?"], max_new_tokens=12) == [run_text]
    # a sampled batch: rows of different lengths, padded on the left, with the adapter
    together, _ = run([local(run_folder)], tmp_path / "together", ask_with_seeds)
    alone, _ = run([local(run_folder, concurrency=1)], tmp_path / "alone", ask_with_seeds)
    assert alone == together
