"""Optimisers of the package pytorch-optimizer: one adapter for all, their options read from their signatures."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin

import torch

from weft.core import option
from weft.errors import missing_extra
from weft.optim.choice import Choice, Groups, Setting, provide

__all__: list[str] = []

# what the recipe says elsewhere, and decay that would not follow the schedule
_NOT_OPTIONS = frozenset(
    {"self", "params", "lr", "weight_decay", "fixed_decay", "maximize", "foreach", "fused", "warmup_steps"}
)


@dataclass(frozen=True)
class _Entry:
    """One optimiser of the package. copies: tensors of a parameter's size, where a dry step cannot count them."""

    kind: str
    what: str
    paper: str = ""
    copies: int | None = None
    schedule_free: bool = False
    projects: dict[str, Any] = field(default_factory=dict)
    """Options that stand in the group of matrices, with their defaults."""


_PROJECTED: dict[str, Any] = {
    "rank": option(128, help="size of the subspace that gradients are projected to", minimum=1),
    "update_proj_gap": option(200, help="steps between new subspaces", minimum=1),
    "scale": option(0.25, help="factor of the projected update", above=0),
}

_RANDOM: dict[str, Any] = {**_PROJECTED, "scale": option(1.0, help="factor of the scaled gradient", above=0)}

_ENTRIES: dict[str, _Entry] = {
    "adabelief": _Entry("AdaBelief", "divides by how far gradients are from their average", "2010.07468"),
    "adan": _Entry("Adan", "Nesterov's momentum from differences of gradients", "2208.06677"),
    "adopt": _Entry("ADOPT", "Adam that normalises before it averages", "2411.02853"),
    "ademamix": _Entry("AdEMAMix", "AdamW with a second, slow average", "2409.03137"),
    "apollo": _Entry(
        "APOLLO", "AdamW's step sizes from a random low-rank projection", "2412.05270", projects=_RANDOM
    ),
    "came": _Entry("CAME", "Adafactor with a confidence in its averages", "2307.02047"),
    "dadapt-adam": _Entry("DAdaptAdam", "AdamW that finds its own rate; set learning_rate: 1", "2301.07733", copies=3),
    "fira": _Entry("Fira", "GaLore plus the rest of the gradient, scaled", "2410.01623", projects=_PROJECTED),
    "galore": _Entry(
        "GaLore", "Adam in a low-rank subspace of the gradients", "2403.03507", projects=_PROJECTED
    ),
    "grams": _Entry("Grams", "the gradient's sign with the momentum's size", "2412.17107"),
    "lamb": _Entry("Lamb", "AdamW with a trust ratio for each tensor", "1904.00962"),
    "laprop": _Entry("LaProp", "momentum of normalised gradients", "2002.04839"),
    "lars": _Entry("LARS", "momentum with a trust ratio for each tensor", "1708.03888"),
    "lion": _Entry("Lion", "the sign of an interpolated momentum", "2302.06675"),
    "mars": _Entry("MARS", "AdamW with variance-reduced gradients", "2411.10438"),
    "prodigy": _Entry("Prodigy", "AdamW that finds its own rate; set learning_rate: 1", "2306.06101", copies=4),
    "racs": _Entry("RACS", "one scale for each row and column", "2502.07752"),
    "schedulefree-adamw": _Entry("ScheduleFreeAdamW", "averages weights instead of a schedule", "2405.15682",
                                 schedule_free=True),
    "schedulefree-sgd": _Entry("ScheduleFreeSGD", "averages weights instead of a schedule", "2405.15682",
                               schedule_free=True),
    "signsgd": _Entry("SignSGD", "the sign of the momentum", "1802.04434"),
    "sm3": _Entry("SM3", "the largest squared gradient of each row and column", "1901.11150"),
    "soap": _Entry("SOAP", "AdamW in the basis of Shampoo's preconditioner", "2409.11321"),
    "shampoo": _Entry("Shampoo", "a preconditioner for each dimension", "1802.09568"),
    "stable-adamw": _Entry("StableAdamW", "AdamW with a bound on each tensor's update", "2304.13013"),
    "tiger": _Entry("Tiger", "the sign of the momentum, for little memory"),
}  # fmt: skip


