"""``zephyr-lite merge``, ``export``, ``check`` and ``report``: what is made of a trained model, and checks of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Context, Exit, Option

from ..errors import UserError
from .options import AdapterBase, Adapters, ChatTemplateOption, console, next_lines, say_all

Model = Annotated[Path, Argument(metavar="MODEL", help="The model's folder, as merge made it.")]


def merge(
    out: Annotated[Path, Option(help="Model folder to write.")],
    run: Annotated[Path | None, Option(help="A run's folder; the newest one by default.")] = None,
    stage: Annotated[str | None, Option(help="The run's stage; the last complete one by default.")] = None,
    onto: Annotated[
        Literal["base", "nf4"] | None,
        Option(
            help="base: the 16-bit weights. nf4: the 4-bit weights of training, dequantized "
            "\\[the better one on the run's rows]."
        ),
    ] = None,
    adapter: Adapters = None,
    base: AdapterBase = None,
    adapter_only: Annotated[
        bool, Option("--adapter-only", help="Write the chain as one PEFT adapter, as for vLLM, instead of a model.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier merge in the folder.")] = False,
    check: Annotated[bool, Option(help="Compare the merged model with the trained one on held-out rows.")] = True,
    measure: Annotated[bool, Option("--measure", help="Measure the way that is not kept, too.")] = False,
    rows: Annotated[int | None, Option(min=1, help="Held-out rows to compare on \\[64; 8 with --onto].")] = None,
    model_card: Annotated[bool, Option("--card/--no-card", help="Write a model card, README.md.")] = True,
    push_to_hub: Annotated[str | None, Option(help="OWNER/NAME: upload the folder to the hub at the end.")] = None,
    private: Annotated[bool, Option("--private", help="With --push-to-hub: a private repository.")] = False,
) -> None:
    """Merge the adapters of a run into one model folder that plain transformers loads. `chat` and `eval` need no merge."""
    from ..export.model_card import CARD, write_card
    from ..export.push import prepare
    from ..export.push import push as upload
    from ..io.redact import refuse_secrets
    from ..io.sync import check_repo
    from ..merge.command import run_merge
    from ..merge.weights import MARK

    if push_to_hub is not None:
        check_repo(push_to_hub)  # before hours of work
    elif private:
        raise UserError("--private goes with --push-to-hub.", "Say where to: --push-to-hub OWNER/NAME --private")
    # where a model comes from is written into its files
    given = {"--out": str(out), "--run": str(run or ""), "--adapter": adapter or [], "--base": base or ""}
    refuse_secrets(given, "the command line")
    run_merge(
        out,
        run=run,
        stage=stage,
        adapters=adapter or [],
        base=base,
        onto=onto,
        as_adapter=adapter_only,
        overwrite=overwrite,
        check=check,
        both=measure,
        rows=rows,
    )
    card, mark = out / CARD, out / MARK
    if model_card and not (card.is_file() and card.stat().st_mtime_ns >= mark.stat().st_mtime_ns):
        console.say(f"model card: {write_card(out)}")
    if push_to_hub is not None:
        chosen = prepare(out, push_to_hub)
        say_all(chosen.lines())
        upload(chosen, private=private)
    if adapter_only:
        console.say(next_lines(["chat", "--adapter", str(out)]))
    else:
        console.say(next_lines(["chat", str(out)], ["export", "gguf", str(out), "--type", "q8_0"]))


def gguf(
    model: Model,
    out: Annotated[Path | None, Option(help="The file \\[NAME-TYPE.gguf beside the folder].")] = None,
    kind: Annotated[
        Literal["f16", "q8_0", "q4_k_m"],
        Option("--type", help="f16: as it is. q8_0: half of that. q4_k_m: a third, by llama.cpp's quantizer."),
    ] = "q8_0",
    llama_quantize: Annotated[Path | None, Option(help="llama.cpp's program, if it is not on PATH.")] = None,
    check: Annotated[bool, Option(help="Compare prompt ids with llama.cpp's, if that is installed.")] = True,
) -> None:
    """Write the model with tokenizer and chat template as one GGUF file for llama.cpp, Ollama, LM Studio …"""
    if llama_quantize is not None and kind != "q4_k_m":
        raise UserError("--llama-quantize goes with --type q4_k_m.", "Leave it out: F16 and Q8_0 are written here.")
    from ..export.gguf import model_folder, write_gguf
    from ..export.llama import check_prompts, write_q4_k_m

    folder = model_folder(model)
    file = out or folder.resolve().with_name(f"{folder.resolve().name}-{kind}.gguf")
    if kind == "q4_k_m":
        report = write_q4_k_m(folder, file, llama_quantize=llama_quantize)
    else:
        report = write_gguf(folder, file, kind)
    say_all(report.lines())
    if check:
        console.say(check_prompts(folder, file))
    console.say(next_lines(["export", "ollama", str(model), "--gguf", str(file)]))


def ollama(
    model: Model,
    gguf: Annotated[Path, Option(help="The model's GGUF file.")],
    out: Annotated[Path, Option(help="The Modelfile.")] = Path("Modelfile"),
    temperature: Annotated[float, Option(min=0.0, max=2.0, help="Ollama's default.")] = 0.7,
    chat_template: ChatTemplateOption = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Overwrite an existing Modelfile.")] = False,
) -> None:
    """Write an Ollama Modelfile for a GGUF file: the chat template in Go's language, and the stop tokens."""
    from ..export.ollama import write_modelfile

    say_all(
        write_modelfile(model, gguf, out, temperature=temperature, chat_template=chat_template, overwrite=overwrite)
    )


