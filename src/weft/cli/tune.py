"""weft tune: make the adapter that a recipe describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.options import JSON, example, print_json
from weft.recipe import all_keys

app = typer.Typer(rich_markup_mode=None)


def _complete(incomplete: str) -> list[str]:
    return [f"{key}=" for key, _ in all_keys() if key.startswith(incomplete)]


@app.command(
    epilog=example(
        "weft tune examples/docstrings.yaml --dry-run",
        "weft tune examples/docstrings.yaml train.learning_rate=1e-3 method.rank=8",
        "weft tune examples/docstrings.yaml --resume",
    )
)
def tune(
    recipe: Annotated[Path, typer.Argument(help="A recipe; `weft init` writes one.", metavar="RECIPE")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            help="Keys of the recipe to change, with their section, as in train.steps=100.",
            metavar="[KEY=VALUE]...",
            autocompletion=_complete,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the whole recipe, what would be trained, and its memory; train nothing."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew over an unfinished run.")] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Train an adapter, measure what it learnt and forgot, prove that its forms agree, and write a report.

    The run's folder (runs/NAME unless the recipe says another) gets the adapter, report.html, result.json, the log and
    checkpoints. Exit code 1: a form of the adapter answers differently.
    """
    from weft.recipe import load_recipe
    from weft.tune import dry_run as look_ahead
    from weft.tune import tune as run

    settings = load_recipe(recipe, changes or ())
    if dry_run:
        print(look_ahead(settings))
        return
    result = run(settings, resume=resume, overwrite=overwrite)
    if as_json:
        print_json(result.summary)
    else:
        print(result)
    if result.passed is False:
        raise typer.Exit(1)
