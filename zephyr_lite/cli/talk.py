"""``zephyr-lite chat``, ``serve`` and ``ui``."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Option

from ..errors import Interrupted, UserError, optional
from ..io.logging import messages_to
from ..monitor.console import visible
from .eval import open_model
from .options import AdapterBase, Adapters, ChatTemplateOption, Source, StageName, TemplateKwargs, console

if TYPE_CHECKING:
    from ..chat.session import Session, Settings


def chat(
    ctx: Context,
    source: Source = None,
    stage: StageName = None,
    adapters: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    chat_template_kwargs: TemplateKwargs = None,
    model: Annotated[
        list[str] | None,
        Option(help="base, sft, dpo …; several are compared \\[the one that was trained last]."),
    ] = None,
    compare: Annotated[
        bool, Option("--compare", help="Ask all models of the run at once: its base and every stage.")
    ] = False,
    vote: Annotated[
        Path | None,
        Option(help="As --compare, without names; your choices are added to this file as preference pairs."),
    ] = None,
    prompts: Annotated[str | None, Option(help="Answer a file of prompts in batches, instead of a session.")] = None,
    out: Annotated[Path | None, Option(help="With --prompts: the JSONL file to write.")] = None,
    batch_size: Annotated[int, Option(min=1, help="With --prompts: prompts at a time.")] = 8,
    system: Annotated[str | None, Option(help="The system turn; '' for none \\[the one that training used].")] = None,
    temperature: Annotated[float, Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, Option(help="Draw from the likeliest tokens of this probability.")] = 0.95,
    max_new_tokens: Annotated[int, Option(help="Maximum length of an answer.")] = 512,
    seed: Annotated[int, Option(help="Random seed.")] = 0,
) -> None:
    """Talk to a trained model, or compare the models of a run. A prompt on stdin is answered on stdout."""
    terminal = in_terminal()
    if vote is not None and (prompts is not None or not terminal):
        raise UserError("--vote needs a terminal to ask you.", "Leave --prompts, a pipe and a redirection out.")
    compare = ctx.params["compare"] = compare or vote is not None or len(model or []) > 1
    if (prompts is None) != (out is None):
        raise UserError("--prompts FILE and --out FILE go together.", "Give both, or neither to talk.")
    if out is not None and (out.exists() or not out.parent.is_dir()):
        problem = "is there already" if out.exists() else f"there is no folder {out.parent}"
        raise UserError(f"--out {out}: {problem}.", "Choose another file.")
    question = "" if terminal or prompts is not None else _prompt_on_stdin()

    from ..chat.rows import check_file
    from ..chat.session import Settings
    from ..recipe.prompts import read_questions

    settings = Settings().changed(
        temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed, system=system
    )
    if vote is not None:
        check_file(vote, "chosen", "--vote")  # before anything is loaded
    if prompts is not None and out is not None:
        asked = read_questions(prompts)
        _answer_all(_session(ctx, settings), asked, out, batch_size)
    elif not terminal:
        with messages_to(lambda record: console.complain(record.getMessage())):
            session = _session(ctx, settings)
        _answer_once(session, question)
    else:
        from ..chat.repl import Repl

        Repl(_session(ctx, settings), console, compare, vote).run()


def serve(
    ctx: Context,
    source: Source = None,
    stage: StageName = None,
    adapters: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    chat_template_kwargs: TemplateKwargs = None,
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0: every network of this machine.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
) -> None:
    """Answer other programs: the OpenAI chat API over a run's models."""
    from ..chat import Chat

    with optional("serve"):
        from ..chat.serve import listen, make_server
    with listen(host, port) as listener:  # before anything is loaded
        live = open_model(ctx)
        live.template.variables = chat_template_kwargs or {}
        server, place = make_server(Chat(live), host), listener.getsockname()
        address = f"[{place[0]}]:{place[1]}" if ":" in place[0] else f"{place[0]}:{place[1]}"
        console.say(f"{live.source}: {', '.join(live.models)} at http://{address}/v1 (the OpenAI chat API)")
        if not ipaddress.ip_address(place[0]).is_loopback:
            console.say("note: there is no key: everyone who reaches this address is answered")
        console.say("Ctrl-C ends the server.")
        server.run(sockets=[listener])


def ui(
    port: Annotated[int, Option(min=1, max=65535, help="Port of the page.")] = 7860,
    no_browser: Annotated[bool, Option("--no-browser", help="Do not open the browser.")] = False,
) -> None:
    """A local page to look at data, plan, train, chat, merge and export."""
    with optional("ui"):
        from ..ui.server import serve
    serve(port, not no_browser, console.say)


