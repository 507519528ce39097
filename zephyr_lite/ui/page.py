"""The layout of the page: its tabs, and what each button calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ..config.load import preset_configs
from ..errors import UserError
from ..memory.gpus import CARDS, Gpu
from ..monitor.records import Columns
from . import jobs
from .jobs import error_html, errors_on_page, words_of
from .rows import read_rows, show_row, upload
from .talk import Talk

POINTS = 400  # drawn of a curve at most
SECONDS, IDLE = 2.0, 8.0  # between two looks at a run, in training or not
FILES = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"]
# of the charts: title, {metric: the curve's name}
CHARTS: dict[str, dict[str, str]] = {
    "Loss": {"loss": "training", "eval_loss": "held-out"},
    "Accuracy": {
        "mean_token_accuracy": "training",
        "rewards/accuracies": "training",
        "eval_mean_token_accuracy": "held-out",
        "eval_rewards/accuracies": "held-out",
    },
    "Learning rate": {"learning_rate": "training"},
    "Tokens, pairs or answers a second": {f"{unit}_per_second": "training" for unit in ("tokens", "pairs", "answers")},
}
MERGED = "model"  # the usual folder of a merged model
COLORS = {"training": "#10b981", "held-out": "#f59e0b"}
CSS = """
.zl-on {background: rgba(34, 197, 94, .28); border-radius: 2px}
.zl-rejected .zl-on {background: rgba(239, 68, 68, .28)}
.zl-failed {color: #dc2626}
.wrap:has(> .error) {display: none !important}
.mark-line {clip-path: none}
.mark-line path[d$="Z"] {stroke-linecap: round; stroke-width: 8px}
.zl-special {outline: 1px solid rgba(128, 128, 128, .6); border-radius: 2px; font-size: .85em}
.zl-turn {display: grid; grid-template-columns: 6.5em 1fr; gap: .6em; padding: .25em 0}
.zl-turn > div, .zl-answer, .zl-asked {white-space: pre-wrap; overflow-wrap: anywhere}
.zl-columns {display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 1em}
.zl-asked {background: rgba(128, 128, 128, .15); border-radius: 8px; padding: .4em .7em; margin: .6em 0 .3em}
.zl-answer {padding: .2em .7em}
.zl-text textarea {font: 12px/1.45 ui-monospace, monospace; white-space: pre; overflow-x: auto}
@media (max-width: 600px) {
  .zl-turn {grid-template-columns: 1fr; gap: 0}
  .zl-text textarea {white-space: pre-wrap}
  .form > * {min-width: 100% !important}
}
"""


def plan(method: str, preset: str, card: str, details: bool, *fields: str) -> Iterator[str]:
    with errors_on_page():
        words = ["plan", method, *(["--config", preset] if preset else []), *(["--gpu", card] if card else [])]
        for text in jobs.run_command(*words, *["--details"] * details, *words_of(*fields)):
            yield text.replace("details: add --details\n", "")


def look(folder: str | None) -> tuple[Any, ...]:
    """What the tab Train shows of a stage, or of the newest one: its state, the charts, the end of its output, when to
    look again, and the list of stages."""
    columns: Columns = {}
    text, log, running, found = "Nothing was trained here yet.", "", False, jobs.stages()
    if folder := folder or next(iter(found), None):
        try:
            text, columns, log, running = jobs.state_of(Path(folder))
        except UserError as error:
            text = f'<p class="zl-failed">{error_html(error)}</p>'
    charts = (chart(names, columns) for names in CHARTS.values())
    listed = gr.Dropdown(choices=found, value=folder, allow_custom_value=True)
    return text, *charts, log, gr.Timer(SECONDS if running else IDLE), listed


def chart(names: dict[str, str], columns: Columns) -> Any:
    """A chart of metrics {metric: the curve's name}; hidden while there are none."""
    # gradio draws only the curves that it knows when a chart is first shown
    points: list[tuple[int | None, float | None, str]] = [(None, None, name) for name in dict.fromkeys(names.values())]
    empty = len(points)
    for metric, name in names.items():
        steps, values = columns.get(metric, ([], []))
        every = -(-len(steps) // POINTS) or 1
        points += [(step, value, name) for step, value in list(zip(steps, values))[::every]]
    found = len(points) > empty
    return gr.LinePlot(pd.DataFrame(points, columns=["step", "value", "curve"]) if found else None, visible=found)


def presets(method: str, chosen: str = "") -> Any:
    """The list of a method's presets."""
    names = [name for name in preset_configs() if not name.startswith("ablations/") and name.endswith(method)]
    return gr.Dropdown(
        choices=[("none", ""), *names],
        value=chosen if chosen in names else "",
        label="Preset",
        info="none: your own data, or the recipe",
    )


def card_label(card: Gpu) -> str:
    name = card.name.partition("-")[0]
    return f"{'RTX ' * name[0].isdigit()}{name}, {math.ceil(card.memory)} GB"


def build(talk: Talk) -> gr.Blocks:
    """The page.

    Args:
        talk: the model that its tab Chat talks to.
    """

    @errors_on_page()
    def start(method: Any, preset: str, *fields: str) -> str:
        talk.unload()
        return str(jobs.start(method, preset or None, words_of(*fields)))

    @errors_on_page()
    def resume(folder: str | None) -> None:
        talk.unload()
        jobs.resume(Path(folder or ""))

    @errors_on_page()
    def stop(folder: str | None) -> None:
        jobs.stop(Path(folder or ""))
        gr.Info("It finishes the step and writes a checkpoint. Stop once more ends it at once.")

    def talked(note: str = "") -> tuple[str, Any, str]:
        """The conversation, the choices of a vote that it waits for, and what the last one did."""
        return talk.html(), gr.Radio(choices=talk.choices, value=None, visible=bool(talk.choices)), note

    def ask(source: str, *settings: Any) -> Iterator[tuple[str, Any, str]]:
        with errors_on_page():
            for html in talk.ask(source or "", *settings):
                yield html, gr.Radio(visible=False), ""
        yield talked()

    @errors_on_page()
    def vote(choice: str, votes: str) -> tuple[str, Any, str]:
        return talked(talk.vote(choice, votes))

    def restart() -> tuple[str, Any, str]:
        talk.reset()
        return talked()

    def command(*words: str) -> Iterator[str]:
        with errors_on_page():
            jobs.refuse_while_training()
            talk.unload()
            yield from jobs.run_command(*words)

    def merge(run: str, out: str, again: bool) -> Iterator[tuple[str, str]]:
        out = out.strip() or MERGED
        for text in command("merge", *(["--run", run] if run else []), "--out", out, *["--overwrite"] * again):
            yield text, ""
        yield text, f"The merged model is in `{Path(out).absolute()}`."

    def gguf(model: str, kind: str) -> Iterator[tuple[str, str]]:
        model = model.strip() or MERGED
        folder = Path(model).absolute()
        file = folder.with_name(f"{folder.name}-{kind}.gguf")
        for text in command("export", "gguf", model, "--type", kind, "--out", str(file)):
            yield text, ""
        yield text, f"The GGUF file is `{file}`."

    @errors_on_page()
    def lists(*chosen: str | None) -> list[Any]:
        """The lists of complete runs again; what was chosen stays."""
        complete = jobs.runs()
        return [gr.Dropdown(choices=complete, value=old or next(iter(complete), None)) for old in chosen]

    def restore(saved: list[Any] | None) -> list[Any]:
        """The fields as they were before a reload."""
        if saved is None or len(saved) != len(kept):
            return [gr.skip()] * len(kept)
        method, preset, *others = saved
        return [method, presets(method, preset), *others]

    text_box: dict[str, Any] = {"elem_classes": "zl-text", "interactive": False, "buttons": ["copy"]}
    with gr.Blocks(title="zephyr-lite", analytics_enabled=False) as page:
        gr.Markdown("# zephyr-lite")
        rows, timer = gr.State(None), gr.Timer(IDLE)
        saved = gr.BrowserState(storage_key="zephyr-lite", secret="zephyr-lite")
        with gr.Tab("Data"):
            gr.Markdown("Choose the data and the base model, and look at the rows as training sees them.")
            with gr.Row():
                method = gr.Radio(
                    [("SFT: conversations", "sft"), ("DPO: preference pairs", "dpo")], value="sft", label="Method"
                )
                base = gr.Textbox(
                    label="Base model", info="A folder or a hub id", placeholder="mistralai/Mistral-7B-v0.1"
                )
            with gr.Row():
                data = gr.Textbox(
                    label="Data",
                    info="A file (JSONL, JSON, CSV, Parquet), a folder or a hub id",
                    placeholder="the recipe's data",
                )
                held_out = gr.Textbox(
                    label="Held-out data", info="For the held-out loss; by default a part of your data"
                )
            with gr.Row():
                uploaded = gr.UploadButton("Upload a file", file_types=FILES)
                read = gr.Button("Read the data", variant="primary")
            report = gr.Textbox(label="What was read", lines=4, **text_box)
            with gr.Row():
                previous = gr.Button("Previous")
                place = gr.Number(1, label="Conversation or pair", precision=0, minimum=1)
                following = gr.Button("Next")
            row = gr.HTML()
        with gr.Tab("Plan"):
            gr.Markdown("See memory and time before the start. An empty field has its default.")
            with gr.Row():
                preset = presets("sft")
                cards = [(card_label(each), name) for name, each in CARDS.items()]
                card = gr.Dropdown(
                    [("this machine", ""), *cards], value=None, label="Graphics card", info="Empty: this machine"
                )
            with gr.Row():
                numbers = [gr.Textbox(label=key, placeholder="default") for key in jobs.KEYS[4:]]
            more = gr.Textbox(
                label="Other keys", info="key=value, as on the command line", placeholder="lora_r=16 seed=1"
            )
            details = gr.Checkbox(label="Details: memory by part, what was chosen, disk")
            planned = gr.Button("Plan", variant="primary")
            plan_text = gr.Textbox(label="Plan", lines=12, max_lines=40, **text_box)
        with gr.Tab("Train") as train_tab:
            gr.Markdown("Train with the settings of Data and Plan. Training continues when this page is closed.")
            with gr.Row():
                run = gr.Textbox("runs/mine", label="Folder of the run")
                shown = gr.Dropdown([], label="Stage that is shown", allow_custom_value=True)
            with gr.Row():
                started = gr.Button("Start", variant="primary")
                stopped = gr.Button("Stop", variant="stop")
                resumed = gr.Button("Resume")
            state = gr.Markdown()
            axes: dict[str, Any] = {"x": "step", "y": "value", "color": "curve", "y_title": " ", "color_title": " "}
            charts = []
            for titles in (list(CHARTS)[:2], list(CHARTS)[2:]):
                with gr.Row():
                    for title in titles:
                        charts.append(gr.LinePlot(title=title, color_map=COLORS, height=220, visible=False, **axes))
            log = gr.Textbox(label="Output", lines=jobs.LINES, max_lines=jobs.LINES, **text_box)
        with gr.Tab("Chat") as chat_tab:
            gr.Markdown("Ask the base model and the trained ones the same questions. Votes become pairs for DPO.")
            with gr.Row():
                source = gr.Dropdown([], label="Run, or folder of a model", allow_custom_value=True)
                mode = gr.Radio(
                    [("last model", "one"), ("all models", "compare"), ("blind vote", "vote")],
                    value="compare",
                    label="Who answers",
                )
            with gr.Accordion("Settings", open=False), gr.Row():
                temperature = gr.Slider(0, 2, 0.7, label="Temperature")
                longest = gr.Number(512, label="Maximum tokens of an answer", precision=0, minimum=1)
                votes = gr.Textbox("votes.jsonl", label="File of votes")
                stream = gr.Checkbox(True, label="Show answers while they grow")
            conversation = gr.HTML()
            choice = gr.Radio([], label="Which answer is best?", visible=False)
            note = gr.Markdown()
            question = gr.Textbox(
                label="Question", placeholder="Write a question", lines=1, max_lines=8, submit_btn="Ask"
            )
            with gr.Row():
                halt = gr.Button("Stop the answer")
                fresh = gr.Button("New conversation")
        with gr.Tab("Merge and export") as merge_tab:
            gr.Markdown(
                "Write one model folder that transformers loads, then one file for llama.cpp, Ollama or LM Studio."
            )
            with gr.Row():
                merged_run = gr.Dropdown([], label="Run", allow_custom_value=True)
                out = gr.Textbox(MERGED, label="Folder of the merged model")
                again = gr.Checkbox(label="Replace an earlier merge there")
            merged = gr.Button("Merge", variant="primary")
            with gr.Row():
                kind = gr.Radio(["q8_0", "f16", "q4_k_m"], value="q8_0", label="GGUF type")
                exported = gr.Button("Export GGUF", variant="primary")
            result = gr.Markdown()
            output = gr.Textbox(label="Output", lines=12, max_lines=12, **text_box)

        fields = [base, data, held_out, run, *numbers, more]
        # one of these at a time: they take the memory
        alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        uploaded.upload(upload, uploaded, data, api_name="upload")
        read.click(read_rows, [method, preset, *fields], [rows, report, place, row], api_name="rows")
        for button, by in ((previous, -1), (following, 1)):
            button.click(partial(show_row, by=by), [rows, place], [place, row])
        gr.on([place.submit, place.blur], show_row, [rows, place], [place, row])
        method.input(presets, method, preset)
        planned.click(plan, [method, preset, card, details, *fields], plan_text, api_name="plan")
        view = [state, *charts, log, timer, shown]
        hidden: dict[str, Any] = {"show_progress": "hidden"}
        for begun in (
            started.click(start, [method, preset, *fields], shown, api_name="start", **alone),
            resumed.click(resume, shown, api_name="resume", **alone),
        ):
            begun.success(look, shown, view, **hidden)
        stopped.click(stop, shown, api_name="stop")
        gr.on([page.load, timer.tick, shown.change, train_tab.select], look, shown, view, api_name="look", **hidden)
        gr.on(
            [page.load, chat_tab.select, merge_tab.select], lists, [source, merged_run], [source, merged_run], **hidden
        )
        gr.on([page.load, chat_tab.select], talked, None, [conversation, choice, note], **hidden)
        kept = [method, preset, card, details, *fields, mode, temperature, longest, votes, stream, out, kind]
        page.load(restore, saved, kept, **hidden)
        gr.on([field.change for field in kept], None, kept, saved, js="(...values) => [values]")
        settings = [source, mode, question, votes, temperature, longest, stream]
        answered = question.submit(ask, settings, [conversation, choice, note], api_name="ask", **alone)
        # a question that was written meanwhile stays
        answered.success(lambda now: "" if now == talk.asked else gr.skip(), question, question, **hidden)
        halt.click(talk.stop.set)
        fresh.click(restart, None, [conversation, choice, note], **alone)
        choice.input(vote, [choice, votes], [conversation, choice, note], api_name="vote", **alone)
        merged.click(merge, [merged_run, out, again], [output, result], api_name="merge", **alone)
        exported.click(gguf, [out, kind], [output, result], api_name="gguf", **alone)
    return page
