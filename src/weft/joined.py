"""Adapters in folders under a router, as a folder; and what the router of an adapter chooses on given text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from weft.attach import free_name, records, use
from weft.combined import mean_loss, spread
from weft.core.choices import Choices, recording
from weft.core.router import Router
from weft.errors import AdapterError
from weft.gate import held_out, inputs_of
from weft.interop.folder import save
from weft.joining import join
from weft.parity import Parity, parity
from weft.reopen import adapter_folder, reopen

__all__ = ["Chosen", "JoinedFolder", "chosen_by", "join_folders"]

_TOKENS = 8
"""Tokens that are named for each expert."""


@dataclass(frozen=True)
class JoinedFolder:
    """A router over adapters, written; the loss of each part and of the whole on the same rows."""

    folder: Path
    router: str
    experts: tuple[str, ...]
    num_parameters: int
    source: str
    losses: Mapping[str, float]
    parity: Parity

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.router} over {', '.join(self.experts)}, {self.num_parameters:,} trained parameters"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """A table of losses, the head first."""
        return [("", f"loss on {self.source}"), *((name, f"{loss:.4f}") for name, loss in self.losses.items())]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "folder": str(self.folder), "parity": asdict(self.parity)}


def join_folders(
    folders: Sequence[Path],
    router: Router,
    out: Path,
    *,
    train_experts: bool = False,
    base: str | None = None,
    data: Sequence[str] | None = None,
    any_base: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> JoinedFolder:
    """Open adapters on their base, put them under a router (`weft.join`), measure all of them, and write the result.

    data: rows to measure on; by default the first adapter's own held-out data, else the text that comes with Weft.
    Raises AdapterError for a folder that is there, AdapterFileError for adapters of different bases, and TargetError
    for what the router cannot weigh.
    """
    if out.exists():
        raise AdapterError(f"{out} is there already: name a new folder for the joined adapter")
    opened = reopen([*folders], base=base, any_base=any_base)
    name = free_name(opened.model, "joined")
    plan = join(opened.model, router, opened.names, name=name, train_experts=train_experts)
    say(f"{router.name} over {', '.join(opened.names)} at {len(plan.sites)} sites of {opened.base}")
    source, examples = spread(opened, data)
    losses = {}
    for each in (None, *opened.names, name):
        use(opened.model, each)
        losses[each or "base"] = mean_loss(opened, examples)
    checked = parity(opened.model, name, inputs_of(opened, examples, rows=8))
    parents = [{"name": n, "folder": str(adapter_folder(f))} for n, f in zip(opened.names, folders, strict=True)]
    provenance = {"joined": {"parents": parents}, "metrics": {"source": source, **losses}, "base": opened.base}
    if opened.recipe is not None and opened.recipe.get("task") == "classification":
        provenance["recipe"] = opened.recipe
    save(opened.model, out, name, provenance=provenance)
    return JoinedFolder(out, router.name, opened.names, plan.num_parameters, source, losses, checked)


@dataclass(frozen=True)
class Chosen:
    """What a router chose. shares: by address, how much each expert counted, of all of them.

    tokens: by expert, the pieces of text that it counted most for, beyond its share of all text, with that surplus.
    """

    source: str
    shares: Mapping[str, Mapping[str, float]]
    tokens: Mapping[str, Sequence[tuple[str, float]]]

    @property
    def experts(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(dict.fromkeys(name for own in self.shares.values() for name in own))

    def rows(self) -> list[tuple[str, ...]]:
        """A table of shares by kind of module, the head first."""
        kinds: dict[str, list[Mapping[str, float]]] = {}
        for address, own in self.shares.items():
            kinds.setdefault(address.rpartition(".")[2], []).append(own)
        found: list[tuple[str, ...]] = [("module", *self.experts)]
        for kind, each in kinds.items():
            means = [sum(own.get(name, 0.0) for own in each) / len(each) for name in self.experts]
            found.append((kind, *(f"{mean:.1%}" for mean in means)))
        return found

    def plot(self, file: Path) -> Path:
        """Draw the shares of all sites (svg, png)."""
        from weft.report.choices import plot_shares

        return plot_shares(self.shares, self.experts, file)


def chosen_by(
    adapter: Path,
    *,
    base: str | None = None,
    data: Sequence[str] | None = None,
    rows: int = 8,
    any_base: bool = False,
) -> Chosen:
    """Run text through an adapter that is a router, and say which experts counted where; AdapterError for any other."""
    opened = reopen([adapter], base=base, any_base=any_base)
    name = opened.names[0]
    if not isinstance(records(opened.model)[name].plan.method, Router):
        raise AdapterError(f"{adapter} is a {records(opened.model)[name].plan.method.name}: only a router chooses")
    source, examples = held_out(opened, data)
    inputs = inputs_of(opened, examples, rows=rows)
    use(opened.model, name)
    with torch.no_grad(), recording() as choices:
        opened.model(**inputs)
    real = inputs["attention_mask"].flatten().bool().cpu()
    words = [str(opened.tokenizer.decode([i])) for i in inputs["input_ids"].flatten()[real].tolist()]
    return Chosen(source, choices.shares(real), _favourites(choices, words, real))


def _favourites(choices: Choices, words: Sequence[str], real: torch.Tensor) -> dict[str, list[tuple[str, float]]]:
    """For each expert the tokens whose gate is the furthest above its mean, averaged over sites."""
    counts = Counter(words)
    found: dict[str, list[tuple[str, float]]] = {}
    for name in dict.fromkeys(n for names in choices.names.values() for n in names):
        columns = []
        for address, names in choices.names.items():
            gates = choices.gates(address)
            if name in names and len(gates) == len(real):
                columns.append(gates[real, names.index(name)])
        if not columns:
            continue
        mean = torch.stack(columns).mean(0)
        surplus: dict[str, float] = {}
        for word, gain in zip(words, (mean - mean.mean()).tolist(), strict=True):
            surplus[word] = surplus.get(word, 0.0) + gain / counts[word]
        best = sorted(surplus.items(), key=lambda item: -item[1])[:_TOKENS]
        found[name] = [(word, gain) for word, gain in best if gain > 0]
    return found
