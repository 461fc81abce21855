"""weft plan: what a recipe will take, before anything is allocated; and what makes it fit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.cli.options import JSON, example, log, print_json, table
from weft.collector import resting_collector

app = typer.Typer(rich_markup_mode=None)


@app.command(
    epilog=example(
        "weft plan examples/docstrings.yaml",
        "weft plan my.yaml train.batch_size=32 --memory 8GB --time 2h --apply",
        "weft plan my.yaml --table method.rank=4,16,64 --table base.quantize=null,nf4 --plot plan.svg",
        "weft plan my.yaml --select-base pico --select-base ./other-base",
    )
)
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe; `weft init` writes one.", metavar="RECIPE")],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Keys of the recipe to change first.", metavar="[KEY=VALUE]...")
    ] = None,
    memory: Annotated[str | None, typer.Option("--memory", help="The memory that there is, as in 8GB.")] = None,
    time: Annotated[str | None, typer.Option("--time", help="The longest training, as in 90s, 45min or 2h.")] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the recipe with the fastest changes that fit, as NAME.fit.yaml.")
    ] = False,
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="Measure the speed of this machine anew.")] = False,
    rows: Annotated[
        list[str] | None, typer.Option("--table", help="A key and values to compare, as in method.rank=4,8,16.")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw memory and rates (svg, png).")] = None,
    price: Annotated[float | None, typer.Option("--price", help="Price of an hour of this machine.")] = None,
    bases: Annotated[
        list[str] | None,
        typer.Option("--select-base", help="Bases to choose among, by short runs on parts of the data."),
    ] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Forecast the memory, time and disk of a recipe on this machine. Exit code 1: nothing makes it fit.

    A training step is run on tensors without numbers, at the shapes of the recipe's own data. The speed of the machine
    is measured once and remembered ($WEFT_CACHE, or ~/.cache/weft); so are past runs, which correct later forecasts.
    """
    with resting_collector() if not bases else nullcontext():
        _plan(recipe, changes or (), _Asked(memory, time, apply, recalibrate, rows, picture, price, bases, as_json))


@dataclass(frozen=True)
class _Asked:
    """The options."""

    memory: str | None
    time: str | None
    apply: bool
    recalibrate: bool
    rows: list[str] | None
    picture: Path | None
    price: float | None
    bases: list[str] | None
    as_json: bool


def _plan(recipe: Path, changes: Sequence[str], asked: _Asked) -> None:
    from weft.recipe import load_recipe

    settings, limits = load_recipe(recipe, changes), _limits(asked.memory, asked.time)
    if asked.apply and limits is None:
        raise typer.BadParameter("--apply writes what fits a limit: give --memory or --time")
    if asked.bases:
        _select(settings, asked.bases, asked.as_json)
        return
    from weft.tune.whatif import draw, fit_recipe, parse_table

    if asked.rows:
        found = _table(settings, parse_table(asked.rows), asked.as_json)
        if asked.picture is not None:
            log(f"plot: {draw(asked.picture, settings, found)}")
        return
    from weft.tune import plan as forecast

    result = forecast(settings, price=asked.price, recalibrate=asked.recalibrate)
    if asked.picture is not None:
        log(f"plot: {draw(asked.picture, settings, {recipe.stem: result})}")
    fitting = None if limits is None else fit_recipe(settings, limits)
    if asked.as_json:
        changed = [{"keys": dict(c.keys), **c.forecast.as_dict()} for c in fitting.changed] if fitting else None
        print_json({**result.as_dict(), "fits": fitting.fits if fitting else None, "changes": changed})
    else:
        print(result)
        if fitting is not None:
            print(f"\n{fitting}")
    if fitting is not None:
        _finish(fitting, recipe, asked.apply)


def _finish(fitting: Any, recipe: Path, apply: bool) -> None:
    from weft.tune.whatif import write_fit

    if not fitting.fits:
        raise typer.Exit(1)
    best = fitting.changed[0]
    if apply and best.keys:
        log(f"written: {write_fit(best, recipe)}")


def _limits(memory: str | None, time: str | None) -> Any:
    from weft.plan.fit import Limits, parse_seconds
    from weft.recipe.sizes import parse_bytes

    if memory is None and time is None:
        return None
    try:
        return Limits(None if memory is None else parse_bytes(memory), None if time is None else parse_seconds(time))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _table(settings: Any, values: Any, as_json: bool) -> dict[str, Any]:
    from weft.tune.whatif import compare, table_rows

    found = compare(settings, values)
    if as_json:
        print_json({name: f if isinstance(f, str) else f.as_dict() for name, f in found.items()})
    else:
        print(table(table_rows(found), right=(1, 2, 3, 4, 5)))
    return {name: f for name, f in found.items() if not isinstance(f, str)}


def _select(settings: Any, bases: list[str], as_json: bool) -> None:
    from dataclasses import asdict

    from weft.tune.select_base import select_base

    found = select_base(settings, bases)
    if as_json:
        print_json([asdict(candidate) for candidate in found])
    else:
        head = ("base", "loss at all rows", "without one point", "error of fit", "law of D rows", "measured")
        print(table([head, *(candidate.row() for candidate in found)]))
