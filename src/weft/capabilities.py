"""What a method can do, found by doing it on tiny models: nothing here is declared by the method."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.checks import PLACES, MethodError, Place, check_merge, check_rows
from weft.core.method import Method, hints
from weft.core.router import Expert, Router, experts
from weft.registry import methods
from weft.targets import TargetError, resolve

__all__ = ["Capabilities", "Option", "capabilities"]

_SMALLER = (None, 4, 2, 1)  # tiny models have 8 to 20 channels: options for larger ones are cut to these


@dataclass(frozen=True)
class Option:
    """One hyper-parameter as its method declares it. limits: in words, or empty."""

    name: str
    type: str
    default: Any
    limits: str
    help: str


@dataclass(frozen=True)
class Capabilities:
    """A method in words and in findings.

    merges, rows: by kind of site, "yes" or why not; rows is about a batch whose rows use different adapters.
    """

    name: str
    class_name: str
    summary: str
    equation: str
    source: str
    paper: str
    default_targets: str
    kinds: tuple[str, ...]
    merges: Mapping[str, str]
    rows: Mapping[str, str]
    options: tuple[Option, ...]

    def row(self) -> tuple[str, str, str, str, str, str]:
        """One line of a table: name, paper, kinds, merges, rows in one batch, options."""
        names = ", ".join(option.name for option in self.options)
        return (self.name, self.paper, ", ".join(self.kinds), in_short(self.merges), in_short(self.rows), names or "-")

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.class_name}): {self.summary}", "", f"    {self.equation}", "", self.source, ""]
        lines += [f"adapts            {', '.join(self.kinds)}; by default {self.default_targets}"]
        lines += _by_kind("merges", self.merges)
        lines += _by_kind("rows in one batch", self.rows)
        lines += ["options" if self.options else "options           none"]
        width = max((len(option.name) for option in self.options), default=0)
        for option in self.options:
            limits = f", {option.limits}" if option.limits else ""
            lines.append(f"  {option.name:{width}}  {option.help} ({option.type}{limits}; default {option.default})")
        return "\n".join(lines)


def in_short(found: Mapping[str, str]) -> str:
    """Findings by kind in a word or two: yes, no, or the kinds for which it is so."""
    able = [kind for kind, answer in found.items() if answer == "yes"]
    if len(able) == len(found):
        return "yes"
    return ", ".join(able) if able else "no"


def capabilities(method: type[Method]) -> Capabilities:
    """What a method can do, proved on tiny models of every kind of site that it claims.

    Raises MethodError when it claims a kind of site and fails there.
    """
    return _proved(method)


def _prove(method: type[Method]) -> Capabilities:
    merges: dict[str, str] = {}
    rows: dict[str, str] = {}
    for place in _places(method):
        small = _small(method, place)
        _worst(merges, place.kind, _merge_answer(small, place))
        _worst(rows, place.kind, _rows_answer(small, place))
    summary, equation, source = _words(method)
    return Capabilities(
        name=method.name,
        class_name=method.__name__,
        summary=summary,
        equation=equation,
        source=source,
        paper=method.paper,
        default_targets=method.default_targets,
        kinds=tuple(sorted(method.kinds)),
        merges=merges,
        rows=rows,
        options=tuple(_option(method, f) for f in dataclasses.fields(method)),
    )


_proved: Callable[[type], Capabilities] = cache(_prove)  # annotated: to mypy a class has no hash


def _places(method: type[Method]) -> list[Place]:
    """Tiny models with what the method adapts: one module for most kinds, a language model for the rest, and for what
    reads a whole base."""
    found = [place for place in PLACES if place.kind in method.kinds and method.surveys is not True]
    rest = sorted(method.kinds - {place.kind for place in found})
    return found + [Place(kind, kind, _language, _tokens, (method.default_targets,)) for kind in rest]


def _experts(place: Place) -> tuple[Expert, ...]:
    """Experts that a router may hold at a kind of site."""
    known = methods()
    names = ("lora", "bottleneck", "norm_tuning")
    return experts(next(_small(known[n], place) for n in names if place.kind in known[n].kinds), 3)


def _small(method: type[Method], place: Place) -> Method:
    """The method with its own defaults, or with whole numbers small enough for the tiny model, or another choice.

    A list that must not be empty gets two entries, a share that leaves nothing of a tiny map a smaller one.
    """
    whole = {f.name: f.default for f in dataclasses.fields(method) if type(f.default) is int}
    shares = {f.name: 0.5 for f in dataclasses.fields(method) if type(f.default) is float and 0.9 <= f.default < 1}
    lists: dict[str, Any] = {f.name: (0, 1) for f in dataclasses.fields(method) if f.default == ()}
    if issubclass(method, Router):
        lists = {"experts": _experts(place)}
    others = [
        {f.name: c}
        for f in dataclasses.fields(method)
        for c in typing.get_args(hints(method)[f.name])
        if typing.get_origin(hints(method)[f.name]) is Literal and c != f.default
    ]
    tried: list[dict[str, Any]] = [{}, lists, shares, *others]
    refusal: Exception | None = None
    for more, limit in itertools.product(tried, _SMALLER):
        try:
            chosen = method(**{k: v if limit is None else min(v, limit) for k, v in whole.items()} | more)
            resolve(place.model(), chosen, place.targets)
        except (TargetError, ValueError, TypeError) as error:
            refusal = refusal or error
            continue
        return chosen
    raise MethodError(f"{method.name} claims {place.kind!r} and refuses its tiny model: {refusal}")


def _merge_answer(method: Method, place: Place) -> str:
    answer = check_merge(method, place)
    if answer == "merges":
        return "yes"
    reason = answer.partition(": ")[2] or answer
    return reason.removeprefix(f"{method.name} ").removeprefix("cannot be merged: ").partition("; serve it")[0]


def _rows_answer(method: Method, place: Place) -> str:
    try:
        check_rows(method, place)
    except MethodError:
        raise
    except (ValueError, TypeError) as error:
        return str(error)
    return "yes"


def _worst(found: dict[str, str], kind: str, answer: str) -> None:
    """A kind with several tiny models can what all of them can."""
    if found.get(kind, "yes") == "yes":
        found[kind] = answer


def _words(method: type[Method]) -> tuple[str, str, str]:
    """Summary, equation and source: the paragraphs of the docstring; a method of a user's own may have fewer."""
    module = inspect.getdoc(inspect.getmodule(method)) or ""
    title = module.splitlines()[0].partition(": ")[2] if module else ""
    parts = [" ".join(part.split()) for part in (inspect.getdoc(method) or "").split("\n\n")]
    own = "".join(parts[:1]) if not parts[0].startswith(f"{method.__name__}(") else ""  # what dataclass writes
    if "=" not in own:
        return own, parts[1] if len(parts) > 1 else "", parts[-1] if len(parts) > 2 else ""
    return title, own, parts[-1] if len(parts) > 1 else ""


