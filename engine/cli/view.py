"""`nnturbo view`: one case in the browser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .output import DONE, say


def add_view(commands: Any) -> None:
    """Declare `nnturbo view`."""
    view = commands.add_parser("view", help="show one case of a folder of predictions in the browser")
    view.add_argument("folder", help="output folder of nnturbo predict")
    view.add_argument("case", help="name of the case")
    view.add_argument("-o", metavar="FILE", help="write the page there, and open no browser")
    view.set_defaults(run=_view)


def _view(options: argparse.Namespace) -> int:
    import tempfile
    import webbrowser

    from ..jobs.report import write_report

    page = Path(options.o or Path(tempfile.mkdtemp(prefix="nnturbo-")) / f"{options.case}.html").absolute()
    write_report(Path(options.folder), page, only=options.case)
    say(str(page))
    if options.o is None and not webbrowser.open(page.as_uri()):
        say("nnturbo: no browser was found; open the page yourself", error=True)
    return DONE
