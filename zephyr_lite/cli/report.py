"""``zephyr-lite report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..monitor.console import Console
from .options import Verbose, nameable

console = Console()


def report(
    source: Annotated[
        Path | None,
        typer.Argument(help="runs/NAME, or runs/NAME/STAGE for one stage of it; the newest run by default."),
    ] = None,
    other: Annotated[Path | None, typer.Argument(help="A second one, to compare with.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=nameable,
            help="The file to write; by default report.html in that folder, or report-A-B.html here.",
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write report.html of a run, or of two runs side by side: curves, answers, rows, memory, configuration, lineage."""
    from ..io.atomic import make_folder, write_text
    from ..monitor.report import REPORT, read_source, run_page, side_by_side

    first = read_source(source)
    if other is None:
        alone = source is not None and len(first) == 1 and source.expanduser().absolute() == first[0].folder.absolute()
        target = out or (first[0].folder if alone else first[0].folder.parent) / REPORT
        page = run_page(first)
    else:
        second = read_source(other)
        page = side_by_side(first, second)
        target = out or Path(
            "report-{}-{}.html".format(*(_name(place) for place in (source, other) if place is not None))
        )
    check_target(target)
    make_folder(target.absolute().parent)
    write_text(target, page)
    console.say(f"{target} ({len(page.encode('utf-8', 'replace')) / 2**10:.0f} KiB); open it in a browser.")


def check_target(target: Path) -> None:
    """Refuse to overwrite anything but a report.

    Raises:
        UserError: a folder or another file is there.
    """
    from ..monitor.report import MARK

    if target.is_dir():
        raise UserError(f"--out {target}: is a folder.", f"Name the file: --out {target / 'report.html'}")
    if target.exists():
        with target.open("rb") as file:
            if MARK.encode() not in file.read(200):
                raise UserError(f"{target}: exists and is not a report of zephyr-lite.", "Choose another --out.")


def _name(place: Path) -> str:
    """``run``, or ``run-stage``, for a file's name."""
    whole = place.expanduser().absolute()
    return f"{whole.parent.name}-{whole.name}" if (whole / "stage.json").is_file() else whole.name
