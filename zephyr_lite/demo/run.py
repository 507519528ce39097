"""The demo: the whole recipe on SmolLM2-135M, then the same questions asked of the base, the SFT and the DPO model."""

from __future__ import annotations

import gc
import json
import logging
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from ..chat import load_chat
from ..chat.generate import Sampling
from ..config.load import DatasetSpec, Method, RunConfig, load_config
from ..data.dataset import prepare
from ..evaluate.likelihood import chat_loss
from ..io.atomic import alone, file_aside, refuse_others, sweep, write_json
from ..io.run_dir import StageDir
from ..merge import merge
from ..model.chain import chain_of_run
from ..model.decoder import Decoder
from ..monitor.console import Console
from ..monitor.records import json_lines
from ..monitor.report_writer import ReportWriter
from ..recipe.ultrafeedback import to_pairs
from ..train.dpo import run_dpo
from ..train.resume import StageComplete
from ..train.sft import run_sft
from ..train.stage import Observer
from . import CONVERSATIONS, CONVERSATIONS_TEST, FEEDBACK, FEEDBACK_TEST, QUESTIONS
from .base import demo_base

logger = logging.getLogger(__name__)

WIDTH = 80  # columns at most
TOKENS = 48  # of an answer at most
# method → end of the names of its files, as of the splits of the hub's data sets
FILES = {"sft": "sft", "dpo": "prefs"}


def run_demo(
    out: Path,
    *,
    observers: Sequence[Observer] = (),
    base: Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """dSFT, dDPO, merge, and the scores of the three models.

    Args:
        out: the run's folder; ``out/merged`` is the model. Finished stages are not repeated.
        observers: of both stages.
        base: another base than SmolLM2-135M.
        overrides: ``key=value`` words for both stages.

    Returns:
        what ``out/demo.json`` has: ``standings``, model → loss on the held-out conversations (mean over the assistant's
        tokens) and answers to ``QUESTIONS`` (one that was cut off ends in …); ``reward_accuracy``, the share of held-out
        pairs in which DPO raised the better answer more.
    """

    def train(run: Callable[..., Any], method: Method) -> None:
        files = [out / "data" / f"{part}_{FILES[method]}.jsonl" for part in ("train", "test")]
        data = [f"dataset.path={files[0]}", f"eval_dataset.path={files[1]}"]
        words = [f"model_name_or_path={folder}", f"output_dir={out}", *data, *overrides]
        loaded = load_config(method, str(Path(__file__).with_name(f"{method}.yaml")), words)
        try:
            run(loaded, observers=[*observers, ReportWriter()])
        except StageComplete as done:
            logger.info(done.message)
        gc.collect()  # the stage's base must be freed before the next one is planned and loaded

    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        folder = base or demo_base()
        sweep(out)
        refuse_others(out, (out / "data").exists(), "a run of the demo")
        _write_data(out / "data")
        logger.info("[1/4] dSFT: conversations")
        train(run_sft, "sft")
        logger.info("[2/4] dDPO: preferences")
        train(run_dpo, "dpo")
        logger.info("[3/4] merge")
        chain = chain_of_run(out)
        merge(
            folder,
            chain.adapters,
            out / "merged",
            tokenizer_from=chain.tokenizer_from,
            lineage=chain.lineage(),
            overwrite=True,
        )
        logger.info("[4/4] held-out rows and answers: base, SFT, DPO")
        info = StageDir(out / "dpo").info() or {}
        accuracy = info["result"]["evaluations"][-1]["eval_rewards/accuracies"]
        result = {"standings": _standings(out), "reward_accuracy": accuracy, "questions": list(QUESTIONS)}
        write_json(out / "demo.json", result)
    return result


def _write_data(folder: Path) -> None:
    """Files to train on and held out: conversations, and pairs of the best mean score against a random other one."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    for part, chats, feedback in (("train", CONVERSATIONS, FEEDBACK), ("test", CONVERSATIONS_TEST, FEEDBACK_TEST)):
        pairs, counts = to_pairs(json_lines(feedback), seed=42)
        logger.info(f"{part}_prefs: {counts['pairs']} pairs of {counts['rows']} scored prompts")
        for method, rows, columns in (
            ("sft", json_lines(chats), ["messages"]),
            ("dpo", pairs, ["chosen", "rejected"]),
        ):
            with file_aside(folder / f"{part}_{FILES[method]}.jsonl") as file:
                file.writelines(json.dumps({column: row[column] for column in columns}) + "\n" for row in rows)


def _standings(out: Path) -> dict[str, dict[str, Any]]:
    """Base, SFT and DPO from one loaded base, by its adapters."""
    chat = load_chat(out / "dpo")
    rows = [DatasetSpec(path=str(out / "data" / f"test_{FILES['sft']}.jsonl"))]
    conversations = prepare(rows, "sft", RunConfig(max_length=1024), chat.template, what="held-out")
    prompts = [chat.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    greedy = [Sampling(TOKENS, temperature=0.0)] * len(prompts)
    result = {}
    for name, adapters in (("base", []), ("SFT", chat.stack.names[:1]), ("DPO", chat.stack.names)):
        drawn = chat.sample(prompts, greedy, adapters=adapters)
        loss = chat_loss(Decoder(chat.stack, chat.live.base.dtype, adapters), conversations)
        answers = [one.text + (" …" if one.finish == "length" else "") for one in drawn]
        result[name] = {"loss": loss, "answers": answers}
    return result


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print the models' answers below each question, then their scores."""
    width = min(WIDTH, console.out.width)
    for place, question in enumerate(QUESTIONS):
        console.heading(f"\n{question}")
        answers = Table.grid(Column(style="dim"), Column(overflow="fold"), padding=(0, 2))
        for name, one in result["standings"].items():
            answers.add_row(f"  {name}", console.text(" ".join(one["answers"][place].split())))
        console.out.print(answers, soft_wrap=False, width=width)
    losses = ", ".join(f"{one['loss']:.3f} ({name})" for name, one in result["standings"].items())
    for text in (
        f"Held-out loss: {losses}; lower is better.",
        f"DPO made the better answer gain more probability than the worse one in {result['reward_accuracy']:.0%} of the "
        "held-out pairs, compared with the SFT model; by chance it would be 50%.",
    ):
        console.say("\n" + textwrap.fill(text, width, break_on_hyphens=False))
