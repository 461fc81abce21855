"""weft doctor: the machine, versions, extras, and the command that installs what is missing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from weft.cli.options import JSON, example, print_json

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog=example("weft doctor", "weft doctor --json"))
def doctor(as_json: Annotated[bool, JSON] = False) -> None:
    """Say what this machine has and lacks for Weft. Exit code 1: something that Weft needs is missing."""
    from weft.diagnosis import diagnose

    found = diagnose()
    if as_json:
        print_json({**asdict(found), "healthy": found.healthy})
    else:
        print(found)
    if not found.healthy:
        raise typer.Exit(1)
