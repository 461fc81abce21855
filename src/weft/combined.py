"""Combining adapter folders: checked before, chosen and measured on data, and written with where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.adapter import TENSORS
from weft.aligning import combine_aligned
from weft.attach import detach, free_name, use
from weft.coefficients import Learn, Learned, learn_coefficients
from weft.combine import Rule, RuleError, rules
from weft.combining import Combination, Weight, combine, said_weight
from weft.conflict import Conflict, conflict
from weft.errors import AdapterError
from weft.gate import held_out, inputs_of
from weft.interop.folder import save
from weft.own_data import own_statistics
from weft.parity import Parity, parity
from weft.reopen import Reopened, adapter_folder, reopen
from weft.searching import Chosen, Greedy, Search, choose

__all__ = ["CombinedFolder", "Figures", "combine_folders", "database", "mean_loss", "search_key", "spread"]

_ROWS = 64  # measured at most, evenly spread over the data


@dataclass(frozen=True)
class Figures:
    """Loss per token of the first (the base, where there is one), the parents and the result. seen: by a search."""

    source: str
    losses: Mapping[str, float]
    seen: bool = False

    def rows(self) -> list[tuple[str, ...]]:
        """A table."""
        first = next(iter(self.losses))
        lines = [(name, f"{loss:.4f}", f"{loss - self.losses[first]:+.4f}") for name, loss in self.losses.items()]
        what = f"loss on {self.source}{' (chosen on it)' if self.seen else ''}"
        return [(what, "per token", f"against {'the base' if first == 'base' else first}"), *lines]


@dataclass(frozen=True)
class CombinedFolder:
    """What was made and how it does. figures: on the data, and on test data if any; chosen: by a search."""

    folder: Path
    made: Combination
    conflict: Conflict | None
    parity: Parity
    figures: tuple[Figures, ...]
    chosen: Chosen | Learned | None = None

    def __str__(self) -> str:
        found = [self.chosen, self.made, self.conflict, self.parity]
        return "\n".join([*(str(part) for part in found if part is not None), f"written: {self.folder}"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "folder": str(self.folder),
            "rule": {"name": self.made.rule.name, **asdict(self.made.rule)},
            "parents": dict(self.made.parents),
            "parameters": self.made.plan.num_parameters,
            "losses": dict(self.made.losses),
            "conflict": None if self.conflict is None else [asdict(s) for s in self.conflict.sites],
            "parity": asdict(self.parity),
            "source": self.figures[0].source,
            "figures": dict(self.figures[0].losses),
            "test": asdict(self.figures[1]) if len(self.figures) > 1 else None,
            "chosen": None if self.chosen is None else self.chosen.as_dict(),
        }


def combine_folders(
    folders: Sequence[Path],
    rule: Rule,
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    loss: float | None = None,
    base: str | None = None,
    data: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
    own: Sequence[str] | None = None,
    how: Search | Greedy | Learn | None = None,
    plot: Path | None = None,
    align: bool = False,
    seed: int = 0,
    any_base: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> CombinedFolder:
    """Open adapters on their base, combine them (`weft.combining.combine`), and write the result as a folder.

    data: rows to measure base, parents and result on; by default the first adapter's own held-out data, else the text
        that comes with Weft. test: more rows to measure them on. plot: where to draw the predicted conflict.
    own: of each adapter rows of its own, for rules that weigh models by them (`fisher`, `regmean`).
    how: choose weights and options, or members, by the loss on `data`, which must be named then, or learn a sum's
        weights on it; a search goes on from a file beside `out` when it is started again.
    align: the mean of bottleneck adapters with aligned hidden units (`weft.aligning`); the rule is linear then.
    Raises AdapterFileError for adapters of different bases, unless `any_base`; AdapterError for one that no weight can
    express, and for a folder that is there already.
    """
    if out.exists():
        raise AdapterError(f"{out} is there already: name a new folder for the combined adapter")
    if how is not None and data is None:
        raise RuleError("coefficients are chosen by the loss on data: name the data")
    if align and (rule != rules()["linear"]() or rank or loss is not None or plot is not None):
        raise RuleError("aligned adapters are averaged as they are: use linear, without options, rank, loss and plot")
    opened = reopen([*folders], base=base, any_base=any_base)
    found = None if align else _conflict(opened, plot, say)
    start = dict(zip(opened.names, weights or [1.0] * len(opened.names), strict=True))
    parents: dict[str, Weight] = {**start}
    name = free_name(opened.model, "combined")
    known = [spread(opened, data), *([spread(opened, test)] if test else [])]
    statistics = _Own(opened, rule, own)

    def make(parts: Mapping[str, Any], with_rule: Rule) -> Combination:
        if align:
            return combine_aligned(opened.model, parts, name=name).as_combination()
        said = statistics(parts, with_rule)
        return combine(opened.model, parts, with_rule, name=name, rank=rank, loss=loss, statistics=said, seed=seed)

    chosen: Chosen | Learned | None = None
    if isinstance(how, Learn):
        _refuse_no_sum(rule, len(parents))
        chosen = learn_coefficients(
            opened.model, opened.names, opened.tokenizer, known[0][1], how, task=opened.task, seed=seed, say=say
        )
        parents = dict(chosen.weights)
    elif how is not None:

        def tried(parts: Mapping[str, float], with_rule: Rule) -> float:
            make(parts, with_rule)
            found = _measured(opened, known[0][1], [name])[name]
            detach(opened.model, name)
            return found

        files = [adapter_folder(f) / TENSORS for f in folders]
        key = search_key(how, rule, start, known[0][1], files, (rank, loss, align), seed)
        chosen = choose(how, tried, start, rule, file=database(out), key=key, seed=seed, say=say)
        parents, rule = dict(chosen.weights), chosen.rule
    made = make(parents, rule)
    order = [None, *opened.names, name]
    figures = tuple(
        Figures(w, _measured(opened, rows, order), how is not None and not i) for i, (w, rows) in enumerate(known)
    )
    use(opened.model, name)
    checked = parity(opened.model, name, inputs_of(opened, known[0][1], rows=8))
    result = CombinedFolder(out, made, found, checked, figures, chosen)
    save(opened.model, out, name, provenance=_provenance(result, opened, folders, seed))
    (out / "README.md").write_text(_card(result, opened.base), encoding="utf-8")
    return result


class _Own:
    """What a rule needs of the adapters' own rows: measured once, unless it depends on what they are combined with."""

    def __init__(self, opened: Reopened, rule: Rule, own: Sequence[str] | None):
        _check_own(rule, own, len(opened.names))
        self.opened = opened
        self.found: dict[str, dict[str, Tensor]] | None = None
        self.rows = {n: spread(opened, [path])[1] for n, path in zip(opened.names, own or (), strict=False)}

    def __call__(self, parts: Mapping[str, Weight], rule: Rule) -> dict[str, dict[str, Tensor]] | None:
        if not self.rows:
            return None
        if self.found is None or getattr(rule, "through", "own") != "own":
            opened = self.opened
            self.found = own_statistics(opened.model, parts, rule, opened.tokenizer, self.rows, task=opened.task)
        return self.found