def _option(method: type[Method], field: Any) -> Option:
    kind, limits = hints(method)[field.name], []
    for key, sign in (("minimum", ">="), ("above", ">"), ("maximum", "<=")):
        if field.metadata.get(key) is not None:
            limits.append(f"{sign} {field.metadata[key]}")
    default = None if field.default is dataclasses.MISSING else field.default
    return Option(field.name, _type_text(kind), default, " and ".join(limits), field.metadata.get("help", ""))


def _type_text(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in words:
        return words[kind]
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return "experts" if inner[0] is Expert else f"a list of {_type_text(inner[0])}"
    return " or ".join(map(_type_text, inner)) if inner else str(kind)


def _by_kind(title: str, found: Mapping[str, str]) -> list[str]:
    """`title  answer`, or a line for each answer that is not the same everywhere."""
    answers = {answer: [k for k, a in found.items() if a == answer] for answer in dict.fromkeys(found.values())}
    if len(answers) == 1:
        return [f"{title:<18}{next(iter(answers))}"]
    return [f"{title:<18}{', '.join(kinds)}: {answer}" for answer, kinds in answers.items()]


def _language() -> nn.Module:
    """A tiny language model that gives its logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class TinyLlama(LlamaForCausalLM):
        """Logits alone: the checks compare tensors."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return TinyLlama(config)


def _tokens(rows: int) -> tuple[Tensor, ...]:
    return (torch.arange(rows * 5).view(rows, 5) * 7 % 24,)
