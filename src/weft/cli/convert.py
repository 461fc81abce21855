"""weft convert: write an adapter in another layout: HF PEFT's or Weft's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.adapted import AnyBase, BaseName
from weft.cli.options import JSON, example, log, print_json
from weft.errors import WeftError, nearest

app = typer.Typer(rich_markup_mode=None)

LAYOUTS = ("peft", "weft")


@app.command(epilog=example("weft convert runs/docstrings --to peft --out adapters/docstrings-peft"))
def convert(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of an adapter (Weft's or PEFT's) or a run.", metavar="ADAPTER")
    ],
    to: Annotated[
        str, typer.Option("--to", help="peft: what HF PEFT, vLLM and the Hub read; weft: every method's own.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder.")],
    base: BaseName = None,
    any_base: AnyBase = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Read an adapter onto its base, which proves that it fits, and write it again."""
    if to not in LAYOUTS:
        raise WeftError(f"--to {to}: there is no such layout; {nearest(to, LAYOUTS)}")
    if out.exists():
        raise WeftError(f"{out} is there already: name a new folder")
    from weft.interop.folder import save
    from weft.reopen import reopen

    opened = reopen([adapter], base=base, any_base=any_base)
    save(opened.model, out, opened.names[0], format="peft" if to == "peft" else "weft")
    log(f"{opened.names[0]} on {opened.base}, as {'a PEFT' if to == 'peft' else 'a Weft'} folder")
    if as_json:
        print_json({"folder": str(out), "layout": to, "base": opened.base})
    else:
        print(out)
