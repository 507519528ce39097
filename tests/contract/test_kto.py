"""KTO: losses, gradients and metrics equal TRL's on the same rows; z0 is one number for a step, however it is computed."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from tests.contract.steps import open_dpo, step_of
from tests.contract.test_trl_parity import TOLERANCE, apart, assert_same_gradients, merged_base, oracle, ours, settings
from tests.numeric import apart as distance
from tests.train.test_train import dpo_words, killed_at, metrics
from zephyr_lite.config.load import RunConfig, load_config
from zephyr_lite.data.batch import collate_pairs
from zephyr_lite.data.chat_template import PairExample
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train.dpo import preference_objective, run_dpo
from zephyr_lite.train.kto import KtoObjective, mismatched

WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.7}


def row(index, prompt, chosen, rejected):
    rng = np.random.default_rng(200 + index)
    p, c, r = (rng.integers(3, 440, n).astype(np.int32) for n in (prompt, chosen, rejected))
    return PairExample(p, c, np.ones(chosen, bool), r, np.ones(rejected, bool), f"row {index}", index)


LENGTHS = [(9, 21, 0), (4, 0, 17), (16, 8, 0), (5, 0, 3), (7, 12, 0)]
PAIRS = [row(i, *lengths) for i, lengths in enumerate([(9, 21, 5), (4, 3, 17), (16, 8, 8)], 20)]
# rows, and whether z0 is above 0
CASES = [
    ([row(i, *lengths) for i, lengths in enumerate(LENGTHS)], False),
    ([row(i, *lengths) for i, lengths in enumerate(LENGTHS, 40)], True),
    (PAIRS, True),
]


def unpaired(pairs):
    """(prompt, answer, label), in the order in which TRL unpairs."""
    sides = [
        [(p, ids, label) for ids, label in ((p.chosen_ids, True), (p.rejected_ids, False)) if len(ids)] for p in pairs
    ]
    return [own[place] for place in (0, 1) for own in sides if place < len(own)]


def objective_of(stack, decoder, examples, **config):
    """Of a stage that is nothing but its rows and its model."""
    answers = np.array([[len(e.chosen_ids) > 0, len(e.rejected_ids) > 0] for e in examples])
    stage = SimpleNamespace(
        config=RunConfig(loss_type="kto", beta=0.3, lora_dropout=0, **WEIGHTS, **config),
        data=SimpleNamespace(examples=examples, lengths=[60] * len(examples), answers=lambda: answers),
        decoder=decoder,
        plan=SimpleNamespace(keep="all", reference="together", micro_tokens=70),
    )
    for place, example in enumerate(examples):
        example.index = place
    return KtoObjective(stage)


@pytest.mark.parametrize(("pairs", "above"), CASES)
def test_kto_equals_trl(tokenizer, tmp_path, pairs, above):
    stack, decoder = ours()
    task = objective_of(stack, decoder, pairs)
    everything = range(len(pairs))
    total = task.num_targets(everything)
    task.begin_step(everything)
    loss, sums = task.loss(everything, 1, total)
    loss.backward()
    found = task.metrics({"loss": loss.item(), **{name: float(value) for name, value in sums.items()}}, total)

    rows = unpaired(pairs)
    assert len(rows) == total.pairs
    args = KTOConfig(**settings(tmp_path), beta=0.3, **WEIGHTS)
    texts = Dataset.from_list([{"prompt": "a", "completion": " b", "label": True}] * 4)  # what is compared comes below
    trainer, layers = oracle(KTOTrainer, args, texts, tokenizer, stack.weights("dpo"), merged_base())
    names = ("prompt_ids", "completion_ids", "label", "KL_completion_ids")
    fed = [
        dict(zip(names, (p.prompt_ids.tolist(), ids.tolist(), label, rows[i - 1][1].tolist())))
        for i, (p, ids, label) in enumerate(rows)
    ]
    wanted = trainer.compute_loss(trainer.model, trainer.data_collator(fed))
    wanted.backward()
    assert apart(loss.detach(), wanted.detach()) <= TOLERANCE
    assert_same_gradients(stack, layers)
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert (theirs["kl"] > 0) == (task.z0 > 0) == above
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert found[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=1e-4 if "logps" not in name else 0), name


def test_prompts_meet_other_answers():
    labels, pairs = CASES[0][0], PAIRS
    rows = mismatched(labels, 20)
    assert [r.prompt_ids.tolist() for r in rows] == [p.prompt_ids.tolist() for p in labels]
    assert [len(r.chosen_ids) for r in rows] == [11, 16, 0, 8, 0]  # of 12, 21, … cut to 20 with the prompt
    assert [len(r.rejected_ids) for r in rows] == [0, 0, 4, 0, 3]
    assert [r.rejected_ids.tolist() for r in mismatched(pairs, 99)] == [
        pairs[i - 1].rejected_ids.tolist() for i in range(3)
    ]
    assert mismatched(labels[:1], 99) == []


@pytest.fixture(scope="module")
def label_rows(pair_rows, tmp_path_factory):
    """Answers with labels, and a pair."""
    path = tmp_path_factory.mktemp("rows") / "labels.jsonl"
    pairs = [json.loads(line) for line in pair_rows.read_text().splitlines()]
    rows = [pairs[0]]
    for place, pair in enumerate(pairs[1:]):
        side = ("rejected", "chosen", "chosen")[place % 3]
        rows.append({"messages": pair[side], "label": side == "chosen"})
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def kto_stage(windowed, run, rows, **changes):
    """After an update that makes answers of other prompts more likely, so that z0 is above 0."""
    stage = open_dpo(windowed, run, rows, loss_type="kto", **changes)
    task = preference_objective(stage)
    assert isinstance(task, KtoObjective)
    policy, _ = task._sums(collate_pairs(mismatched(stage.data.examples[:], 128)))
    policy.sum().backward()
    for parameter in stage.stack.parameters().values():
        parameter.data.add_(parameter.grad, alpha=1e-4)
    return stage, task


def test_micro_batches_and_a_cached_reference_change_nothing(windowed, run, label_rows):
    stage, task = kto_stage(windowed, run, label_rows, precompute_ref_log_probs=True, batch_size=4)
    cached, task.cache = task.cache, None
    whole, wanted = step_of(stage, task, 10_000, 3)  # not the first step, where B has to be zero
    task.cache = cached
    split, grads = step_of(stage, task, 1, 3)
    assert whole["kl"] > 0
    assert split == pytest.approx(whole, rel=1e-4, abs=1e-4) and split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    for name, grad in wanted.items():
        assert distance(grads[name], grad) < 1e-5, name


def test_the_held_out_loss_is_that_of_a_step_of_the_same_rows(windowed, run, label_rows):
    stage, task = kto_stage(windowed, run, label_rows, **WEIGHTS)
    everything = range(len(stage.data.lengths))
    total = task.num_targets(everything)
    task.begin_step(everything)
    loss, sums = task.loss(everything, 1, total)
    wanted = task.metrics({"loss": loss.item(), **{k: float(v) for k, v in sums.items()}}, total)
    assert wanted["kl"] > 0 and wanted["num_answers"] == 9
    held_out = task.eval_metrics(task.evaluate())
    assert held_out == pytest.approx(
        {name: wanted[name.removeprefix("eval_")] for name in held_out}, rel=1e-4, abs=1e-5
    )


def test_a_run_begins_at_half_its_weights_learns_and_resumes_to_the_same_bits(windowed, run, label_rows, tmp_path):
    shutil.copytree(run / "sft", tmp_path / "other" / "sft")
    settings = {"learning_rate": 0.01, "batch_size": 4, "lora_dropout": 0.1, "load_in_4bit": "false", **WEIGHTS}
    loaded = [
        load_config("dpo", None, dpo_words(windowed, folder, label_rows, loss_type="kto", **settings))
        for folder in (run, tmp_path / "other")
    ]
    run_dpo(loaded[0])
    with killed_at(3):
        run_dpo(loaded[1])
    run_dpo(loaded[1])
    whole, killed = (read_adapter(folder / "dpo" / "adapter").sha256 for folder in (run, tmp_path / "other"))
    assert whole == killed and metrics(run / "dpo") == metrics(tmp_path / "other" / "dpo")
    chosen, rejected = (0.5 * WEIGHTS[f"{name}_weight"] for name in ("desirable", "undesirable"))
    first = json.loads((run / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    n = round((first["loss"] - rejected) / (chosen - rejected) * first["num_answers"], 4)
    assert n == int(n) and 0 < n < first["num_answers"] and first["kl"] == 0
    assert metrics(run / "dpo", "eval_loss")[-1] < metrics(run / "dpo", "eval_loss")[0]
    data = json.loads((run / "dpo" / "stage.json").read_text())["data"]
    assert "answers: 5 desirable (true), 4 undesirable (false)" in data["notes"]
