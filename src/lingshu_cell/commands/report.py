"""The command ``lingshu report``."""

from pathlib import Path
from typing import Annotated

import typer

from lingshu_cell.commands.options import Json
from lingshu_cell.console import give, give_json

EXAMPLES = ("lingshu report judged", "lingshu report judged --baseline judged_additive")


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that lingshu evaluate wrote.")],
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Evaluation of a baseline's responses, shown beside those of DIR."),
    ] = None,
    json: Json = False,
) -> None:
    """Make one HTML page of an evaluation, with pictures and how to read them; it opens offline."""
    from lingshu_cell.report import write_report

    page = write_report(directory, title=title, baseline=baseline)
    give_json({"report": str(page)}) if json else give(str(page))
