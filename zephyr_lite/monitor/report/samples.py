"""What the model answered to held-out prompts, before and after."""

from __future__ import annotations

from collections.abc import Sequence

from .read import StageRecord
from .text import Html, cut, esc

# prompts that are shown, the letters of one text, and the answers between the first and the last of each prompt
PROMPTS, LETTERS, BETWEEN = 6, 2000, 8


def samples(records: Sequence[StageRecord], labels: Sequence[str]) -> Html:
    """Each prompt with the first and the last answer, and what the held-out row has there."""
    found: dict[str, list[dict[int, str]]] = {}
    references: dict[str, str] = {}
    for place, record in enumerate(records):
        for line in record.samples:
            prompt, answer, step = line.get("prompt"), line.get("answer"), line.get("step")
            if not (isinstance(prompt, str) and isinstance(answer, str) and isinstance(step, int)):
                continue
            found.setdefault(prompt, [{} for _ in records])[place][step] = answer  # the last of a step counts
            if isinstance(line.get("reference"), str):
                references[prompt] = line["reference"]
    parts = [
        _prompt(prompt, answers, references.get(prompt), labels) for prompt, answers in list(found.items())[:PROMPTS]
    ]
    if len(found) > PROMPTS:
        parts.append(Html(f"<p class=aside>and {len(found) - PROMPTS} more prompts in samples.jsonl</p>"))
    return Html("".join(parts))


def _prompt(prompt: str, answers: list[dict[int, str]], reference: str | None, labels: Sequence[str]) -> Html:
    boxes = []
    for told, label in zip(answers, labels):
        who = f"{label}: " if len(answers) > 1 else ""
        if not told:
            continue
        steps = sorted(told)
        first, last = steps[0], steps[-1]
        title = "before training" if first == 0 else f"step {first}"
        if not (len(answers) > 1 and last != first):  # beside each other two runs show what became of them
            boxes.append(_box(f"{who}{title}", told[first]))
        if last != first:
            boxes.append(_box(f"{who}step {last}", told[last]))
    between = ""
    if len(answers) == 1 and len(answers[0]) > 2:
        steps = sorted(answers[0])[1:-1]
        chosen = (
            steps
            if len(steps) <= BETWEEN
            else [steps[round(i * (len(steps) - 1) / (BETWEEN - 1))] for i in range(BETWEEN)]
        )
        inner = "".join(_box(f"step {step}", answers[0][step]) for step in chosen)
        between = f"<details><summary>in between</summary><div class=answers>{inner}</div></details>"
    if reference is not None:
        boxes.append(_box("held-out row", reference, kind="box reference"))
    return Html(
        f"<div class=sample>{_box('prompt', prompt, kind='box prompt')}<div class=answers>{''.join(boxes)}</div>{between}</div>"
    )


def _box(title: str, text: str, *, kind: str = "box") -> str:
    shown = esc(cut(text, LETTERS)) if text.strip() else Html("<i>nothing</i>")
    return f'<div class="{kind}"><h5>{esc(title)}</h5><pre dir=auto>{shown}</pre></div>'
