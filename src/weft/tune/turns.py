"""Optimisers that let layers take turns: what trains in the turn that takes the most memory, and in a middling one."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING, Any

from weft.optim.blocks import TakingTurns
from weft.targets import Plan
from weft.tune.optimizers import make_optimizer
from weft.tune.trained import planned_tensors

if TYPE_CHECKING:
    from weft.recipe import Train

__all__ = ["STAND_IN", "Turn", "turns"]

Turn = frozenset[int | None]
"""The layers whose tensors train; None: what is in no layer."""

STAND_IN: dict[str, Any] = {"name": "badam", "order": "ascending", "period": 10**9}
"""For a few layers that stand for many: the update of all that take turns, with turns that others decide."""

_MOST_TURNS = 200


def turns(train: Train, plan: Plan, *, num_steps: int, middling: bool = False) -> Turn | None:
    """What trains in the turn of a run that takes the most memory: the lowest layer, then the most numbers.

    middling: the turn whose lowest layer is nearest to the mean, which takes about the time of all on average. None
    where everything trains all the time.
    """
    tensors = planned_tensors(plan)
    optimizer = make_optimizer({}, train, tensors=tensors)
    if not isinstance(optimizer, TakingTurns):
        return None
    found: dict[Turn, int] = {}
    for number in range(min(-(-num_steps // optimizer.period), _MOST_TURNS)):
        optimizer.num_steps = number * optimizer.period
        optimizer.restored()
        active = [t for t in tensors.trained if t.parameter.requires_grad]
        found[frozenset(t.layer for t in active)] = sum(t.parameter.numel() for t in active)
    if not middling:
        return min(found, key=lambda turn: (_lowest(turn), -found[turn]))
    middle = mean(map(_lowest, found))
    return min(found, key=lambda turn: abs(_lowest(turn) - middle))


def _lowest(turn: Turn) -> int:
    """The lowest layer that gradients reach; what is in no layer may be below all of them."""
    return -1 if None in turn else min((n for n in turn if n is not None), default=-1)
