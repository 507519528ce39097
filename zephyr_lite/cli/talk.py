"""``zephyr-lite chat``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Interrupted, UserError
from ..io.logging import messages_to
from ..monitor.console import Console, visible
from .options import AdapterBase, Adapters, ChatTemplateOption, Source, StageName, Verbose

logger = logging.getLogger(__name__)

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
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Maximum length of an answer.")] = 512,
    seed: Annotated[int, typer.Option("--seed", help="Random seed.")] = 0,
    verbose: Verbose = False,
) -> None:
    """Talk to a trained model. A prompt on stdin is answered on stdout."""
    terminal = in_terminal()
    _check_options(compare, vote, model or [], prompts, out, terminal)
    question = "" if terminal or prompts is not None else _prompt_on_stdin()

    from ..chat.rows import check_file
    from ..chat.session import Session, Settings, trained_system

    settings = Settings(temperature, top_p, max_new_tokens, seed, system)
    settings.check()
    to_stdout = terminal or prompts is not None  # a single answer is alone on standard output
    with messages_to(console.log if to_stdout else lambda record: console.complain(record.getMessage())):
        if vote is not None:
            check_file(vote, "dpo", "--vote")  # before anything is loaded
        asked: list[str] = []
        if prompts is not None:
            from ..recipe.questions import read_questions

            asked = read_questions(prompts)

        from ..chat import Chat
        from ..model.loaded import open_live

        live = open_live(source, stage=stage, adapters=adapter or [], base=base, chat_template=chat_template)
        talker = Chat(live)
        if system is None:
            settings.system = trained_system(talker)
            if settings.system is not None:
                logger.info(f"note: the system turn of training is used: {settings.system}")
        models = model or (list(live.models) if compare else [live.policy])
        if compare and len(models) < 2:
            raise UserError(
                f"--compare: {live.source} is one model, {models[0]}; there is nothing to compare it with.",
                "Give a run's folder (its base and stages are compared), or leave --compare out.",
            )
        session = Session(talker, models, settings)
        if out is not None:
            _answer_all(session, asked, out, batch_size)
        elif not terminal:
            _answer_once(session, question)
        else:
            from ..chat.repl import Repl
            from ..chat.vote import Ballot

            Repl(session, console, compare, Ballot(vote, seed, live.source) if vote is not None else None).run()


def in_terminal() -> bool:
    """Whether a user types and reads."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _check_options(
    compare: bool, vote: Path | None, models: list[str], prompts: str | None, out: Path | None, terminal: bool
) -> None:
    """Raises UserError: options that do not go together."""
    if len(models) > 1 and not compare:
        raise UserError("--model is given more than once.", "Add --compare to ask several models.")
    if len(set(models)) < len(models):
        raise UserError("--model names the same model twice.", "Name each once.")
    if vote is not None and not compare:
        raise UserError("--vote needs answers to choose from.", "Add --compare.")
    if vote is not None and (prompts is not None or not terminal):
        raise UserError("--vote needs a terminal.", "Start it in one, with neither --prompts nor a pipe.")
    if (prompts is None) != (out is None):
        raise UserError("--prompts FILE and --out FILE go together.", "Give both, or neither to talk.")
    if out is not None:
        if out.exists():
            raise UserError(f"--out {out}: is there already.", "Choose another file, or move that one away.")
        if not out.parent.is_dir():
            raise UserError(f"--out {out}: there is no folder {out.parent}.", "Make it first.")


def _prompt_on_stdin() -> str:
    """Raises UserError: stdin is empty, or not text."""
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


def _answer_once(session: Session, question: str) -> None:
    """Print the answer on stdout and nothing else; with --compare each under its model's name."""
    from ..chat.repl import ended
    from ..io.interrupts import StopRequest

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
            console.complain(f"note: {'' if alone else column.model + ': '}{how}")
    console.out.file.flush()
    if stop.name is not None:
        raise Interrupted("interrupted; the answer ends where it was")


def _answer_all(session: Session, prompts: list[str], out: Path, batch: int) -> None:
    """Answer every prompt with every model of the session; each batch is in the file as soon as it is answered.

    A row: ``messages`` (the training schema), ``model``, ``finish_reason``, and ``prompt_number`` (from 1). A prompt that
    cannot be asked is named, counted, and left out.

    Raises:
        UserError: not one of the prompts can be asked.
        Interrupted: Ctrl-C; the answers so far are in the file.
    """
    from ..chat.rows import append_rows
    from ..io.interrupts import StopRequest
    from ..io.text import short
    from ..model.sampling import Sampling

    how = session.settings
    head = [{"role": "system", "content": how.system}] if how.system else []
    conversations = [[*head, {"role": "user", "content": prompt}] for prompt in prompts]
    usable: list[tuple[int, Any, Sampling]] = []
    for place, messages in enumerate(conversations):
        try:
            ids = session.prompt_ids(messages)
            seed = how.seed * 1_000_003 + place
            usable.append((place, ids, Sampling(session.room(len(ids)), how.temperature, how.top_p, seed)))
        except UserError as error:
            console.say(f"note: prompt {place + 1} ({short(prompts[place], 60)}) is left out: {error.message}")
    if not usable:
        raise UserError("none of the prompts can be asked.", "See why above.")
    done = cut = count = 0
    with StopRequest("the current batch is dropped") as stop:
        for start in range(0, len(usable), batch):
            places, ids_of, sampling = zip(*usable[start : start + batch])
            rows = []
            for column in session.columns:
                answers = session.chat.sample(
                    ids_of,
                    sampling,
                    adapters=session.chat.live.models[column.model],
                    stop=lambda: stop.name is not None,
                )
                rows += [
                    {
                        "messages": [*conversations[place], {"role": "assistant", "content": answer.text}],
                        "model": column.model,
                        "finish_reason": answer.finish_reason,
                        "prompt_number": place + 1,
                    }
                    for place, answer in zip(places, answers)
                ]
            if stop.name is not None:
                raise Interrupted(f"interrupted; the answers to {done:,} of {len(prompts):,} prompts are in {out}")
            append_rows(out, rows)
            done, count = done + len(places), count + len(rows)
            cut += sum(row["finish_reason"] == "length" for row in rows)
            console.say(f"{done:,} of {len(usable):,} prompts answered")
    if cut:
        console.say(f"note: {cut:,} answers were cut at their length; --max-new-tokens allows more")
    refused = len(prompts) - len(usable)
    console.say(f"{count:,} answers are in {out}{f'; {refused:,} prompts were left out' if refused else ''}")
