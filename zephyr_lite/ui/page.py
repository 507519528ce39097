"""The page: its tabs, and what each button calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at the import

import gradio as gr
import pandas as pd
from fastapi.responses import HTMLResponse

from ..config.load import preset_configs
from ..errors import UserError
from ..io.run_dir import STAGE_FILE
from ..memory.gpus import CARDS
from ..monitor.report import REPORT, Columns
from . import jobs
from .jobs import errors_on_page, words_of
from .rows import read_rows, show_row, upload
from .talk import Talk

POINTS = 400  # drawn of a curve at most
SECONDS = 2.0  # between two looks at a run
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
    "Tokens or pairs a second": {"tokens_per_second": "training", "pairs_per_second": "training"},
}
COLORS = {"training": "#10b981", "held-out": "#f59e0b"}
CSS = """
.zl-on {background: rgba(34, 197, 94, .28); border-radius: 2px}
.zl-special {outline: 1px solid rgba(128, 128, 128, .6); border-radius: 2px; font-size: .85em}
.zl-turn {display: grid; grid-template-columns: 6.5em 1fr; gap: .6em; padding: .25em 0}
.zl-turn > div, .zl-answer, .zl-asked {white-space: pre-wrap; overflow-wrap: anywhere}
.zl-columns {display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 1em}
.zl-asked {background: rgba(128, 128, 128, .15); border-radius: 8px; padding: .4em .7em; margin: .6em 0 .3em}
.zl-answer {padding: .2em .7em}
.zl-text textarea {font: 12px/1.45 ui-monospace, monospace; white-space: pre; overflow-x: auto}
@media (max-width: 600px) {
  .zl-turn {grid-template-columns: 1fr; gap: 0}
  .form > * {min-width: 100% !important}
}
"""


def plan(method: str, preset: str, card: str, details: bool, *fields: str) -> Iterator[str]:
    with errors_on_page():
        words = ["plan", method, *(["--config", preset] if preset else []), *(["--gpu", card] if card else [])]
        yield from jobs.run_command(*words, *["--details"] * details, *words_of(*fields))


def look(folder: str | None) -> tuple[Any, ...]:
    """What the tab Train shows of a stage: its state, the charts, the end of its output, and whether to look again."""
    columns: Columns = {}
    text, log, running = "Nothing was trained here yet.", "", False
    if folder:
        with errors_on_page():
            text, columns, log, running = jobs.state_of(Path(folder))
    return text, *(chart(names, columns) for names in CHARTS.values()), log, gr.Timer(active=running)


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


def presets(method: str) -> Any:
    """The list of a method's presets."""
    names = [name for name in preset_configs() if name.startswith("zephyr-7b/") and name.endswith(method)]
    return gr.Dropdown(
        choices=[("none", ""), *names], value="", label="Preset", info="none: your own data, or the recipe"
    )


