"""weft choices: which experts of a router counted where, on given text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weft.cli.adapted import AnyBase, BaseName
from weft.cli.options import JSON, example, log, print_json, table

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog=example("weft choices runs/both --data examples/data/docstrings/test.jsonl --plot choices.svg"))
def choices(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of an adapter that is a router, or a run.", metavar="ADAPTER")
    ],
    base: BaseName = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Text to run; by default the run's held-out data, else text bundled with Weft."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of it.")] = 8,
    plot: Annotated[Path | None, typer.Option(help="Draw the shares of all sites (svg, png).")] = None,
    any_base: AnyBase = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Run text through a router and print how much each expert counted, by kind of module, and for which tokens."""
    from weft.joined import chosen_by

    found = chosen_by(adapter, base=base, data=data, rows=rows, any_base=any_base)
    log(f"{rows} rows of {found.source}")
    if plot is not None:
        log(f"plot: {found.plot(plot)}")
    if as_json:
        print_json(asdict(found))
        return
    print(table(found.rows(), right=tuple(range(1, 1 + len(found.experts)))))
    for name, tokens in found.tokens.items():
        print(f"{name}: {' '.join(repr(word) for word, _ in tokens) or 'no token more than others'}")
