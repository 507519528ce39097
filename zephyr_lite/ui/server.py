"""The server of the page, on this machine only."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi.responses import HTMLResponse
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..errors import UserError
from ..io.run_dir import STAGE_FILE
from ..monitor.report import REPORT
from . import jobs
from .page import CSS, build
from .talk import Talk


def open_page(port: int, browser: bool) -> tuple[gr.Blocks, str]:
    """Serve the page on this machine; returns it and its address.

    Args:
        port: of the page.
        browser: open it in the default browser.
    """
    page = build(Talk())
    theme = gr.themes.Default(
        primary_hue="emerald", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        body_text_color_subdued="*neutral_500",
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
            # a web page could give this machine a name of its own, and press the buttons
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])]},
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