def card(
    model: Annotated[
        Path, Argument(metavar="MODEL", help="A folder that merge made: a model, or an adapter (--adapter-only).")
    ],
    run: Annotated[Path | None, Option(help="The run's folder, if the run was moved.")] = None,
    license: Annotated[str | None, Option(help="License id of the hub, such as apache-2.0 \\[the base's].")] = None,
    plots: Annotated[bool | None, Option(help="Training curves \\[if matplotlib is installed].")] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace a README.md that zephyr-lite did not write.")
    ] = False,
) -> None:
    """Write a model card, README.md: base, data, lineage, settings, evaluation results, and how to load it."""
    from ..evaluate.results import need_matplotlib
    from ..export.model_card import write_card

    if plots:
        need_matplotlib("the curves", "--no-plots")
    written = write_card(model, run=run, license=license, plots=plots, overwrite=overwrite)
    console.say(f"written to {written}")


def push(
    model: Annotated[Path, Argument(metavar="MODEL", help="A folder that merge made.")],
    repo: Annotated[str, Argument(metavar="OWNER/NAME", help="Repository on the hub; created if needed.")],
    private: Annotated[bool, Option("--private", help="Make it a private repository.")] = False,
    yes: Annotated[bool, Option("--yes", help="Upload; without this the files are only listed.")] = False,
) -> None:
    """Publish a model's folder on the Hugging Face hub; lists what would be uploaded unless --yes is given."""
    from ..export.push import prepare
    from ..export.push import push as upload_files

    upload = prepare(model, repo)
    say_all(upload.lines())
    if yes:
        upload_files(upload, private=private)
    else:
        console.say("Nothing was uploaded. Add --yes to do it.")


