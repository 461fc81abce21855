"""weft init: write a recipe with every key, its default and its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.options import default, example, key_option, log

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog=example("weft init my.yaml --base pico --train data/train.jsonl", "weft tune my.yaml"))
def init(
    path: Annotated[Path, typer.Argument(help="The recipe to write; - prints it.")] = Path("recipe.yaml"),
    base: Annotated[str, key_option("base.model", "--base")] = default("base.model"),
    train: Annotated[str, key_option("data.train")] = "train.jsonl",
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
) -> None:
    """Write a commented recipe: every key with its default and its meaning."""
    from weft.errors import RecipeError
    from weft.recipe import commented_template

    text = commented_template(model=base, train=train)
    if str(path) == "-":
        print(text, end="")
        return
    if path.exists() and not force:
        raise RecipeError(
            f"{path} is there already, and your changes to it would be lost: name another, or say --force"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path)
    log(f"edit it (data.train is {train}), then: weft tune {path}")
