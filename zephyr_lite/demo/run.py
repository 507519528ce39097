"""The demo: the whole recipe on SmolLM2-135M, then the same questions asked of the base, the SFT and the DPO model."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..chat import load_chat
from ..config.load import DatasetSpec, Method, RunConfig, load_config
from ..data.dataset import TokenizedDataset, prepare
from ..errors import UserError
from ..evaluate.likelihood import chat_loss, row_logps
from ..io.atomic import alone, file_aside, make_folder, sweep, write_json
from ..io.run_dir import StageDir
from ..merge import merge
from ..model.chain import chain_of_run
from ..model.decoder import Decoder
from ..monitor.console import Console
from ..monitor.report_writer import ReportWriter
from ..recipe.ultrafeedback import to_pairs
from ..train.dpo import run_dpo
from ..train.resume import StageComplete
from ..train.sft import run_sft
from . import CONVERSATIONS, CONVERSATIONS_TEST, FEEDBACK, FEEDBACK_TEST, QUESTIONS, dodges
from .base import demo_base

logger = logging.getLogger(__name__)


@dataclass
class Standing:
    """Scores of one of the three models on the held-out rows."""

    loss: float  # mean over the assistant's tokens of the conversations
    # share of pairs whose better answer has the higher mean log-probability per token (the sum would favour the shorter one)
    preference_accuracy: float
    dodging: float  # share of its own answers to the prompts that retreat behind being a machine
    answers: list[str]  # to ``QUESTIONS``


@dataclass
class DemoResult:
    """Scores of each model, and the held-out accuracy of the DPO model's implicit reward."""

    standings: dict[str, Standing]
    reward_accuracy: float


def run_demo(
    out: Path,
    *,
    on_metrics: Callable[[int, int, dict[str, float]], None] = lambda step, total, metrics: None,
    base: Path | None = None,
    overrides: Sequence[str] = (),
) -> DemoResult:
    """dSFT, dDPO, merge, and the scores of the three models, which are also written to ``out/demo.json``.

    Args:
        out: the run's folder; ``out/merged`` is the model. Finished stages are not repeated.
        base: another base than SmolLM2-135M.
        overrides: ``key=value`` words for both stages.

    Raises:
        UserError: the base is not installed, or ``out`` holds something else.
    """

    def train(run: Callable[..., Any], method: Method, rows: Path, held_out: Path) -> None:
        data = [f"dataset.path={rows}", f"eval_dataset.path={held_out}"]
        words = [f"model_name_or_path={folder}", f"output_dir={out}", *data, *overrides]
        loaded = load_config(method, str(Path(__file__).with_name(f"{method}.yaml")), words)
        try:
            run(loaded, on_metrics=on_metrics, observers=[ReportWriter()])
        except StageComplete as done:
            logger.info(done.message)
        gc.collect()  # the stage's base must be freed before the next one is planned and loaded

    make_folder(out)
    with alone(out):
        folder = base or demo_base()
        sweep(out)
        others = [path for path in out.iterdir() if not path.name.startswith(".")]
        if others and not (out / "data").exists():
            raise UserError(f"{out} exists and is not a run of the demo.", "Choose another folder with --out.")
        train_pairs, test_pairs = _write_data(out / "data")
        logger.info("[1/4] dSFT: conversations")
        train(run_sft, "sft", CONVERSATIONS, CONVERSATIONS_TEST)
        logger.info("[2/4] dDPO: preferences")
        train(run_dpo, "dpo", train_pairs, test_pairs)
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
        logger.info("[4/4] answers and held-out rows: base, SFT, DPO")
        standings = _standings(out, test_pairs)
        info = StageDir(out / "dpo").info() or {}
        result = DemoResult(standings, info["result"]["evaluations"][-1]["eval_rewards/accuracies"])
        write_json(out / "demo.json", {**asdict(result), "questions": list(QUESTIONS)})
    return result


def _write_data(folder: Path) -> list[Path]:
    """Files of preference pairs, to train on and held out: the best mean score against a random other one."""
    make_folder(folder)
    sweep(folder)
    files = {folder / "train_prefs.jsonl": FEEDBACK, folder / "test_prefs.jsonl": FEEDBACK_TEST}
    for path, source in files.items():
        pairs, counts = to_pairs(map(json.loads, source.read_text(encoding="utf-8").splitlines()), seed=42)
        logger.info(f"{path.stem}: {counts['pairs']} pairs of {counts['rows']} scored prompts")
        with file_aside(path) as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    return list(files)


def _standings(out: Path, test_pairs: Path) -> dict[str, Standing]:
    """Base, SFT and DPO from one loaded base, by its adapters."""
    chat = load_chat(out / "dpo")
    config = RunConfig(max_length=1024)

    def rows(file: Path, method: Method) -> TokenizedDataset:
        return prepare([DatasetSpec(path=str(file))], method, config, chat.template, what="held-out")

    conversations, pairs = rows(CONVERSATIONS_TEST, "sft"), rows(test_pairs, "dpo")
    prompts = [json.loads(line)["prompt"] for line in test_pairs.read_text(encoding="utf-8").splitlines()]
    result = {}
    for name, adapters in (("base", []), ("SFT", chat.adapters[:1]), ("DPO", chat.adapters)):
        decoder = Decoder(chat.stack, chat.dtype, adapters)
        means = row_logps(decoder, pairs).means()
        answers = chat.ask([*QUESTIONS, *prompts], max_new_tokens=40, adapters=adapters)
        result[name] = Standing(
            loss=chat_loss(decoder, conversations),
            preference_accuracy=(means[:, 0] > means[:, 1]).double().mean().item(),
            dodging=sum(map(dodges, answers[len(QUESTIONS) :])) / len(prompts),
            answers=answers[: len(QUESTIONS)],
        )
    return result


def print_standings(console: Console, standings: Mapping[str, Standing]) -> None:
    """Print each model's answers and scores in columns."""
    table, found = Table("", *standings, show_lines=True, expand=True), standings.values()
    for column in table.columns:
        column.ratio = 1
    for place, question in enumerate(QUESTIONS):
        table.add_row(Text(question, style="bold"), *(Text(one.answers[place]) for one in found))
    table.add_row("held-out loss", *(f"{one.loss:.3f}" for one in found))
    table.add_row("better answer likelier", *(f"{one.preference_accuracy:.0%}" for one in found))
    table.add_row("dodging answers", *(f"{one.dodging:.0%}" for one in found))
    console.out.print(table, soft_wrap=False)