def in_terminal() -> bool:
    """Whether a user types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _session(ctx: Context, settings: Settings) -> Session:
    from ..chat import Chat
    from ..chat.session import Session, logger, trained_system

    live = open_model(ctx)
    live.template.variables = ctx.params["chat_template_kwargs"] or {}
    talker = Chat(live)
    if settings.system is None:
        settings.system = trained_system(talker)
        if settings.system is not None:
            logger.info(f"note: the system turn of training is used: {settings.system}")
    compare = ctx.params["compare"]
    models = list(dict.fromkeys(ctx.params["model"] or (live.models if compare else [live.policy])))
    if compare and len(models) < 2:
        raise UserError(
            f"--compare: {live.source} is one model, {models[0]}; there is nothing to compare it with.",
            "Give a run's folder (its base and stages are compared), or leave --compare out.",
        )
    return Session(talker, models, settings, blind=ctx.params["vote"] is not None)


def _prompt_on_stdin() -> str:
    """Raises UserError: stdin is empty, or not text."""
    if sys.stdin.isatty():
        console.complain("Write the prompt; Ctrl-D on a line of its own ends it.")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError("the prompt on stdin is not UTF-8.", "Convert it first (iconv -t utf-8).") from None
    if not text.strip():
        raise UserError(
            "there is no prompt on stdin.", "echo 'Name three rivers.' | zephyr-lite chat, or start it in a terminal."
        )
    return text.strip("\n")


def _answer_once(session: Session, question: str) -> None:
    """Print the answer on stdout and nothing else; with --compare each under its model's name."""
    write, alone = console.out.file.write, len(session.columns) == 1

    def on_text(column: int, piece: str) -> None:
        if alone:
            write(visible(piece))
            console.out.file.flush()

    answers = session.ask(question, on_text)
    for column, answer in zip(session.columns, answers):
        write("\n" if alone else f"## {column.model}\n\n{visible(answer.text)}\n\n")
        if answer.note:
            console.complain(f"note: {'' if alone else column.model + ': '}{answer.note}")
    console.out.file.flush()


def _answer_all(session: Session, prompts: list[str], out: Path, batch: int) -> None:
    """Answer every prompt with every model of the session; each batch is in the file as soon as it is answered.

    A row: ``messages`` (the training schema), ``model``, ``finish_reason``, and ``prompt_number`` (from 1). A prompt that
    cannot be asked is named, counted, and left out.

    Raises:
        UserError: not one of the prompts can be asked.
        Interrupted: Ctrl-C; the answers so far are in the file.
    """
    from ..chat.rows import append_rows
    from ..chat.session import Column
    from ..io.text import short

    how, models = session.settings, session.chat.live.models
    usable: list[tuple[int, list[dict[str, str]], Any]] = []
    for number, prompt in enumerate(prompts, 1):
        messages = Column("").messages(how.system, prompt)
        try:
            usable.append((number, messages, session.chat.prompt_ids(messages)))
        except UserError as error:
            console.say(f"note: prompt {number} ({short(prompt, 60)}) is left out: {error.message}")
    if not usable:
        raise UserError("none of the prompts can be asked.", "See why above.")
    cut = 0
    for start in range(0, len(usable), batch):
        part, rows = usable[start : start + batch], list[dict[str, Any]]()
        numbers, conversations, ids = zip(*part)
        sampling = [how.sampling(0, number - 1) for number in numbers]
        try:
            for column in session.columns:
                answers = session.chat.sample(ids, sampling, adapters=models[column.model])
                for number, messages, answer in zip(numbers, conversations, answers):
                    turns = [*messages, {"role": "assistant", "content": answer.text}]
                    about = {"model": column.model, "finish_reason": answer.finish_reason, "prompt_number": number}
                    rows.append({"messages": turns, **about})
                    cut += answer.finish_reason == "length"
        except KeyboardInterrupt:
            message = f"interrupted; the answers to {start:,} of {len(prompts):,} prompts are in {out}"
            raise Interrupted(message) from None
        append_rows(out, rows)
        console.say(f"{start + len(part):,} of {len(usable):,} prompts answered")
    if cut:
        console.say(f"note: {cut:,} answers were cut at their length; --max-new-tokens allows more")
    count, left_out = len(usable) * len(session.columns), len(prompts) - len(usable)
    console.say(f"{count:,} answers are in {out}; prompts left out: {left_out:,}")
