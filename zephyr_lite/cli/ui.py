"""``zephyr-lite ui``."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from ..errors import UserError
from .options import console


def ui(
    port: Annotated[int, Option(min=1, max=65535, help="Port of the page.")] = 7860,
    no_browser: Annotated[bool, Option("--no-browser", help="Do not open the browser.")] = False,
) -> None:
    """A local page to look at data, plan, train, chat, merge and export."""
    try:
        from ..ui.server import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs the package gradio.", 'Install it: pip install "zephyr-lite[ui]"') from None
    serve(port, not no_browser, console.say)
