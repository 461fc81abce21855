"""weft join: put adapters under a router, which decides how much each of them counts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.adapted import AnyBase, BaseName
from weft.cli.options import JSON, example, log, print_json, settings, table

app = typer.Typer(rich_markup_mode=None)


@app.command(
    epilog=example(
        "weft join arrow runs/math runs/code --set k=1 -o runs/both",
        "weft join fusion runs/math runs/code -o runs/fused   # then a recipe with start: runs/fused trains the router",
    )
)
def join(
    router: Annotated[str, typer.Argument(help="A router: one of `weft methods` that has experts.", metavar="ROUTER")],
    adapters: Annotated[list[Path], typer.Argument(help="Folders of adapters or of runs.", metavar="ADAPTER...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder.")],
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the router, as in k=1; see weft methods.")
    ] = None,
    train_experts: Annotated[
        bool, typer.Option("--train-experts", help="Let a run that goes on from it train the adapters too.")
    ] = False,
    base: BaseName = None,
    data: Annotated[list[str] | None, typer.Option("--eval", help="Rows to measure base, parts and whole on.")] = None,
    any_base: AnyBase = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Make one adapter of several, of any methods; each counts where it sits, as much as the router says.

    The result is measured beside its parts and compared in every form (exit code 1 if one differs). Routers that learn
    start even: train them with a recipe whose `start` names the new folder.
    """
    from weft.core.router import Router
    from weft.errors import WeftError, nearest
    from weft.joined import join_folders
    from weft.registry import methods

    known = {name: cls for name, cls in methods().items() if issubclass(cls, Router)}
    if router not in known:
        raise WeftError(f"there is no router {router!r}; {nearest(router, known)}")
    try:
        chosen = known[router](**settings(options or []))
    except (ValueError, TypeError) as error:
        raise WeftError(str(error)) from error
    found = join_folders(
        adapters, chosen, out, train_experts=train_experts, base=base, data=data, any_base=any_base, say=log
    )
    if as_json:
        print_json(found.as_dict())
    else:
        print(found)
        print(table(found.rows(), right=(1,)))
        print(found.parity)
    if not found.parity.passed:
        raise typer.Exit(1)
