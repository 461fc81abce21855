"""What adapters' own data says of the places that they adapt: for rules that weigh models by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.attach import detach, free_name, records, use, weave_of
from weft.calibrate import measured
from weft.combine import Rule, RuleError
from weft.combining import Weight, combine
from weft.conditions import tell
from weft.core.parts import Layers
from weft.core.route import Route
from weft.data import Batch, Example, collate
from weft.objectives import loss_of
from weft.targets import PlannedSite, walk
from weft.tune.evaluate import device_of, evaluating, pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["own_statistics"]


def own_statistics(
    model: nn.Module,
    adapters: Mapping[str, Weight],
    rule: Rule,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Sequence[Example]],
    *,
    task: str = "causal-lm",
) -> dict[str, dict[str, Tensor]]:
    """By adapter and address what a rule needs, for `weft.combine(..., statistics=...)`.

    Every adapter is in use while its own rows are read, at all places that any of them adapts. covariance: the mean of
    x x^T of the inputs x, [I, I]; fisher: the mean over rows of the squared gradient of a row's loss in the weight,
    [O, I, *kernel]. A rule with through="merged" gets, layer by layer, the inputs that the layers below make once they
    are combined; places outside of numbered layers keep those of the adapter alone.
    Raises RuleError for a rule that needs none, for an adapter without rows, and for places that cannot be measured.
    """
    sites = {s.site.address: s for name in adapters for s in records(model)[name].plan.sites}
    _check(adapters, rule, rows, sites.values())
    own = _Own(model, rule.needs, tokenizer, rows, task)
    before: Route = weave_of(model).route
    try:
        found = {name: own(name, name, [*sites.values()]) for name in adapters}
        if getattr(rule, "through", "own") == "merged":
            _through_merged(model, adapters, rule, own, sites, found)
    finally:
        use(model, before)
    return found


def _through_merged(
    model: nn.Module,
    adapters: Mapping[str, Weight],
    rule: Rule,
    own: _Own,
    sites: Mapping[str, PlannedSite],
    found: dict[str, dict[str, Tensor]],
) -> None:
    """Each layer's statistics anew, over the layers below as they will be; `found` is changed."""
    layers = sorted({s.site.layer for s in sites.values() if s.site.layer is not None})
    done: dict[str, str] = {}
    try:
        for layer in layers:
            here = [s for s in sites.values() if s.site.layer == layer]
            for name in adapters if done else ():
                found[name] |= own(name, Layers({**done, f"{layer}-{layers[-1]}": name}), here)
            merged = free_name(model, f"layer-{layer}")
            combine(model, adapters, rule, name=merged, statistics=found, layers={layer})
            done[str(layer)] = merged
    finally:
        for name in done.values():
            detach(model, name)


class _Own:
    """Measures at some sites of a model, under a route, on the rows of one of its adapters."""

    def __init__(
        self,
        model: nn.Module,
        what: str,
        tokenizer: PreTrainedTokenizerBase,
        rows: Mapping[str, Sequence[Example]],
        task: str,
    ):
        self.model, self.what, self.loss, self.modules = model, what, loss_of(task), dict(walk(model))
        self.batches = {
            name: [collate([row], pad_token=pad_token(tokenizer)).to(device_of(model)) for row in own]
            for name, own in rows.items()
        }

    def __call__(self, name: str, route: Any, sites: Sequence[PlannedSite]) -> dict[str, Tensor]:
        use(self.model, route)
        with evaluating(self.model), torch.enable_grad():
            return measured(self._mean, self.what, sites, self.modules, self.batches[name])

    def _mean(self, batch: Batch) -> Tensor:
        tell(self.model, batch.conditions)
        total, count, _ = self.loss(self.model, batch)
        mean: Tensor = total / count
        return mean


def _check(
    adapters: Iterable[str], rule: Rule, rows: Mapping[str, Sequence[Example]], sites: Iterable[PlannedSite]
) -> None:
    if not rule.needs:
        raise RuleError(f"{rule.name} weighs no model by its own data")
    for name in adapters:
        if not rows.get(name):
            raise RuleError(f"{rule.name} weighs {name} by its own data, and there are no rows of it: give some")
    for planned in sites:
        kind = planned.site.kind
        if kind not in (("linear",) if rule.needs == "covariance" else ("linear", "conv", "embedding")):
            raise RuleError(
                f"{rule.name} weighs models by the {rule.needs} at every place, and {planned.site.address} is of kind "
                f"{kind}, where none is measured: use another rule"
            )
