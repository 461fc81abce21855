"""Checks that every method passes, for Weft's own methods and for a user's: `weft.check_method(MyMethod)`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.attach import AdapterError, attach_plan, merge, parameters, unmerge, use, using, weave_of
from weft.conditions import tell
from weft.core.method import Method
from weft.core.pile import Piles
from weft.core.site import Site
from weft.errors import WeftError
from weft.interop.folder import load, save
from weft.targets import Plan, TargetError, resolve

__all__ = [
    "PLACES", "TOLERANCE", "VIRTUAL_PLACES", "MethodError", "Place", "Report", "Single", "attach_to", "check_count",
    "check_gradients", "check_many", "check_merge", "check_method", "check_rows", "check_saved", "check_start",
    "difference", "floats", "moving_parameters", "norm", "shake", "woven",
]  # fmt: skip

TOLERANCE = 1e-6
"""Of the float64 checks, relative to the largest output: a wrong formula is far above it, rounding far below."""
_CANNOT_HOLD = ("for all rows", "has no bias", "across the groups", "convolves", "whole block", "virtual tokens")
"""Words of refusals to merge that are about the site, not about the method."""


class MethodError(WeftError, AssertionError):
    """A method that breaks a promise which every method makes."""


@dataclass(frozen=True)
class Place:
    """A tiny model with one kind of site.

    build: makes the model. inputs: its arguments for a number of rows. targets: where to attach.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    targets: tuple[str, ...] = ("site",)

    def model(self) -> nn.Module:
        """The tiny model in float64 and evaluation mode, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.build().double().eval()

    def batch(self, rows: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Arguments for `rows` rows, a function of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return tuple(x.double() if x.is_floating_point() else x for x in self.inputs(rows))


@dataclass(frozen=True)
class Report:
    """What `check_method` found: kind -> "merges", or why it does not; and kinds that have no tiny model here."""

    method: str
    merge: Mapping[str, str]
    unchecked: tuple[str, ...]
    num_parameters: Mapping[str, int]


def check_method(method: type[Method], *, options: Mapping[str, Any] | None = None) -> Report:
    """Run the common checks of a method at every kind of site it claims, on tiny built-in models.

    options: hyper-parameters small enough for maps of 8 to 20 channels. Raises MethodError with the check that fails,
    the kind, and the numbers; returns what was found.
    """
    chosen = method(**(options or {}))
    merges: dict[str, str] = {}
    counts: dict[str, int] = {}
    refusals: dict[str, str] = {}
    for place in (p for p in (*PLACES, *VIRTUAL_PLACES) if p.kind in method.kinds):
        try:
            counts[place.kind] = resolve(place.model(), chosen, place.targets).num_parameters
        except TargetError as error:
            refusals.setdefault(place.kind, str(error))
            continue
        check_start(chosen, place)
        merges[place.kind] = check_merge(chosen, place)
        check_rows(chosen, place)
        check_gradients(chosen, place)
        check_many(chosen, place)
        check_count(chosen, place)
        with tempfile.TemporaryDirectory() as folder:
            check_saved(chosen, place, Path(folder) / "adapter")
    for kind, why in refusals.items():
        if kind not in counts:
            raise MethodError(f"{method.name} claims {kind!r} and refuses its tiny model: {why}; pass smaller options=")
    known = {p.kind for p in (*PLACES, *VIRTUAL_PLACES)}
    return Report(method.name, merges, tuple(sorted(method.kinds - known)), counts)


def woven(method: Method, place: Place, *names: str, noise: float = 0.2) -> nn.Module:
    """A tiny model with one trained-looking adapter per name (starts are seeded by position), the first one in use."""
    model = place.model()
    for i, name in enumerate(names or ("a",)):
        attach_to(model, method, place, name=name, seed=i)
        shake(model, name, noise=noise, seed=i)
    use(model, names[0] if names else "a")
    return model


def attach_to(model: nn.Module, method: Method, place: Place, *, name: str = "a", seed: int = 0) -> Plan:
    """Attach at a place, with made-up statistics where the method's start needs some."""
    plan = resolve(model, method, place.targets, name=name, seed=seed)
    statistics = {s.site.address: _statistics(s.site) for s in plan.sites} if method.needs() else None
    attach_plan(model, plan, statistics=statistics)
    use(model, name)
    tell(model, {condition: torch.tensor(0) for condition in method.conditions})
    return plan


def _statistics(site: Site) -> dict[str, Tensor]:
    """What calibration data would have said at a site."""
    x = site.normal(4 * site.in_features, site.in_features)
    experts = () if site.experts is None else (site.experts,)
    slopes = {k: site.normal(*experts, *site.shape, salt=k) for k in ("gradient", "curvature")}
    return {"covariance": x.mT @ x / len(x), **slopes}


