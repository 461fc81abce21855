"""Whole checkpoints combined: coefficients chosen and results measured in memory, then written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from weft.base import load_base
from weft.checkpoints import CheckpointError, Merged
from weft.checkpoints.merge import Recipe, open_weights, refuse_taken, run, tensors_of, whole
from weft.combine import Rule, RuleError, rules
from weft.combined import Figures, database, mean_loss, search_key, spread
from weft.reopen import Reopened
from weft.searching import Chosen, Greedy, Search, choose

__all__ = ["MergedFolder", "merge_folders"]


@dataclass(frozen=True)
class MergedFolder:
    """What was written and how it does. figures: on the data, and on test data, where any is named."""

    made: Merged
    figures: tuple[Figures, ...]
    chosen: Chosen | None = None

    def __str__(self) -> str:
        return "\n".join(str(part) for part in (self.chosen, self.made) if part is not None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "folder": str(self.made.folder),
            "tensors": self.made.num_tensors,
            "bytes": self.made.num_bytes,
            "figures": [asdict(figures) for figures in self.figures],
            "chosen": None if self.chosen is None else self.chosen.as_dict(),
        }


def merge_folders(
    models: Mapping[str, float],
    rule: Rule,
    out: Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    data: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
    how: Search | Greedy | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> MergedFolder:
    """Merge checkpoints (`weft.checkpoints.merge_checkpoints`); with data, measure base, parents and result on it.

    test: more rows to measure them on. how: choose weights and options, or members, by the loss on `data`: one model is
        held in memory, and every combination is written into its weights. The search goes on from a file beside `out`
        when it is started again.
    Raises CheckpointError before anything is written where the models do not fit together or `out` is there already.
    """
    if (how is not None or test is not None) and data is None:
        raise RuleError("coefficients are chosen by the loss on data: name the data")
    refuse_taken(out)
    options: dict[str, Any] = {"base": base, "dtype": dtype, "seed": seed}
    recipe = whole(models, rule, **options)
    if data is None:
        return MergedFolder(run(recipe, out, say=say), ())
    first = base or next(iter(models))
    model, tokenizer = load_base(str(open_weights(first).folder))
    opened = Reopened(model, tokenizer, first, (), "causal-lm", None)
    known = [spread(opened, data), *([spread(opened, test)] if test else [])]

    def loss_of(parts: Recipe, examples: Sequence[Any]) -> float:
        _fill(model, parts)
        return mean_loss(opened, examples)

    chosen, parents = None, dict(models)
    if how is not None:
        files = sorted({stored.file for name in (*models, first) for stored in open_weights(name).values()})
        key = search_key(how, rule, parents, known[0][1], files, seed=seed)

        def tried(weights: Mapping[str, float], with_rule: Rule) -> float:
            return loss_of(whole(weights, with_rule, **options), known[0][1])

        chosen = choose(how, tried, parents, rule, file=database(out), key=key, seed=seed, say=say)
        recipe = whole(chosen.weights, chosen.rule, **options)
    alone = {"base": base} if base else {}
    each = {n: whole({m: 1.0}, rules()["passthrough"]()) for n, m in (alone | {m: m for m in models}).items()} | {
        "merged": recipe
    }
    losses = {name: [loss_of(parts, rows) for _, rows in known] for name, parts in each.items()}
    figures = tuple(
        Figures(source, {name: found[i] for name, found in losses.items()}, how is not None and not i)
        for i, (source, _) in enumerate(known)
    )
    return MergedFolder(run(recipe, out, say=say), figures, chosen)


@torch.no_grad()
def _fill(model: torch.nn.Module, recipe: Recipe) -> None:
    """Put the tensors of a merge into a model's weights."""
    held = model.state_dict()
    for name, tensor in tensors_of(recipe):
        if name not in held or held[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} of the files is no weight of the loaded model (it is stored in another form), so merges "
                "cannot be measured in memory: leave the data out, and measure what is written"
            )
        held[name].copy_(tensor)