@dataclass(frozen=True)
class _Library(Choice):
    """Any optimiser of pytorch-optimizer, over the options of its constructor."""

    entry: ClassVar[_Entry]
    source: ClassVar[str] = "pytorch-optimizer"

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        own = {key: value for key, value in own.items() if value is not None}
        in_group = {key: own.pop(key) for key in self.entry.projects}
        if in_group:
            groups = [part for group in groups for part in _projected(group, in_group)]
        if self.takes_betas:
            own["betas"] = setting.betas
        return _class(self.entry.kind)(groups, lr=setting.rate, **own)

    def state_bytes(self, groups: Groups, setting: Setting) -> int | None:
        if self.entry.copies is None:
            return None
        return self.entry.copies * sum(p.numel() * p.element_size() for group in groups for p in group["params"])


def _projected(group: Mapping[str, Any], options: Mapping[str, Any]) -> Groups:
    """A group as its matrices, which are projected, and the rest, which is not.

    A subspace is no larger than the matrix: the package would keep averages of `rank` rows even for low-rank factors
    of 8, for which they would take more than AdamW's.
    """
    by_rank: dict[int, list[Any]] = {}
    for p in group["params"]:
        if p.ndim == 2:
            by_rank.setdefault(min(options["rank"], *p.shape), []).append(p)
    parts = [
        {**group, "params": by_rank[rank], "projection_type": "std", **options, "rank": rank}
        for rank in sorted(by_rank)
    ]
    rest = [p for p in group["params"] if p.ndim != 2]
    return [*parts, *([{**group, "params": rest}] if rest else [])]


def _class(kind: str) -> Any:
    try:
        import pytorch_optimizer
    except ImportError:
        raise missing_extra("optim", needs="pytorch-optimizer") from None
    return getattr(pytorch_optimizer, kind)


@cache
def _choice(name: str) -> type[Choice]:
    """The dataclass of options of one of the package's optimisers."""
    entry = _ENTRIES[name]
    signature = inspect.signature(_class(entry.kind).__init__).parameters
    pair = "betas" in signature and signature["betas"].default == (0.9, 0.999)
    fields: list[Any] = [(key, type(value.default), value) for key, value in entry.projects.items()]
    for key, parameter in signature.items():
        kind = _kind(parameter)
        if key not in _NOT_OPTIONS and kind is not None and not (pair and key == "betas"):
            fields.append((key, kind, option(parameter.default, help=f"as in pytorch_optimizer.{entry.kind}")))
    body = {
        "__doc__": entry.what,
        "__module__": __name__,
        "entry": entry,
        "what": entry.what,
        "paper": entry.paper,
        "takes_betas": pair,
        "decays": "weight_decay" in signature,
        "schedule_free": entry.schedule_free,
    }
    made = dataclasses.make_dataclass(entry.kind, fields, bases=(_Library,), namespace=body, frozen=True)
    setattr(made, "name", name)  # noqa: B010  not in its body: that would register it a second time
    return made


def _kind(parameter: inspect.Parameter) -> Any:
    """The type of an option as a recipe can write it; None for what it cannot."""
    default = parameter.default
    if isinstance(default, bool | int | float | str):
        written = parameter.annotation
        if get_origin(written) is Literal:
            return written
        return float if float in (written, *get_args(written)) else type(default)
    if isinstance(default, tuple) and all(isinstance(part, float) for part in default):
        return tuple[float, ...]
    if default is None and float in get_args(parameter.annotation):
        return float | None
    return None


def _load(name: str) -> Any:
    return lambda: _choice(name)


for _name in _ENTRIES:
    provide(_name, _load(_name))
