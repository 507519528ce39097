"""``zephyr-lite export``: the merged model as a GGUF file, for Ollama, with a card, on the hub."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..monitor.console import Console
from .options import ChatTemplateOption, Verbose, nameable

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The model's folder, as merge made it.")]


class GgufType(StrEnum):
    """What a GGUF file's matrices are stored in."""

    f16 = "f16"
    q8_0 = "q8_0"
    q4_k_m = "q4_k_m"


def gguf(
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--out", callback=nameable, help="The file \\[NAME-TYPE.gguf beside the folder].")
    ] = None,
    kind: Annotated[
        GgufType,
        typer.Option("--type", help="f16: as it is. q8_0: half of that. q4_k_m: a third, by llama.cpp's quantizer."),
    ] = GgufType.q8_0,
    llama_quantize: Annotated[
        Path | None, typer.Option("--llama-quantize", help="llama.cpp's program, if it is not on PATH.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare prompt ids with llama.cpp's, if that is installed.")
    ] = True,
    verbose: Verbose = False,
) -> None:
    """Write the model with tokenizer and chat template as one GGUF file for llama.cpp, Ollama, LM Studio …"""
    if llama_quantize is not None and kind is not GgufType.q4_k_m:
        raise UserError("--llama-quantize goes with --type q4_k_m.", "Leave it out: F16 and Q8_0 are written here.")
    from ..export.gguf import model_folder, write_gguf
    from ..export.llama import check_prompts, write_q4_k_m

    console = Console()
    folder = model_folder(model)
    file = out or folder.resolve().with_name(f"{folder.resolve().name}-{kind}.gguf")
    if kind is GgufType.q4_k_m:
        report = write_q4_k_m(folder, file, llama_quantize=llama_quantize)
    else:
        report = write_gguf(folder, file, "f16" if kind is GgufType.f16 else "q8_0")
    for line in report.lines():
        console.say(line)
    if check:
        console.say(check_prompts(folder, file))
    console.say(f"Next: zephyr-lite export ollama {shlex.quote(str(model))} --gguf {shlex.quote(str(file))}")


def ollama(
    model: Model,
    gguf: Annotated[Path, typer.Option("--gguf", help="The model's GGUF file.")],
    out: Annotated[Path, typer.Option("--out", callback=nameable, help="The Modelfile.")] = Path("Modelfile"),
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=2.0, help="Ollama's default.")] = 0.7,
    chat_template: ChatTemplateOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing Modelfile.")] = False,
    verbose: Verbose = False,
) -> None:
    """Write an Ollama Modelfile for a GGUF file: the chat template in Go's language, and the stop tokens."""
    from ..export.ollama import write_modelfile

    console = Console()
    written = write_modelfile(
        model, gguf, out, temperature=temperature, chat_template=chat_template, overwrite=overwrite
    )
    for line in written:
        console.say(line)


def card(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder that merge made: a model, or an adapter (--adapter-only).")
    ],
    run: Annotated[Path | None, typer.Option("--run", help="The run's folder, if the run was moved.")] = None,
    license: Annotated[
        str | None,
        typer.Option("--license", help="License id of the hub, such as apache-2.0 \\[the base's]."),
    ] = None,
    plots: Annotated[
        bool | None, typer.Option("--plots/--no-plots", help="Training curves \\[if matplotlib is installed].")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a README.md that zephyr-lite did not write.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Write a model card, README.md: base, data, lineage, settings, evaluation results, and how to load it."""
    from ..evaluate.plotting import need_matplotlib
    from ..export.model_card import write_card
    from ..export.vllm import check_model

    if plots:
        need_matplotlib("the curves", "--no-plots")
    console = Console()
    written = write_card(model, run=run, license=license, plots=plots, overwrite=overwrite)
    console.say(f"written to {written}")
    for fault in check_model(model) if (model / "config.json").is_file() else []:
        console.say(f"note: for servers: {fault}")


def push(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that merge made.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; created if needed.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private repository.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload; without this the files are only listed.")] = False,
    verbose: Verbose = False,
) -> None:
    """Publish a model's folder on the Hugging Face hub; lists what would be uploaded unless --yes is given."""
    from ..export.push import prepare
    from ..export.push import push as upload_files

    console = Console()
    upload = prepare(model, repo)
    for line in upload.lines():
        console.say(line)
    if yes:
        upload_files(upload, private=private)
    else:
        console.say("Nothing was uploaded. Add --yes to do it.")