def build(talk: Talk) -> gr.Blocks:
    """The page.

    Args:
        talk: the model that its tab Chat talks to.
    """

    def start(method: Any, preset: str, *fields: str) -> Any:
        with errors_on_page():
            talk.unload()
            folder = str(jobs.start(method, preset or None, words_of(*fields)))
            choices = list(dict.fromkeys([folder, *jobs.stages()]))
            return gr.Dropdown(choices=choices, value=folder), gr.Timer(active=True)

    def resume(folder: str | None) -> Any:
        with errors_on_page():
            talk.unload()
            jobs.resume(Path(folder or ""))
            return gr.Timer(active=True)

    def stop(folder: str | None) -> None:
        with errors_on_page():
            jobs.stop(Path(folder or ""))
            gr.Info("It finishes the step and writes a checkpoint. Stop once more ends it at once.")

    def ask(source: str, *settings: Any) -> Iterator[tuple[str, Any, str]]:
        with errors_on_page():
            for html in talk.ask(source or "", *settings):
                yield html, gr.Radio(visible=False), ""
        count = len(talk.answers)
        choices = [*(str(place + 1) for place in range(count)), "tie", "skip"]
        yield talk.html(), gr.Radio(choices=choices, value=None, visible=count > 0), ""

    def vote(choice: str, votes: str) -> tuple[str, Any, str]:
        with errors_on_page():
            done = talk.vote(choice, votes)
            return talk.html(), gr.Radio(visible=False), done

    def command(*words: str) -> Iterator[str]:
        with errors_on_page():
            jobs.refuse_while_training()
            talk.unload()
            yield from jobs.run_command(*words)

    def merge(run: str, out: str, again: bool) -> Iterator[tuple[str, str]]:
        for text in command("merge", *(["--run", run] if run else []), "--out", out, *["--overwrite"] * again):
            yield text, ""
        yield text, f"The merged model is in `{Path(out).absolute()}`."

    def gguf(model: str, kind: str) -> Iterator[tuple[str, str]]:
        folder = Path(model).absolute()
        file = folder.with_name(f"{folder.name}-{kind}.gguf")
        for text in command("export", "gguf", model, "--type", kind, "--out", str(file)):
            yield text, ""
        yield text, f"The GGUF file is `{file}`."

    def lists(shown: str | None, source: str | None, merged: str | None) -> tuple[Any, ...]:
        """The lists of runs again; what was chosen stays."""
        with errors_on_page():
            found, complete = jobs.stages(), jobs.runs()
        if shown and shown not in found:
            found.insert(0, shown)  # it is starting
        return (
            gr.Dropdown(choices=found, value=shown or next(iter(found), None)),
            *(gr.Dropdown(choices=complete, value=old or next(iter(complete), None)) for old in (source, merged)),
        )

    text_box: dict[str, Any] = {"elem_classes": "zl-text", "interactive": False, "buttons": ["copy"]}
    default = "default"
    with gr.Blocks(title="zephyr-lite", analytics_enabled=False) as page:
        gr.Markdown("# zephyr-lite")
        rows, timer = gr.State(None), gr.Timer(SECONDS, active=False)
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
                card = gr.Dropdown([("this machine", ""), *CARDS], value="", label="Graphics card")
            with gr.Row():
                rate = gr.Textbox(label="learning_rate", placeholder=default)
                epochs = gr.Textbox(label="num_train_epochs", placeholder=default)
                batch = gr.Textbox(label="batch_size", placeholder=default)
                length = gr.Textbox(label="max_length", placeholder=default)
            more = gr.Textbox(
                label="Other keys", info="key=value, as on the command line", placeholder="lora_r=16 seed=1"
            )
            details = gr.Checkbox(label="Details: memory by part, what was chosen, disk")
            planned = gr.Button("Plan", variant="primary")
            plan_text = gr.Textbox(label="Plan", lines=12, max_lines=40, **text_box)
        with gr.Tab("Train") as train_tab:
            gr.Markdown("Train with the settings of Data and Plan. Training goes on when this page is closed.")
            with gr.Row():
                run = gr.Textbox("runs/mine", label="Folder of the run")
                shown = gr.Dropdown([], label="Stage that is shown", allow_custom_value=True)
            with gr.Row():
                started = gr.Button("Start", variant="primary")
                stopped = gr.Button("Stop", variant="stop")
                resumed = gr.Button("Resume")
            state = gr.Markdown()
            charts = []
            for titles in (list(CHARTS)[:2], list(CHARTS)[2:]):
                with gr.Row():
                    for title in titles:
                        plot = gr.LinePlot(
                            x="step",
                            y="value",
                            color="curve",
                            color_map=COLORS,
                            title=title,
                            y_title=" ",
                            color_title=" ",
                            height=220,
                            visible=False,
                        )
                        charts.append(plot)
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
                out = gr.Textbox("model", label="Folder of the merged model")
                again = gr.Checkbox(label="Replace an earlier merge there")
            merged = gr.Button("Merge", variant="primary")
            with gr.Row():
                kind = gr.Radio(["q8_0", "f16", "q4_k_m"], value="q8_0", label="GGUF type")
                exported = gr.Button("Export GGUF", variant="primary")
            result = gr.Markdown()
            output = gr.Textbox(label="Output", lines=12, max_lines=12, **text_box)

        fields = [base, data, held_out, rate, epochs, batch, length, more, run]
        # one of these at a time: they take the memory
        alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        uploaded.upload(upload, uploaded, data, api_name="upload")
        read.click(read_rows, [method, preset, *fields], [rows, report, place, row], api_name="rows")
        for button, by in ((previous, -1), (following, 1)):
            button.click(lambda rows, place, by=by: show_row(rows, place + by), [rows, place], [place, row])
        place.submit(show_row, [rows, place], [place, row])
        method.change(presets, method, preset)
        planned.click(plan, [method, preset, card, details, *fields], plan_text, api_name="plan")
        view = [state, *charts, log, timer]
        started.click(start, [method, preset, *fields], [shown, timer], api_name="start", **alone)
        resumed.click(resume, shown, timer, api_name="resume", **alone)
        stopped.click(stop, shown, api_name="stop")
        for event in (timer.tick, shown.change, train_tab.select):
            event(look, shown, view, show_progress="hidden", api_name="look")
        for load in (page.load, train_tab.select, chat_tab.select, merge_tab.select):
            load(lists, [shown, source, merged_run], [shown, source, merged_run], show_progress="hidden")
        settings = [source, mode, question, votes, temperature, longest, stream]
        answered = question.submit(ask, settings, [conversation, choice, note], api_name="ask", **alone)
        answered.success(lambda: "", None, question)
        halt.click(talk.stop.set)
        fresh.click(lambda: (talk.reset(), gr.Radio(visible=False), ""), None, [conversation, choice, note], **alone)
        choice.input(vote, [choice, votes], [conversation, choice, note], api_name="vote", **alone)
        merged.click(merge, [merged_run, out, again], [output, result], api_name="merge", **alone)
        exported.click(gguf, [out, kind], [output, result], api_name="gguf", **alone)
    return page


def open_page(port: int, browser: bool) -> tuple[gr.Blocks, str]:
    """Serve the page on this machine; returns it and its address.

    Args:
        port: of the page.
        browser: open it in the default browser.

    Raises:
        UserError: the port is taken.
    """
    page = build(Talk())
    theme = gr.themes.Default(
        primary_hue="emerald", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        app, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            theme=theme,
            css=CSS,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise UserError(f"port {port} is taken.", f"Choose another one: --port {port + 1}") from None

    def report(stage: str) -> HTMLResponse:
        file = Path(stage) / REPORT
        found = (file.parent / STAGE_FILE).is_file() and file.is_file()
        return HTMLResponse(file.read_text(encoding="utf-8") if found else "no report", 200 if found else 404)

    app.add_api_route("/report", report)
    return page, address


def serve(port: int, browser: bool, say: Any) -> None:
    """Serve the page until Ctrl-C.

    Args:
        say: prints a line.
    """
    page, address = open_page(port, browser)
    say(f"The page is {address} (on this machine only). Ctrl-C ends it.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
        for run in jobs.in_training():
            say(f"{run} is still being trained; `zephyr-lite ui` shows it again.")