@torch.no_grad()
def shake(model: nn.Module, name: str = "a", *, noise: float = 0.2, seed: int = 0) -> None:
    """Add noise to every trainable tensor of an adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters(model, name):
        p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * noise)


def moving_parameters(model: nn.Module, method: Method, name: str) -> list[nn.Parameter]:
    """Those trained tensors of an adapter that move the output: all but what only losses of its own read."""
    aside = {id(p) for n, p in model.named_parameters() if n.rpartition(".")[2] in method.aside}
    return [p for p in parameters(model, name) if id(p) not in aside]


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value where that is above 1."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def check_start(method: Method, place: Place) -> None:
    """A fresh adapter leaves the model's outputs as they are, and no adapter leaves them to the bit."""
    model, batch = place.model(), place.batch(3)
    with torch.no_grad():
        base = model(*batch)
        attach_to(model, method, place)
        # tokens that come first change what follows, trained or not
        if place not in VIRTUAL_PLACES and not method.changes_start:
            _within(difference(model(*batch), base), method, place, "a fresh adapter changes the output")
        use(model, None)
        if not torch.equal(model(*batch), base):
            raise MethodError(f"{method.name} at {place.name}: the route None is not the base to the bit")


@torch.no_grad()
def check_merge(method: Method, place: Place, route: Any = "a", second: Method | None = None) -> str:
    """Merged equals live and unmerging restores the bits: returns "merges"; or the error's reason, which must be true.

    second: a method for a second adapter "b" that the route may mention.
    """
    model, batch = woven(method, place), place.batch(3)
    if second is not None:
        attach_to(model, second, place, name="b")
        shake(model, "b", seed=7)
    use(model, route)
    live = model(*batch)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        merge(model, route)
    except AdapterError as error:
        _refused_rightly(method, place, model, str(error))
        return str(error)
    _within(difference(model(*batch), live), method, place, "merged and live differ")
    unmerge(model)
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    if changed:
        raise MethodError(f"{method.name} at {place.name}: unmerging does not restore the bits of {', '.join(changed)}")
    return "merges"


def _refused_rightly(method: Method, place: Place, model: nn.Module, reason: str) -> None:
    """A refusal to merge names something the weight cannot hold, or the map is indeed not linear."""
    if any(words in reason for words in _CANNOT_HOLD):
        return
    if "no weight can express it" not in reason:
        raise MethodError(f"{method.name} at {place.name}: the refusal to merge does not say why: {reason}")
    if place.kind not in ("linear", "conv") or method.surveys:  # the input is not the adapted map's own
        return
    x = 4 * place.batch(64)[0]  # far and wide, so that some unit of an activation is on and some is off
    other, zero = x.roll(1, 0), model(torch.zeros_like(x))
    if difference(model(x - 2 * other) + 2 * model(other), model(x) + 2 * zero) < TOLERANCE:
        raise MethodError(f"{method.name} at {place.name} is linear in its input, yet merging is refused: {reason}")


@torch.no_grad()
def check_rows(method: Method, place: Place) -> None:
    """A batch whose rows use different adapters, and none, equals the same rows one by one."""
    model = woven(method, place, "a", "b", "c")
    route = ["b", None, "a", "c", "b"]
    for batch in _shapes(place):
        with using(model, route):
            together = model(*batch)
        for i, name in enumerate(route):
            with using(model, name):
                alone = model(*(x[i : i + 1] for x in batch))
            _within(difference(together[i : i + 1], alone), method, place, f"row {i} ({name}) of a mixed batch differs")


def _shapes(place: Place) -> list[tuple[Tensor, ...]]:
    """Five rows as they come; for maps of the last dimension also without the middle one."""
    batch = place.batch(5)
    flat = place.kind in ("linear", "norm") and batch[0].ndim == 3
    return [batch, tuple(x[:, 0] for x in batch)] if flat else [batch]


def check_gradients(method: Method, place: Place) -> None:
    """Every trainable tensor gets a gradient and moves the output; nothing else gets one."""
    model, batch = woven(method, place), place.batch(3)
    output = model(*batch)
    output.square().sum().backward()
    own, moving = ({id(p) for p in found} for found in (parameters(model, "a"), moving_parameters(model, method, "a")))
    for name, p in model.named_parameters():
        if id(p) not in own and p.grad is not None:
            raise MethodError(f"{method.name} at {place.name}: {name} is not the adapter's and gets a gradient")
        if id(p) in moving and (p.grad is None or not p.grad.any()):
            raise MethodError(f"{method.name} at {place.name}: {name} is trainable and gets no gradient")
        if id(p) not in moving:
            continue
        with torch.no_grad():
            kept = p.clone()
            p.add_(torch.randn_like(p) * 0.2)
            if difference(model(*batch), output) == 0:
                raise MethodError(f"{method.name} at {place.name}: {name} is trainable and does not move the output")
            p.copy_(kept)


