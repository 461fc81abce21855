"""weft compress: make adapters smaller at a loss that is stated, measured, and held or refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from weft.cli.adapted import AnyBase, BaseName
from weft.cli.options import JSON, example, log, print_json, share
from weft.errors import WeftError, nearest

if TYPE_CHECKING:
    from weft.compressed import LossIn
    from weft.compressing import SetWay, Way

app = typer.Typer(rich_markup_mode=None)


WAYS = ("principal", "bits", "one_bit", "compeft")
SETS = ("joint", "eigenlorax")
LOSS_IN = ("weights", "output")
OF_SETS, OF_ALL = ("--rank", "--clusters", "--diagonal"), ("--loss", "--eval")


@app.command(
    epilog=example(
        "weft compress runs/docstrings --loss 5% -o adapters/small",
        "weft compress runs/math runs/code --way bits --loss 0.5% --eval test.jsonl -o adapters/small",
        "weft compress runs/docstrings --size 25% --loss-in output --calibrate train.jsonl -o adapters/small",
        "weft compress runs/* --way joint --rank 64 -o adapters/set",
    )
)
def compress(
    adapters: Annotated[
        list[Path], typer.Argument(help="Folders of adapters (Weft's or PEFT's) or runs.", metavar="ADAPTER...")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder; of several, one in it for each.")],
    way: Annotated[
        str,
        typer.Option(
            help="principal: LoRA of fewer ranks; bits: 1 to 8, or 16, for each entry; one_bit: a sign for each; "
            "compeft: signs of the largest entries. Of several adapters together: joint: small matrices between shared "
            "ones; eigenlorax: factors on shared directions.",
        ),
    ] = "principal",
    loss: Annotated[
        str | None,
        typer.Option(help="What may be lost, as in 0.5%: of the change's norm at a site; with --eval, see there."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Instead: the share of its bytes that may remain, as in 25%, spent where it helps."),
    ] = None,
    loss_in: Annotated[
        str, typer.Option(help="weights, or output: of what every site changes of its output on rows of --calibrate.")
    ] = "weights",
    data: Annotated[
        list[str] | None,
        typer.Option("--eval", help="Rows: --loss is then the share by which the loss per token on them may grow."),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(help="Rows for --loss-in output; else those of --eval, or the adapter's own held-out data."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="With joint or eigenlorax, instead of --loss: directions that are shared.")
    ] = None,
    clusters: Annotated[
        int, typer.Option(min=1, help="With joint: groups of adapters with bases of their own, at every site.")
    ] = 1,
    diagonal: Annotated[bool, typer.Option("--diagonal", help="With joint: each adapter has a diagonal only.")] = False,
    base: BaseName = None,
    any_base: AnyBase = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write adapters as small as a stated loss allows, site by site.

    The loss is measured on the tensors that are written. Where it cannot be reached, or only by an adapter that is no
    smaller, nothing is written and the exit code is 1. Adapters that are made smaller together become folders that
    share one file beside them.
    """
    for option, text, known in (("--way", way, WAYS + SETS), ("--loss-in", loss_in, LOSS_IN)):
        if text not in known:
            raise WeftError(f"{option} {text}: there is no such; {nearest(text, known)}")
    stated, kept = share("--loss", loss), share("--size", size)
    given = {"--size": kept, "--eval": data, "--calibrate": calibrate, "--loss-in output": loss_in == "output"}
    _check(way, {"--loss": stated, "--rank": rank, "--clusters": clusters > 1, "--diagonal": diagonal, **given})
    if way in SETS:
        _together(adapters, out, way, rank, stated, clusters, diagonal, data, base, any_base, as_json)
        return
    from weft.compressed import compress_folders

    found = compress_folders(
        adapters, out, way=cast("Way", way), loss=stated, size=kept, loss_in=cast("LossIn", loss_in), data=data,
        calibrate=calibrate, base=base, any_base=any_base, say=log,
    )  # fmt: skip
    refused = [each for each in found if each.shrunk.refused]
    if as_json:
        print_json([each.as_dict() for each in found])
    else:
        print("\n".join(map(str, refused or found)))
    if refused:
        log("nothing was written")
        raise typer.Exit(1)
    if not all(each.parity and each.parity.passed for each in found):
        raise typer.Exit(1)


def _check(way: str, given: dict[str, Any]) -> None:
    """WeftError for options that are not of the way, that say the same thing twice, or that say nothing."""
    for option, value in given.items():
        if value and option not in OF_ALL and (option in OF_SETS) != (way in SETS):
            raise WeftError(f"{option} is not of --way {way}, but of {', '.join(SETS if option in OF_SETS else WAYS)}")
    one, other = ("--loss", "--rank") if way in SETS else ("--loss", "--size")
    if (given[one] is None) == (given[other] is None):
        raise WeftError(f"{one} or {other} says how much is kept: give one of them")
    if given["--loss"] == 0:
        raise WeftError("--loss 0: something has to be lost for an adapter to get smaller; give more than 0")
    if given["--size"] == 0:
        raise WeftError("--size 0: something has to remain; give more than 0")
    if given["--calibrate"] and not given["--loss-in output"]:
        raise WeftError("--calibrate gives rows for --loss-in output: the weights are compared without any")


def _together(
    adapters: list[Path], out: Path, way: str, rank: int | None, loss: float | None, clusters: int, diagonal: bool,
    data: list[str] | None, base: str | None, any_base: bool, as_json: bool,
) -> None:  # fmt: skip
    from weft.compressed import compress_set

    found = compress_set(
        adapters, out, way=cast("SetWay", way), rank=rank, loss=loss, clusters=clusters, diagonal=diagonal, data=data,
        base=base, any_base=any_base, say=log,
    )  # fmt: skip
    if as_json:
        print_json(found.as_dict())
    else:
        print(found)
    if not found.parity.passed:
        raise typer.Exit(1)
