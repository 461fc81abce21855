"""weft tune: make the adapter that a recipe describes."""

from __future__ import annotations

import os
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
        "weft tune a.yaml b.yaml c.yaml",
    )
)
def tune(
    recipe: Annotated[Path, typer.Argument(help="A recipe; `weft init` writes one.", metavar="RECIPE")],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            help="More recipes on the same base, which are trained in the same batch; and keys to change in all of "
            "them, with their section, as in train.steps=100.",
            metavar="[RECIPE | KEY=VALUE]...",
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
    checkpoints; several recipes have a folder each. Exit code 1: a form of the adapter answers differently.
    """
    from weft.recipe import load_recipe
    from weft.tune import dry_run as look_ahead
    from weft.tune import tune as run
    from weft.tune import tune_many

    changes = [each for each in more or () if "=" in each]
    files = [recipe, *(Path(each) for each in more or () if "=" not in each)]
    settings = [load_recipe(file, changes) for file in files]
    if dry_run:
        print(*map(look_ahead, settings), sep="\n\n")
        return
    if len(settings) == 1:
        results = [run(settings[0], resume=resume, overwrite=overwrite)]
    else:
        results = tune_many(settings, resume=resume, overwrite=overwrite)
    if int(os.environ.get("RANK", "0")):  # the first of several processes speaks
        return
    if as_json:
        print_json(results[0].summary if len(results) == 1 else [result.summary for result in results])
    else:
        print(*results, sep="\n\n")
    if any(result.passed is False for result in results):
        raise typer.Exit(1)
