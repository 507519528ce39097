"""The harness: its numbers are the live stack's, and finished tasks are kept."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from zephyr_lite.cli.app import run
from zephyr_lite.evaluate import harness
from zephyr_lite.model.loaded import open_live

TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

QUESTIONS = [
    ("What is two plus two?", ["four", "a river and a dog"], 0),
    ("Name a river.", ["soup with tomatoes", "the Rhine"], 1),
    ("Who barks at night?", ["a dog", "an egg", "the joke"], 0),
    ("What do you boil for seven minutes?", ["an egg", "a phone", "the Nile"], 0),
    ("Where is the phone?", ["inside", "outside"], 1),
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {rows}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "questions.jsonl"
    lines = [json.dumps({"question": q, "choices": c, "gold": g}) + "\n" for q, c, g in QUESTIONS]
    rows.write_text("".join(lines))
    (folder / "tiny.yaml").write_text(TASK.format(rows=rows))
    return folder


def asked(capsys, *words):
    code = run(["eval", "harness", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def right(live, model):
    """Share of questions whose gold choice is likeliest, by the model's own forward pass."""
    tokenizer, hits = live.template.tokenizer, 0
    for question, choices, gold in QUESTIONS:
        start = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        scores = []
        for choice in choices:
            ids = torch.tensor([tokenizer(f"Question: {question}\nAnswer: {choice}")["input_ids"]])
            with torch.no_grad(), live.stack.only(live.models[model]):
                logps = live.stack.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores.append(logps.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum().item())
        hits += scores.index(max(scores)) == gold
    return hits / len(QUESTIONS)


def test_every_model_of_the_chain_and_finished_tasks_are_kept(talk_run, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # thousands of files
    words = [talk_run, "--tasks", "tiny_choice", "--include-path", tasks, "--out", tmp_path]
    code, out, err = asked(capsys, *words)
    assert code == 0, err
    path = tmp_path / "harness.json"
    told = json.loads(path.read_text())
    live = open_live(talk_run)
    for model in ("base", "sft", "dpo"):
        entry = told["models"][model]["tasks"]["tiny_choice"]
        assert entry["value"] == pytest.approx(right(live, model)) and entry["metric"] == "acc"
        assert (entry["shots"], entry["questions"]) == (0, 5) and entry["stderr"] > 0
        assert f"{100 * entry['value']:.2f} ± {100 * entry['stderr']:.2f}" in out
    assert told["models"]["base"]["identity"] != told["models"]["sft"]["identity"]

    monkeypatch.setattr(harness, "_run", None)  # nothing is asked twice
    code, out, err = asked(capsys, *words)
    assert code == 0 and out.count("kept from") == 3, err
    assert json.loads(path.read_text())["models"] == told["models"]
    # another file of the task is another task
    (tasks / "questions.jsonl").write_text((tasks / "questions.jsonl").read_text().replace("Rhine", "Nile"))
    code, out, err = asked(capsys, *words)
    assert code == 1 and "kept from" not in out and "NoneType" in err
