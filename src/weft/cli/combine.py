"""weft combine: one adapter of several, one checkpoint of several, or what a mergekit file says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from weft.cli.adapted import AnyBase, BaseName
from weft.cli.options import JSON, example, log, print_json, settings, table

app = typer.Typer(rich_markup_mode=None)


@app.command(
    epilog=example(
        "weft combine task_arithmetic runs/math runs/code --weights 0.7,0.3 -o merged/both",
        "weft combine ties runs/math runs/code --set density=0.5 --rank 16 -o merged/both --plot conflict.svg",
        "weft combine ties ./model-a ./model-b --base ./model --set density=0.3 -o ./merged",
        "weft combine task_arithmetic runs/a runs/b --search --eval few.jsonl --test test.jsonl -o merged/both",
        "weft combine task_arithmetic runs/a runs/b --learn labels --steps 60 --eval few.jsonl -o merged/both",
        "weft combine regmean runs/a runs/b --own a.jsonl --own b.jsonl -o merged/both",
        "weft combine linear runs/a runs/b runs/c --greedy --eval validation.jsonl -o merged/soup",
        "weft combine merge.yaml -o ./merged",
    )
)
def combine(
    rule: Annotated[str, typer.Argument(help="A rule (weft combine list), or a mergekit file.", metavar="RULE|FILE")],
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Folders of adapters or runs, or of checkpoints.", metavar="[FOLDER]...")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The new folder.")] = None,
    weights: Annotated[str | None, typer.Option(help="One for each input, as in 0.7,0.3; 1 if not given.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the rule, as in density=0.5; see weft combine list.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the new adapter.")] = None,
    loss: Annotated[
        float | None, typer.Option(min=0, max=1, help="Instead: the smallest rank that loses at most this share.")
    ] = None,
    base: BaseName = None,
    data: Annotated[
        list[str] | None, typer.Option("--eval", help="Rows to measure the result on, beside parents and base.")
    ] = None,
    test: Annotated[list[str] | None, typer.Option(help="More such rows, which nothing is chosen by.")] = None,
    own: Annotated[
        list[str] | None, typer.Option(help="Rows of each adapter's own, in their order, for fisher and regmean.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Choose weights and options by the loss on --eval.")] = False,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Choose which inputs go in: each that makes the loss on --eval no worse.")
    ] = False,
    learn: Annotated[
        Literal["labels", "entropy"] | None,
        typer.Option(help="Learn how much of each adapter to add at each site, on --eval, with its labels or without."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of --learn; 100 if not given.")] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Combinations that --search tries; 40 if not given.")
    ] = None,
    span: Annotated[
        str | None, typer.Option("--range", help="What a searched weight lies between; 0,1.5.", metavar="LOW,HIGH")
    ] = None,
    l1: Annotated[
        float | None, typer.Option(min=0, help="What the size of a searched weight costs: 0; LoraHub's is 0.05.")
    ] = None,
    sampler: Annotated[
        Literal["tpe", "cma"] | None, typer.Option(help="How --search draws: tpe, or cma (CMA-ES); tpe if not given.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the predicted conflict (svg, png).")] = None,
    align: Annotated[
        bool, typer.Option("--align", help="Average bottleneck adapters, their hidden units aligned (MerA), by linear.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="Number format of a merged checkpoint.")] = None,
    seed: Annotated[int, typer.Option(help="For rules that draw.")] = 0,
    any_base: AnyBase = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Combine adapters into one adapter, or whole checkpoints into one checkpoint.

    Before: bases are compared and the conflict between adapters is shown. After: the result is measured on --eval,
    beside its parents and the base; adapters are compared in every form too (exit code 1 if one differs).
    A search or a merge of checkpoints that was stopped goes on when it is started again.
    """
    from weft.combine import rules
    from weft.combining import rule_of
    from weft.errors import WeftError

    if rule == "list":
        print(_listed(rules()))
        return
    if out is None:
        raise WeftError("--out is missing: name the new folder")
    given = {"--rank": rank, "--loss": loss, "--plot": plot, "--dtype": dtype, "--eval": data, "--test": test,
             "--weights": weights, "--set": options, "--base": base, "--own": own}  # fmt: skip
    if Path(rule).suffix in (".yaml", ".yml"):
        from weft.checkpoints.merge import run
        from weft.checkpoints.mergekit import read_mergekit

        said = {
            "--search": search or None,
            "--greedy": greedy or None,
            "--learn": learn,
            "--align": align or None,
            "a folder": inputs or None,
        }
        _refuse(given | said, "a mergekit file says itself what is merged")
        print(run(read_mergekit(rule), out, say=log))
        return
    if not inputs:
        raise WeftError(f"there is nothing to combine by {rule}: name folders of adapters or of checkpoints")
    known = settings(options or [])
    shares = _shares(weights, inputs)
    shared: dict[str, Any] = {"base": base, "data": data, "test": test, "seed": seed, "say": log}
    try:
        chosen = rule_of(rule, known)
    except (ValueError, TypeError) as error:
        raise WeftError(str(error)) from error
    shared["how"] = _how(search, greedy, learn, trials, steps, span, l1, sampler, tuple(known))
    if _are_adapters(inputs):
        _refuse({"--dtype": dtype}, "adapters keep their number format")
        only = {"rank": rank, "loss": loss, "plot": plot, "any_base": any_base, "align": align, "own": own}
        _adapters(inputs, chosen, out, [*shares.values()], shared | only, as_json)
    else:
        theirs = {"--rank": rank, "--loss": loss, "--plot": plot, "--learn": learn, "--align": align or None,
                  "--own": own}  # fmt: skip
        _refuse(theirs, "it is for adapters; weft extract makes one of a checkpoint")
        _checkpoints(shares, chosen, out, dtype, shared, as_json)