def _check_own(rule: Rule, own: Sequence[str] | None, count: int) -> None:
    if own is not None and not rule.needs:
        raise RuleError(f"{rule.name} weighs no adapter by data of its own: leave --own out")
    if rule.needs and len(own or ()) != count:
        raise RuleError(
            f"{rule.name} weighs every adapter by data of its own: name rows for each of the {count} with --own, in "
            f"their order; there are {len(own or ())}"
        )


def _refuse_no_sum(rule: Rule, count: int) -> None:
    if rule.factors((1.0,) * count) != (1.0,) * count:
        raise RuleError(f"weights are learned of a plain sum, which {rule.name} is not: use task_arithmetic")


def _conflict(opened: Reopened, plot: Path | None, say: Callable[[str], None]) -> Conflict | None:
    if len(opened.names) < 2:
        if plot is not None:
            raise AdapterError("--plot shows the conflict between adapters, and there is one")
        return None
    found = conflict(opened.model, opened.names)
    say(str(found))
    if plot is not None:
        found.plot(plot)
    return found


def _provenance(result: CombinedFolder, opened: Reopened, folders: Sequence[Path], seed: int) -> dict[str, Any]:
    """Where an adapter comes from, for weft.json."""
    places = dict(zip(opened.names, folders, strict=True))
    rule, chosen = result.made.rule, result.chosen
    return {
        "combined": {
            "rule": {"name": rule.name, **asdict(rule)},
            "parents": [
                {"name": n, "weight": w, "folder": str(adapter_folder(places[n]))}
                for n, w in result.made.parents.items()
            ],
            "loss": result.made.loss,
            "seed": seed,
            "chosen": None if chosen is None else str(chosen),
        },
        "metrics": {"source": result.figures[0].source, **result.figures[0].losses},
        "base": opened.base,
    }


def _card(found: CombinedFolder, base: str) -> str:
    """What a reader of the folder wants to know first."""
    parents = "\n".join(f"- {said_weight(weight)} x `{name}`" for name, weight in found.made.parents.items())
    options = ", ".join(f"{key}={value}" for key, value in asdict(found.made.rule).items()) or "no options"
    tables = [
        "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))
        for head, *lines in (figures.rows() for figures in found.figures)
    ]
    rows = "\n\n".join(tables)
    lost = found.made.note or f"At most {found.made.loss:.2%} of the combined change's norm was lost at a site"
    return (
        f"# {found.folder.name}\n\nAn adapter for `{base}`, combined by the rule `{found.made.rule.name}` ({options}) "
        f"out of:\n\n{parents}\n\n{lost}.\n\n"
        f"{rows}\n\n```text\n{found.parity}\n```\n"
    )


def spread(opened: Reopened, data: Sequence[str] | None) -> tuple[str, Sequence[Any]]:
    """What data it is, and its rows, or so many of them that a measurement takes moments."""
    source, examples = held_out(opened, data)
    if len(examples) <= _ROWS:
        return source, examples
    return source, [examples[i * len(examples) // _ROWS] for i in range(_ROWS)]


def mean_loss(opened: Reopened, examples: Sequence[Any]) -> float:
    """The mean loss per trained token of a model as it stands."""
    from weft.tune.evaluate import measure

    return float(measure(opened.model, opened.tokenizer, examples, task=opened.task, batch_size=8)["loss"])


def _measured(opened: Reopened, examples: Sequence[Any], names: Sequence[str | None]) -> dict[str, float]:
    """The mean loss with each adapter; None is the base."""
    figures = {}
    for name in names:
        use(opened.model, name)
        figures[name or "base"] = mean_loss(opened, examples)
    return figures


def database(out: Path) -> Path:
    """Where a search for the folder `out` keeps its trials."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(f"{out.name}.search.sqlite")


def search_key(
    how: Search | Greedy, rule: Rule, parents: Mapping[str, float], examples: Sequence[Any], files: Sequence[Path],
    more: tuple[Any, ...] = (), seed: int = 0,
) -> str:  # fmt: skip
    """A name for a search that differs where a trial of one would not hold for the other; more trials may come."""
    settings = {k: v for k, v in asdict(how).items() if k != "trials"}
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    rows = [(e.input_ids, e.labels) for e in examples]
    text = repr((settings, rule, [*parents.items()], stamps, rows, more, seed))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