def check_many(method: Method, place: Place) -> None:
    """Adapters that learn in one batch, each on rows of its own, get the gradients that they get one by one."""
    model, names, batch = woven(method, place, "a", "b", "c"), ("a", "b", "c"), place.batch(6)
    found: dict[str, list[Tensor | None]] = {}
    for i, name in enumerate(names):
        with using(model, name):
            model(*(x[2 * i : 2 * i + 2] for x in batch)).square().sum().backward()
        found[name] = [p.grad for p in moving_parameters(model, method, name)]
    model.zero_grad()
    piles = Piles([seat.adapters[n] for n in names] for seat in weave_of(model).seats.values())
    for route in ([n for n in names for _ in range(2)], ["b", "a", "c", "a", "c", "b"]):
        order = torch.tensor([2 * names.index(n) + route[:i].count(n) for i, n in enumerate(route)])
        with using(model, route):
            model(*(x[order] for x in batch)).square().sum().backward()
        piles.deal()
        for name in names:
            for p, alone in zip(moving_parameters(model, method, name), found[name], strict=True):
                assert (p.grad is None) == (alone is None), "an expert that no token chose has none, here and there"
                if p.grad is None or alone is None:
                    continue
                _within(difference(p.grad, alone), method, place, f"{name}'s gradient in one batch with others differs")
        model.zero_grad()
    piles.part()


def check_count(method: Method, place: Place) -> None:
    """The parameters that a plan counts on the meta device are the ones that attaching makes."""
    model = place.model()
    plan = attach_to(model, method, place)
    real = sum(p.numel() for p in parameters(model, "a"))
    if plan.num_parameters != real:
        raise MethodError(f"{method.name} at {place.name}: {plan.num_parameters} parameters planned, {real} made")


@torch.no_grad()
def check_saved(method: Method, place: Place, folder: Path) -> None:
    """What is saved and loaded on a fresh base is the same adapter, to the bit."""
    model, batch = woven(method, place), place.batch(3)
    save(model, folder, name="a")
    fresh = place.model()
    load(fresh, folder, name="z")
    use(fresh, "z")
    if not torch.equal(fresh(*batch), model(*batch)):
        raise MethodError(f"{method.name} at {place.name}: the saved and loaded adapter answers differently")


def _within(found: float, method: Method, place: Place, what: str) -> None:
    if not found <= TOLERANCE:  # a NaN is not
        raise MethodError(f"{method.name} at {place.name}: {what} by {found:.1e} (tolerance {TOLERANCE:.0e})")


class _Chain(nn.Module):
    """Two maps of different shapes, one with and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.site, self.other = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.site(x))


class Single(nn.Module):
    """A model around one module."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site

    def forward(self, *args: Tensor) -> Tensor:
        return self.site(*args)


class _Block(nn.Module):
    """A small feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class _Experts(nn.Module):
    """Three experts in one tensor [E, O, I]; every token says which one it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.up_proj = nn.Parameter(torch.randn(3, 12, 8) * 0.3)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        weight = self.up_proj  # read once: adapted where an adapter is in use
        return torch.stack([F.linear(row, weight[e]) for row, e in zip(x, expert.tolist(), strict=True)])


class _Decoder(nn.Module):
    """A small decoder of token ids, with a cache and positions as virtual tokens need them."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel  # slow to import, and only these two places need it

        config = LlamaConfig(
            vocab_size=20, max_position_embeddings=64, hidden_size=16, intermediate_size=24, num_attention_heads=2,
            num_hidden_layers=2,
        )  # fmt: skip
        self.site = LlamaModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.site(input_ids=ids, use_cache=False).last_hidden_state


def norm() -> nn.LayerNorm:
    """A layer norm with a gain and an offset that are not the trivial ones."""
    module = nn.LayerNorm(8)
    for p in module.parameters():
        nn.init.normal_(p, 1.0, 0.3)
    return module


def floats(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """An input builder of Gaussian rows."""
    return lambda rows: (torch.randn(rows, *shape),)


def _token_ids(rows: int) -> tuple[Tensor, ...]:
    return (torch.arange(rows * 4).view(rows, 4) % 20,)


def _expert_rows(rows: int) -> tuple[Tensor, ...]:
    return torch.randn(rows, 8), torch.arange(rows) % 3


PLACES = (
    Place("linear", "linear", _Chain, floats(3, 8), ("site", "other")),
    Place("linear with bias", "linear", lambda: Single(nn.Linear(12, 8)), floats(3, 12)),
    Place("conv", "conv", lambda: Single(nn.Conv2d(8, 12, 3, stride=2, padding=1)), floats(8, 5, 5)),
    Place("embedding", "embedding", lambda: Single(nn.Embedding(20, 8)), _token_ids),
    Place("norm", "norm", lambda: Single(norm()), floats(3, 8)),
    Place("block", "block", lambda: Single(_Block()), floats(3, 8)),
    Place("experts", "experts", lambda: Single(_Experts()), _expert_rows, ("site.up_proj",)),
)
"""One tiny model per kind of site, and one more for the most used."""

VIRTUAL_PLACES = (
    Place("input", "input", _Decoder, _token_ids, ("input",)),
    Place("attention", "attention", _Decoder, _token_ids, ("self-attention",)),
)
"""Where virtual tokens go: no map of their own, so no dense equation either, and a start need not be the base."""
