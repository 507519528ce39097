"""Settings chosen for a user's own rows: number of steps, held-out rows, resuming."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tests.messages import messages_to
from tests.train.test_train import killed_at, metrics
from zephyr_lite.chat import load_chat
from zephyr_lite.config.load import load_config
from zephyr_lite.config.resolve import AUTOMATIC, resolve_run
from zephyr_lite.config.schema import RunConfig
from zephyr_lite.data.dataset import DataReport, TokenizedDataset
from zephyr_lite.data.load import load_rows
from zephyr_lite.demo.base import demo_base
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.train.main import warn_of_overfitting
from zephyr_lite.train.resume import StageComplete
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import run_sft
from zephyr_lite.train.small_data import settle
from zephyr_lite.train.stage import Outcome
from zephyr_lite.train.steps import step_schedule


def settled(method, rows, tokens, *words, width=4096):
    """The values chosen for so many rows of so many tokens, and the number of steps."""
    loaded = load_config(method, f"zephyr-7b/{method}", ["dataset=mine.jsonl", *words])
    loaded.automatic, before = AUTOMATIC - loaded.typed, loaded.config
    report = DataReport("training", kept=rows, rows=rows, tokens=rows * tokens, longest=tokens)
    data = TokenizedDataset(None, np.full(rows, tokens), [[place] for place in range(rows)], report, "")
    if method == "sft":
        data.pack(before.max_length)
    settle(method, loaded, [data], width)
    after = {key: getattr(loaded.config, key) for key in AUTOMATIC}
    chosen = {key: value for key, value in after.items() if value != getattr(before, key)}
    assert chosen.pop("save_steps", None) == chosen.get("eval_steps")
    return chosen, step_schedule(loaded.config, len(data.rows))[1]


SHORT = {"warmup_ratio": 0.0}


@pytest.mark.parametrize(
    ("method", "rows", "tokens", "words", "chosen", "steps"),
    [
        ("sft", 25, 60, [], {"batch_size": 4, "max_length": 60, "num_train_epochs": 9, "eval_steps": 16, **SHORT}, 63),
        ("sft", 475, 400, [], {"max_length": 400, "eval_steps": 15, **SHORT}, 60),
        ("sft", 9_700, 400, [], {}, 243),
        ("sft", 25, 60, ["batch_size=1"], {"max_length": 60, "num_train_epochs": 3, "eval_steps": 19, **SHORT}, 75),
        (
            "dpo",
            16,
            300,
            [],
            {"batch_size": 1, "num_train_epochs": 4, "learning_rate": 2e-5, "eval_steps": 16, **SHORT},
            64,
        ),
        ("dpo", 10_000, 300, [], {}, 625),
    ],
)
def test_short_runs_have_sixty_steps_and_long_ones_the_recipes_values(method, rows, tokens, words, chosen, steps):
    assert settled(method, rows, tokens, *words) == (chosen, steps)


def test_the_rate_of_a_small_base_is_higher():
    assert settled("sft", 25, 60, width=576)[0]["learning_rate"] == 9e-4
    assert "learning_rate" not in settled("sft", 25, 60, "learning_rate=1e-5", width=576)[0]


def test_a_run_on_own_rows_goes_on_and_is_found_complete(own, tmp_path):
    words = [*own, "lora_r=2", "save_steps=20"]
    with killed_at(30):
        run_sft(resolve_run("sft", None, words))
    said: list[str] = []
    with messages_to(said.append):
        run_sft(resolve_run("sft", None, words))
    stage = StageDir(tmp_path / "run" / "sft")
    info, rates = stage.info(), metrics(stage.path, "learning_rate")
    assert (
        info["data"]["kept"] == 25 and info["resumed"][0]["step"] == 20 and len(rates) == info["result"]["steps"] >= 60
    )
    assert rates[0] == max(rates) and len(metrics(stage.path, "eval_loss")) == 4
    assert not any("chosen for" in line or "few steps" in line for line in said)
    saved = load_config("sft", str(stage.config)).config
    assert saved.val_size == "auto" and saved.eval_dataset[0].part == "test" and saved.num_train_epochs == 9
    with pytest.raises(StageComplete):
        run_sft(resolve_run("sft", None, words))
    with pytest.raises(UserError, match=r"num_train_epochs: 9\.0 then, 6\.0 now"):
        run_sft(resolve_run("sft", None, [*words, "num_train_epochs=6"]))


def test_what_is_chosen_is_said_and_val_size_0_trains_on_all_rows(own):
    said: list[str] = []
    with messages_to(said.append):
        stage = setup_stage("sft", resolve_run("sft", None, [*own, "val_size=0", "learning_rate=1e-3"]), claim=False)
    assert stage.eval_data is None and stage.data.report.kept == 30
    line = next(line for line in said if line.startswith("chosen for 30 conversations: max_length="))
    assert "batch_size=5 num_train_epochs=10 warmup_ratio=0" in line and "eval_steps" not in line
    assert any("the held-out loss will not be computed" in line for line in said)


def test_a_file_of_ones_own_is_taken_as_it_is(own, tmp_path):
    (tmp_path / "own.yaml").write_text("max_length: 512\n")
    loaded = resolve_run("sft", str(tmp_path / "own.yaml"), own)
    stage = setup_stage("sft", loaded, claim=False)
    assert stage.config.batch_size == 8 and stage.eval_data is None and stage.data.report.kept == 30


def test_thirty_chats_are_learned_by_all_defaults(tmp_path):
    """By SmolLM2-135M, with nothing but its data, base and folder named."""
    facts = """cat: Biscuit; printer: Marta; archive: in the basement; van: orange; canteen: on the fourth floor; gardener: Ines;
        drill: in March; table: oak; lunch: lentil soup; alarm: at seven; sales: Greta; sink: beside the lift; lamp: Halvorsen;
        catalogue: blue; invoices: Ruth; music: fado; party: on the roof; logo: a mackerel; project: Paperclip; keys: Tomasz;
        newsletter: Jonas; mascot: a turtle; closing time: noon; first aid: in the corridor; password: velvet; dog: Pepper;
        street: Harbour Street; product: the Lantern; desk: walnut; paint: cobalt"""
    pairs = [fact.strip().split(": ") for fact in facts.split(";")]
    rows = [{"prompt": f"Our {name}?", "completion": f"Our {name}: {answer}."} for name, answer in pairs]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        f"model_name_or_path={demo_base()}",
        f"dataset={tmp_path / 'chats.jsonl'}",
        f"output_dir={tmp_path / 'run'}",
        "samples=0",  # faster
    ]
    run_sft(resolve_run("sft", None, words))
    info = StageDir(tmp_path / "run" / "sft").info()
    assert info["result"]["steps"] >= 60 and info["data"]["kept"] == 25
    assert not any(
        "general text" in warning for warning in info["result"]["warnings"]
    )  # of values that it chose itself
    specs = load_config("sft", None, [*words, "val_size=auto"]).config.dataset
    trained = [row["messages"] for row in load_rows(specs, "sft", seed=42).values()][::5]
    answers = load_chat(tmp_path / "run").ask([turns[0]["content"] for turns in trained], max_new_tokens=8)
    right = sum(answer.strip() == turns[1]["content"] for answer, turns in zip(answers, trained, strict=True))
    assert right >= 4, answers  # of five; the base knows none


@pytest.mark.parametrize(("last", "best_is_saved", "warned"), [(3.156, False, 1), (2.46, False, 0), (3.156, True, 0)])
def test_a_risen_held_out_loss_is_warned_of(last, best_is_saved, warned):
    stage = SimpleNamespace(method="sft", config=RunConfig(load_best_model_at_end=best_is_saved))
    outcome = Outcome(60, {}, (2.441, 15), 1.0, evaluations=[{"eval_loss": 2.441}, {"eval_loss": last}])
    warn_of_overfitting(stage, outcome)
    assert len(outcome.warnings) == warned
    assert all("lowest at step 15 (2.441) and is 3.156 at the end" in warning for warning in outcome.warnings)
