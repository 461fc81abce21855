"""Statistics of calibration data at the sites of a plan, for starts that depend on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from weft.kinds.entry import token_ids
from weft.kinds.seat import Weave
from weft.kinds.settle import input_of
from weft.targets import Plan, PlannedSite, walk

__all__ = ["collect", "measured"]

_COLLECTED = frozenset({"covariance", "gradient", "curvature", "fisher"})
"""What data can tell; the rest of what starts need comes from whoever quantised the base."""


def collect(model: nn.Module, plan: Plan, calibration: Iterable[Any] | None) -> dict[str, dict[str, Tensor]]:
    """The statistics that a plan's methods need, by address: input covariances [I, I], weight gradients [O, I], what
    the Hessian of all these weights makes of them ("curvature"), the mean of their squares over rows of data
    ("fisher"), and what attentions keep of a method's own text ("cache").

    calibration: batches, mappings or tuples of the model's arguments; a gradient needs the model's result to have a
    `loss`, or to be one. Raises ValueError when statistics are needed and there is no data.
    """
    asked = frozenset().union(*(s.method.needs() for s in plan.sites))
    needed = asked & _COLLECTED
    if not needed and "cache" not in asked:
        return {}
    batches = list(calibration or ())
    if needed and not batches:
        raise ValueError(
            f"{plan.method} starts from the {' and '.join(sorted(needed))} of data: pass calibration=batches"
        )
    modules = dict(walk(model))
    found: dict[str, dict[str, Tensor]] = {s.site.address: {} for s in plan.sites}
    with _as_base(model):
        if "cache" in asked:
            _caches(plan, modules, found)
        for what in sorted(needed):
            every = [row for batch in batches for row in _rows(batch)] if what == "fisher" else batches
            sites = [s for s in plan.sites if what in s.method.needs()]
            for address, t in measured(partial(_call, model), what, sites, modules, every).items():
                found[address][what] = t
    return found


def measured(
    call: Callable[[Any], Any],
    what: str,
    sites: Sequence[PlannedSite],
    modules: Mapping[str, nn.Module],
    batches: Sequence[Any],
) -> dict[str, Tensor]:
    """One of these statistics by address, of a model as it stands: `call` runs it on a batch."""
    return (
        _covariances(call, sites, modules, batches)
        if what == "covariance"
        else _gradients(what, call, sites, modules, batches)
    )


@contextmanager
def _as_base(model: nn.Module) -> Iterator[None]:
    """The base without dropout and without what other adapters change: an adapter starts from the base."""
    modes = [(m, m.training) for m in model.modules()]
    weave = model.__dict__.get("weave")
    before = None if weave is None else weave.route
    model.eval()
    try:
        if weave is not None:
            weave.route = None
        yield
    finally:
        if weave is not None:
            weave.route = before
        for module, training in modes:
            module.training = training


def _covariances(
    call: Callable[[Any], Any], sites: Sequence[PlannedSite], modules: Mapping[str, nn.Module], batches: Sequence[Any]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(planned: PlannedSite) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).double()
            address = planned.site.address
            found[address] = found.get(address, 0) + x.mT @ x
            counts[address] = counts.get(address, 0) + len(x)

        return modules[planned.path].register_forward_pre_hook(hook)

    handles = [watch(s) for s in sites]
    try:
        with torch.no_grad():
            for batch in batches:
                call(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {address: (t / counts[address]).float() for address, t in found.items()}


@torch.no_grad()
def _caches(plan: Plan, modules: Mapping[str, nn.Module], found: dict[str, dict[str, Tensor]]) -> None:
    """The keys and values [N, O] that every attention keeps of the first tokens of its method's own text."""
    sites = [s for s in plan.sites if "cache" in s.method.needs()]
    for method in {s.method: None for s in sites}:
        here: list[Any] = [s for s in sites if s.method == method]
        wanted: Any = method
        backbone: Any = modules[input_of(here[0].path, modules)]
        ids = list(wanted.init_ids) if wanted.init_ids is not None else token_ids(backbone, wanted.init_text)
        if len(ids) < wanted.num_tokens:
            raise ValueError(
                f"{method.name} keeps num_tokens={wanted.num_tokens} of its document, which has {len(ids)} tokens: "
                "lower num_tokens, or give a longer one"
            )
        first = torch.tensor([ids[: wanted.num_tokens]], device=here[0].site.device)
        layers = backbone(input_ids=first, use_cache=True).past_key_values.layers
        for planned in here:
            layer = layers[modules[planned.path].layer_idx]
            kept = {"keys": layer.keys, "values": layer.values}  # [1, heads, N, size]
            found[planned.site.address] |= {k: v[0].transpose(0, 1).flatten(1) for k, v in kept.items()}


def _gradients(
    what: str,
    call: Callable[[Any], Any],
    sites: Sequence[PlannedSite],
    modules: Mapping[str, nn.Module],
    batches: Sequence[Any],
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seats = [s.offer.seat(modules[s.path], s.site, Weave(), s.offer.param) for s in sites]
    weights = [seat.stored() for seat in seats]
    for planned, w in zip(sites, weights, strict=True):
        if not w.is_floating_point() or type(w.data) is not Tensor:
            raise ValueError(
                f"{planned.method.name} asks for the gradient of a weight, and {planned.site.address} is quantised, "
                "so it has none: make the adapter on the base as it was, save it, and load it on the quantised one"
            )
    flags = [w.requires_grad for w in weights]
    try:
        for w in weights:
            w.requires_grad_(True)
        for batch in batches:
            with _twice(what):
                result = call(batch)
            loss = result if isinstance(result, Tensor) else getattr(result, "loss", None)
            if loss is None or loss.numel() != 1:
                raise ValueError(
                    "a gradient needs a loss: give calibration batches with `labels`, or a model that returns one"
                )
            for planned, seat, g in zip(sites, seats, _slopes(loss, weights, what), strict=True):
                address, g = planned.site.address, seat.oriented(g.detach())
                found[address] = found.get(address, 0) + (g.square() if what == "fisher" else g) / len(batches)
    finally:
        for w, flag in zip(weights, flags, strict=True):
            w.requires_grad_(flag)
    return found


def _twice(what: str) -> AbstractContextManager[None]:
    """Attention in plain steps where its backward has a backward: the fused kernels have none."""
    return sdpa_kernel(SDPBackend.MATH) if what == "curvature" else nullcontext()


def _slopes(loss: Tensor, weights: list[Tensor], what: str) -> tuple[Tensor, ...]:
    """dL/dW of every weight, or the product of these with the Hessian of all of them."""
    if what != "curvature":
        return torch.autograd.grad(loss, weights)
    first = torch.autograd.grad(loss, weights, create_graph=True)
    return torch.autograd.grad(sum((g * g.detach()).sum() for g in first), weights)  # type: ignore[arg-type]


def _rows(batch: Any) -> Iterator[Any]:
    """One batch as batches of one row."""
    if isinstance(batch, Mapping):
        for i in range(len(next(iter(batch.values())))):
            yield {name: value[i : i + 1] for name, value in batch.items()}
    elif isinstance(batch, tuple | list):
        for i in range(len(batch[0])):
            yield tuple(value[i : i + 1] for value in batch)
    else:
        yield from batch.split(1)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