def _adapters(
    inputs: list[str], rule: Any, out: Path, weights: list[float], options: dict[str, Any], as_json: bool
) -> None:
    from weft.combined import combine_folders

    found = combine_folders([*map(Path, inputs)], rule, out, weights=weights, **options)
    _show(found, as_json)
    if not found.parity.passed:
        raise typer.Exit(1)


def _checkpoints(
    shares: Mapping[str, float], rule: Any, out: Path, dtype: str | None, options: dict[str, Any], as_json: bool
) -> None:
    import torch

    from weft.errors import WeftError
    from weft.merged import merge_folders

    number_format = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not isinstance(number_format, torch.dtype):
        raise WeftError(f"--dtype {dtype}: expected float32, bfloat16 or float16")
    _show(merge_folders(shares, rule, out, dtype=number_format, **options), as_json)


def _show(found: Any, as_json: bool) -> None:
    if as_json:
        print_json(found.as_dict())
        return
    print(found)
    for figures in found.figures:
        print(table(figures.rows(), right=(1, 2)))


def _are_adapters(inputs: list[str]) -> bool:
    from weft.adapter import TENSORS

    return all(any((place / TENSORS).is_file() for place in (Path(n), Path(n) / "adapter")) for n in inputs)


def _refuse(given: Mapping[str, Any], why: str) -> None:
    """No option is taken and not read."""
    from weft.errors import WeftError

    for name, value in given.items():
        if value is not None:
            raise WeftError(f"{name} is of no use here: {why}")


def _how(
    search: bool, greedy: bool, learn: Any, trials: int | None, steps: int | None, span: str | None, l1: float | None,
    sampler: Any, fixed: tuple[str, ...],
) -> Any:  # fmt: skip
    """What is chosen by the loss: nothing, coefficients or members."""
    from weft.coefficients import Learn
    from weft.errors import WeftError
    from weft.searching import Greedy, Search

    if search + greedy + (learn is not None) > 1:
        raise WeftError("--search, --greedy and --learn are three ways to choose what goes in: give one of them")
    if not search:
        _refuse({"--trials": trials, "--range": span, "--l1": l1, "--sampler": sampler}, "it is for --search")
    if learn is None:
        _refuse({"--steps": steps}, "it is for --learn")
    else:
        return Learn(learn, steps=steps or Learn.steps)
    if not search:
        return Greedy() if greedy else None
    try:
        low, high = (Search.low, Search.high) if span is None else map(float, span.split(","))
    except ValueError:
        raise WeftError(f"--range {span}: expected two numbers with a comma between, as in -1.5,1.5") from None
    return Search(trials or Search.trials, low, high, l1 or 0.0, fixed, sampler or Search.sampler)


def _listed(known: Mapping[str, Any]) -> str:
    import dataclasses

    rows: list[tuple[str, ...]] = [("rule", "what it computes", "options")]
    for name, cls in known.items():
        options = ", ".join(f"{f.name}={f.default}" for f in dataclasses.fields(cls)) or "-"
        rows.append((name, (cls.__doc__ or "").split("\n\n")[0].replace("\n", " "), options))
    return table(rows)


def _shares(weights: str | None, inputs: list[str]) -> dict[str, float]:
    from weft.errors import WeftError

    if weights is None:
        return dict.fromkeys(inputs, 1.0)
    try:
        numbers = [float(w) for w in weights.split(",")]
    except ValueError:
        raise WeftError(f"--weights {weights}: expected numbers with commas between, as in 0.7,0.3") from None
    if len(numbers) != len(inputs):
        raise WeftError(f"--weights {weights}: {len(numbers)} weights for {len(inputs)} inputs; give one for each")
    return dict(zip(inputs, numbers, strict=True))
