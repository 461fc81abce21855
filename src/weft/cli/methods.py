"""weft methods: every way to adapt a network, with what it can do and its options."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from weft.cli.options import JSON, example, print_json, table
from weft.errors import WeftError, nearest

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog=example("weft methods", "weft methods dora", "weft methods --json"))
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.")] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """List the methods. What each can do is found by doing it on tiny models, not declared."""
    from weft.capabilities import capabilities
    from weft.registry import methods as registered

    known = registered()
    if name is not None and name not in known:
        raise WeftError(f"there is no method '{name}'; {nearest(name, known)}")
    found = [capabilities(cls) for key, cls in known.items() if name in (None, key)]
    if as_json:
        print_json([asdict(each) for each in found])
    elif name is not None:
        print(found[0])
    else:
        head = ("method", "paper", "adapts", "merges", "rows in one batch", "options")
        print(table([head, *(each.row() for each in found)]))
