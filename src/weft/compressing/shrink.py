"""An adapter made smaller: at a loss that is stated, measured, and held or refused, or to a stated size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import nn

from weft.attach import detach, records
from weft.compress import ALPHAS, Code
from weft.compressing.coding import SETTINGS, Codes
from weft.compressing.measure import Roots, num_bytes
from weft.compressing.ranks import Ranks
from weft.compressing.rungs import Chosen, Ladder, Unreachable, under, within
from weft.targets import Plan

__all__ = ["WAYS", "Shrunk", "Way", "shrink"]

Way = Literal["principal", "bits", "one_bit", "compeft"]
WAYS: tuple[str, ...] = ("principal", *SETTINGS)
"""principal: LoRA of the ranks that the singular values ask for; the others: the adapter's own tensors in code."""

_ROUNDS = 7  # of bisection: the bound on the weights is found to 1/128
_TIGHTER = (1.0, 0.99)  # a loss within rounding of the stated one may be measured on its other side


@dataclass(frozen=True)
class Shrunk:
    """An adapter made as small as a stated loss allows, or as good as a stated size.

    plan: of what was made, or None where it was refused. settings: by address, what was chosen: a rank, (bits, group
    size), or the share of entries that are kept. codes: of the tensors that are written in code.
    losses: by address, measured on what was made, the share of the norm that is lost of the change (of the change of
    the output, of the tensors: see `of`). before, after: loss per token of the adapter and of what was made of it,
    where that was asked for. refused: why there is none, or empty. alpha: of compeft, where it was tuned and is better
    than the scales that come nearest to the tensors.
    """

    name: str
    way: str
    plan: Plan | None
    losses: Mapping[str, float]
    bytes_before: int
    bytes_after: int
    before: float | None = None
    after: float | None = None
    refused: str = ""
    of: str = "change"
    settings: Mapping[str, Any] = field(default_factory=dict)
    codes: Mapping[str, Code] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def growth(self) -> float | None:
        """By what share the loss per token grew."""
        return None if self.before is None or self.after is None else (self.after - self.before) / self.before


class _Maker(Protocol):
    """A way to write an adapter smaller, of which every site has several."""

    codes: dict[str, Code]
    norms: dict[str, float]

    def ladder(self) -> Ladder: ...
    def put(self, chosen: Chosen) -> None: ...
    def losses(self) -> dict[str, float]: ...
    def num_bytes(self) -> int: ...


@torch.no_grad()
def shrink(
    model: nn.Module,
    source: str,
    *,
    name: str,
    way: Way = "principal",
    loss: float | None = None,
    size: float | None = None,
    loss_of: Callable[[str], float] | None = None,
    roots: Roots | None = None,
) -> Shrunk:
    """Put a copy of an adapter on its model that is as small as a stated loss allows; every site for itself.

    loss: the largest share of the norm of the change that may be lost at a site. With `loss_of`, which measures the
        loss per token of an adapter, instead the largest share by which that may grow; the bound on the weights that
        keeps it is found by bisection. The alpha of compeft is then the one of the paper's for which it is smallest.
    size: instead of a loss, the share of its bytes that may remain: what is lost in all is then as little as can be.
    roots: of inputs (`input_roots`): what is lost is then measured in the sites' outputs on these.
    The result holds its loss as measured on the tensors that it has, or it is refused and the model keeps none: where
    the loss cannot be reached, or only by an adapter that is no smaller.
    """
    if (loss is None) == (size is None):
        raise ValueError("a loss or a size says how much of an adapter is kept: give one of them")
    if way not in WAYS:
        raise ValueError(f"there is no way {way!r} to make one adapter smaller: {', '.join(WAYS)}")
    task = _Task(model, source, name, way, num_bytes(model, source), loss_of, roots)
    try:
        found = task.to_size(size) if size is not None else task.to_loss(loss or 0.0)
    except BaseException:
        if name in records(model):
            detach(model, name)
        raise
    if found.refused:
        detach(model, name)
    return found


