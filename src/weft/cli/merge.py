"""weft merge: fold adapters into a full checkpoint, shard by shard."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weft.cli.adapted import AnyBase, BaseName, RouteText, parse_route
from weft.cli.options import JSON, example, log, print_json

app = typer.Typer(rich_markup_mode=None)


@app.command(
    epilog=example(
        "weft merge runs/docstrings --out merged/docstrings --check",
        "weft merge runs/math runs/code --route math=0.7,code=0.3 --out merged/both",
    )
)
def merge(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of adapters or runs.", metavar="ADAPTER...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder.")],
    base: BaseName = None,
    route: RouteText = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Compare the written checkpoint with the live adapter; exit code 1 if it differs."
        ),
    ] = False,
    any_base: AnyBase = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write the base with adapters folded into its weights: a folder that transformers loads, without Weft.

    One shard is written at a time, in the number format of the base's files.
    """
    from weft.merging import check_checkpoint, merge_checkpoint
    from weft.reopen import names_of

    chosen = parse_route(route, names_of(adapters))
    found = merge_checkpoint(base, adapters, out, route=chosen, any_base=any_base)
    parity = check_checkpoint(out, adapters, route=chosen, base=base, any_base=any_base, say=log) if check else None
    if as_json:
        facts = {**asdict(found), "folder": str(found.folder)}
        print_json(facts if parity is None else {**facts, "parity": asdict(parity)})
    else:
        print(found)
        if parity is not None:
            print(parity)
    if parity is not None and not parity.passed:
        raise typer.Exit(1)
