"""``zephyr-lite chat``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Console, visible
from .options import AdapterBase, Adapters, ChatTemplateOption, Source, StageName, Verbose

if TYPE_CHECKING:
    from ..chat.session import Session

console = Console()


def chat(
    source: Source = None,
    stage: StageName = None,
    adapter: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="base, sft, dpo …; with --compare several \\[the one that was trained last]."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask all models, base first, from the one loaded base.")
    ] = False,
    vote: Annotated[
        Path | None,
        typer.Option(
            "--vote", help="With --compare: hide whose answer is whose, and add your choices as pairs to FILE."
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Instead of talking: a file of prompts to answer, in batches.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="With --prompts: the JSONL file to write.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="With --prompts: prompts at a time.")] = 8,
    system: Annotated[
        str | None, typer.Option("--system", help="The system turn; '' for none \\[the one that training used].")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens of this probability.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="An answer's length at most.")] = 512,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws; the same gives the same answers.")] = 0,
    verbose: Verbose = False,
) -> None:
    """Talk to what was trained. A prompt on stdin is answered on stdout."""
    terminal = in_terminal()
    _check_options(compare, vote, model or [], prompts, out, terminal)
    question = "" if terminal or prompts is not None else _prompt_on_stdin()

    from ..chat.session import Session, Settings, trained_system

    settings = Settings(temperature, top_p, max_new_tokens, seed, system)
    settings.check()
    say = console.say if terminal or prompts is not None else console.complain

    if vote is not None:
        from ..chat.rows import check_file

        check_file(vote, "dpo", "--vote")  # before anything is loaded
    asked: list[str] = []
    if prompts is not None:
        from ..recipe.questions import read_questions

        asked = read_questions(prompts)

    from ..chat import Chat
    from ..model.loaded import open_live

    live = open_live(source, stage=stage, adapters=adapter or [], base=base, chat_template=chat_template, say=say)
    talker = Chat(live)
    if system is None:
        settings.system = trained_system(talker)
        if settings.system is not None:
            say(f"note: the system turn of training is used: {settings.system}")
    models = model or (list(live.models) if compare else [live.policy])
    if compare and len(models) < 2:
        from ..errors import UserError

        raise UserError(
            f"--compare: {live.source} is one model, {models[0]}; there is nothing beside it.",
            "Give a run's folder (its base and stages are compared), or leave --compare out.",
        )
    session = Session(talker, models, settings)
    if prompts is not None and out is not None:
        from .talk_batch import answer_all

        answer_all(session, asked, out, batch_size, say)
    elif not terminal:
        _answer_once(session, question, say)
    else:
        from ..chat.vote import Ballot
        from .talk_loop import Talk

        Talk(session, console, compare, Ballot(vote, seed, live.source) if vote is not None else None).run()


def in_terminal() -> bool:
    """Whether somebody types and reads."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _check_options(
    compare: bool, vote: Path | None, models: list[str], prompts: str | None, out: Path | None, terminal: bool
) -> None:
    """Raises UserError: options that do not go together."""
    from ..errors import UserError

    if len(models) > 1 and not compare:
        raise UserError("--model is given more than once.", "Add --compare to ask several models.")
    if len(set(models)) < len(models):
        raise UserError("--model names the same model twice.", "Name each once.")
    if vote is not None and not compare:
        raise UserError("--vote needs answers to choose from.", "Add --compare.")
    if vote is not None and (prompts is not None or not terminal):
        raise UserError("--vote asks somebody, in a terminal.", "Start it in one, with neither --prompts nor a pipe.")
    if (prompts is None) != (out is None):
        raise UserError("--prompts FILE and --out FILE go together.", "Give both, or neither to talk.")
    if out is not None:
        if out.exists():
            raise UserError(f"--out {out}: is there already.", "Choose another file, or move that one away.")
        if not out.parent.is_dir():
            raise UserError(f"--out {out}: there is no folder {out.parent}.", "Make it first.")


def _prompt_on_stdin() -> str:
    """Raises UserError: nothing on stdin, or no text."""
    from ..errors import UserError

    if sys.stdin is not None and sys.stdin.isatty():
        console.complain("Write the prompt; Ctrl-D on a line of its own ends it.")
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if sys.stdin is not None else ""  # None: it was closed
    except UnicodeDecodeError:
        raise UserError("the prompt on stdin is not UTF-8.", "Convert it first (iconv -t utf-8).") from None
    if not text.strip():
        raise UserError(
            "there is no prompt on stdin.", "echo 'Name three rivers.' | zephyr-lite chat, or start it in a terminal."
        )
    return text.strip("\n")


def _answer_once(session: Session, question: str, say: Callable[[str], None]) -> None:
    """The answer on stdout and nothing else; with --compare each under its model's name."""
    from ..errors import Interrupted
    from ..io.interrupts import StopRequest
    from .talk_screen import ended

    write, alone = console.out.file.write, len(session.columns) == 1

    def on_text(column: int, piece: str) -> None:
        if alone:
            write(visible(piece))
            console.out.file.flush()

    with StopRequest(None) as stop:
        answers = session.ask(question, on_text, lambda: stop.name is not None)
    for column, answer in zip(session.columns, answers):
        write("\n" if alone else f"## {column.model}\n\n{visible(answer.text)}\n\n")
        if (how := ended(answer.finish, answer.tokens)) and stop.name is None:
            say(f"note: {'' if alone else column.model + ': '}{how}")
    console.out.file.flush()
    if stop.name is not None:
        raise Interrupted("interrupted; the answer ends where it was")