class _Task:
    """One adapter, one way to make it smaller, and what is asked of the result."""

    def __init__(
        self, model: nn.Module, source: str, name: str, way: str, size: int,
        loss_of: Callable[[str], float] | None, roots: Roots | None,
    ):  # fmt: skip
        self.model, self.source, self.name, self.way, self.size, self.loss_of = model, source, name, way, size, loss_of
        self.maker: _Maker
        of = "change" if roots is None else "output"
        if way == "principal":
            self.maker = Ranks(model, source, name, roots)
        else:
            codes = Codes(model, source, name, way, roots)
            self.maker, of = codes, of if codes.changes is not None else "tensors"
        self.ladder = self.maker.ladder()
        self.empty = Shrunk(source, way, None, {}, size, size, of=of)

    def to_size(self, share: float) -> Shrunk:
        """As good as so many bytes allow."""
        budget = int(share * self.size)
        allowed = budget - self.size_of(within(self.ladder, float("inf")))
        before = None if self.loss_of is None else self.loss_of(self.source)
        while True:
            try:
                chosen = under(self.ladder, self.maker.norms, allowed)
            except Unreachable:
                least = sum(min(r.num_bytes for r in rungs) for rungs in self.ladder.values()) + budget - allowed
                why = (
                    f"the smallest that {self.way} makes takes {least:,} bytes, more than {share:.3%} of {self.size:,}"
                )
                return replace(self.empty, bytes_after=least, refused=why)
            found = self.made(chosen, before)
            if found.bytes_after <= budget:
                return self.tuned(found, chosen)
            allowed -= found.bytes_after - budget  # an index of longer numbers

    def size_of(self, smallest: Chosen) -> int:
        """Bytes of what is not chosen: tensors that stay, and the index of those that are packed."""
        self.maker.put(smallest)
        return self.maker.num_bytes() - sum(r.num_bytes for r in smallest.values())

    def to_loss(self, loss: float) -> Shrunk:
        """As small as the loss allows, and smaller than the adapter is."""
        found = self.by_weight(loss) if self.loss_of is None else self.by_task(loss, self.loss_of)
        if not found.refused and found.bytes_after >= self.size:
            why = f"a loss of at most {loss:.3%} takes {found.bytes_after:,} bytes, and the adapter has {self.size:,}"
            return replace(found, plan=None, refused=why)
        return found

    def by_weight(self, loss: float) -> Shrunk:
        found = self.empty
        for part in _TIGHTER:
            try:
                found = self.made(within(self.ladder, loss * part))
            except Unreachable as error:
                return replace(self.empty, refused=f"with {self.way}, {error}")
            if max(found.losses.values()) <= loss:
                return found
        worst = max(found.losses, key=lambda address: found.losses[address])
        why = f"rounding alone loses {found.losses[worst]:.2e} of the norm at {worst}, more than {loss:.2e}"
        return replace(found, plan=None, refused=why)

    def by_task(self, loss: float, loss_of: Callable[[str], float]) -> Shrunk:
        before = loss_of(self.source)
        known: dict[tuple[Any, ...], Shrunk] = {}

        def tried(bound: float) -> Shrunk:
            chosen = within(self.ladder, bound)
            key = tuple(r.setting for r in chosen.values())
            if key not in known:
                known[key] = self.made(chosen, before)
            return known[key]

        def holds(found: Shrunk) -> bool:
            return found.growth is not None and found.growth <= loss

        low = max((min(r.loss for r in rungs) for rungs in self.ladder.values()), default=0.0)
        high = max((r.loss for rungs in self.ladder.values() for r in rungs), default=0.0)
        best = tried(low)
        if not holds(best):
            why = f"the loss per token grows by {best.growth:.3%} with all that {self.way} keeps, more than {loss:.3%}"
            return replace(best, plan=None, refused=why)
        for _ in range(_ROUNDS):
            bound = (low + high) / 2
            found = tried(bound)
            low, high, best = (bound, high, found) if holds(found) else (low, bound, best)
        chosen = within(self.ladder, low)
        self.maker.put(chosen)  # the last that was tried may be another
        return self.tuned(replace(best, plan=records(self.model)[self.name].plan), chosen)

    def tuned(self, found: Shrunk, chosen: Chosen) -> Shrunk:
        """The same choice with the alpha for which the loss per token is smallest; bytes stay what they are."""
        if not isinstance(self.maker, Codes) or self.way != "compeft" or found.after is None:
            return found
        for alpha in (*ALPHAS, None):  # ends with the best one in the adapter
            self.maker.alpha = found.alpha if alpha is None else alpha
            made = replace(self.made(chosen, found.before), alpha=self.maker.alpha)
            if alpha is None or (made.after is not None and made.after < (found.after or 0.0)):
                found = made
        return found

    def made(self, chosen: Chosen, before: float | None = None) -> Shrunk:
        """The adapter of a choice, and what is lost by it."""
        self.maker.put(chosen)
        after = None if before is None or self.loss_of is None else self.loss_of(self.name)
        return replace(
            self.empty, plan=records(self.model)[self.name].plan, losses=self.maker.losses(),
            bytes_after=self.maker.num_bytes(), before=before, after=after,
            settings={address: r.setting for address, r in chosen.items()}, codes=self.maker.codes,
        )  # fmt: skip