def check(
    ctx: Context,
    adapter: Annotated[str, Argument(help="A PEFT adapter of any tool (folder or hub id), or a stage's folder.")],
    base: Annotated[str | None, Option(help="Base model, instead of the one that the adapter names.")] = None,
    below: Annotated[list[str] | None, Option(help="Adapter below it; repeat for the next one up.")] = None,
    start: Annotated[str | None, Option(help="Adapter that it was continued from, and therefore contains.")] = None,
    reference: Annotated[
        str, Option(help="DPO's reference: start (what it started from), base, or an adapter.")
    ] = "start",
    rows: Annotated[str | None, Option(help="Conversations for the measurements: a file or hub id.")] = None,
    pairs: Annotated[str | None, Option(help="Preference pairs, to measure DPO's loss at step 0.")] = None,
    beta: Annotated[float | None, Option(min=1e-9, help="β of DPO \\[its own, or 0.1].")] = None,
    chat_template: Annotated[str | None, Option(help="Chat template, instead of the saved one.")] = None,
    limit: Annotated[int, Option(min=2, help="Number of rows, and of pairs.")] = 16,
    load_in_4bit: Annotated[
        bool | None, Option("--4bit/--16bit", help="Precision of the base \\[as in training; else 4 bits].")
    ] = None,
    files_only: Annotated[bool, Option("--files-only", help="Check the files only; load no model.")] = False,
    out: Annotated[Path | None, Option(help="Also write the findings as JSON.")] = None,
) -> None:
    """Audit an adapter: what belongs below it, its reference, BOS, the end token, its template. Exit code 2: wrong."""
    from ..audit.files import Level
    from ..audit.run import audit
    from ..io.atomic import make_folder, write_json

    if out is not None:  # before anything is measured
        if out.is_dir():
            raise UserError(f"--out {out}: is a folder.", "Name a file, such as check.json.")
        make_folder(out.parent)
    found = audit(**{name: value for name, value in ctx.params.items() if name != "out"})
    signs = {Level.right: "ok", Level.note: "note", Level.doubtful: "DOUBTFUL", Level.wrong: "WRONG"}
    console.heading(f"{found.adapter}: by {found.tool}, {found.method or 'method unknown'}")
    for finding in found.findings:
        console.say(f"{signs[finding.level]:>8}  {finding.topic}: {finding.text}")
        say_all(f"{'':>10}{line}" for line in finding.evidence)
        if finding.advice:
            console.say(f"{'':>10}→ {finding.advice}")
    if found.not_checked:
        console.say(f"not checked: {', '.join(found.not_checked)}")
    console.say(f"verdict: {found.verdict()}")
    if out is not None:
        write_json(out, found.as_dict())
        console.say(f"written: {out}")
    if found.level == Level.wrong:
        raise Exit(2)


def report(
    source: Annotated[
        Path | None, Argument(help="runs/NAME, or runs/NAME/STAGE for one stage of it; the newest run by default.")
    ] = None,
    other: Annotated[Path | None, Argument(help="A second one, to compare with.")] = None,
    out: Annotated[
        Path | None,
        Option(help="The file to write; by default report.html in that folder, or report-A-B.html here."),
    ] = None,
) -> None:
    """Write report.html of a run, or of two runs side by side: curves, answers, rows, memory, configuration, lineage."""
    from ..io.atomic import write_text
    from ..monitor.records import read_source
    from ..monitor.report import MARK, REPORT, run_page, side_by_side

    def name(place: Path | None) -> str:
        whole = (place or Path()).expanduser().absolute()
        return f"{whole.parent.name}-{whole.name}" if (whole / "stage.json").is_file() else whole.name

    first = read_source(source)
    if other is None:
        target = out or (source.expanduser() if source else first[0].folder.parent) / REPORT
        page = run_page(first)
    else:
        page = side_by_side(first, read_source(other))
        target = out or Path(f"report-{name(source)}-{name(other)}.html")
    if target.is_dir():
        raise UserError(f"--out {target}: is a folder.", f"Name the file: --out {target / 'report.html'}")
    if target.exists() and MARK.encode() not in target.read_bytes()[:200]:
        raise UserError(f"{target}: exists and is not a report of zephyr-lite.", "Choose another --out.")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page)
    console.say(f"{target} ({len(page.encode('utf-8', 'replace')) / 2**10:.0f} KiB); open it in a browser.")
