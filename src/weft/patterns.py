"""What a target pattern means: the places of a model that can be adapted, and which of them a pattern names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from weft.core.method import Method
from weft.kinds import Offer, offers
from weft.kinds.seat import Container, base_class

__all__ = ["PLACES", "PRESETS", "Candidate", "Index", "candidates", "layer_of", "output_head", "walk"]

PRESETS = {
    "all-linear": "every linear map except the output head and the routers of experts",
    "attention": "the linear maps inside attention modules",
    "mlp": "the linear maps inside feed-forward modules, fused experts too",
    "norms": "every norm layer",
    "attention-blocks": "every whole attention module",
    "mlp-blocks": "every whole feed-forward module",
    "input": "the embedded input, for virtual tokens",
    "self-attention": "the inside of every self-attention, for prefixes",
    "side": "the end of the backbone, for side networks",
}
PLACES = {"block", "input", "attention", "side"}
"""Kinds that are no map of their own: only a method made for them means them by a name."""
_ATTENTION = re.compile(
    r"(^|[._])(self_|cross_|enc_?dec_?)?(attn|attention|selfattention|encdecattention)\d?([._]|$)", re.IGNORECASE
)
_MLP = re.compile(
    r"(^|[._])(mlp|ffn?|feed_forward|block_sparse_moe|densereludense|intermediate|layer\.\d+\.output|fc\d?|experts)([._]|$)",
    re.IGNORECASE,
)
_MLP_BLOCK = re.compile(r"mlp|ffn?|feed_forward|block_sparse_moe|densereludense", re.IGNORECASE)
_ROUTER = re.compile("router|gate", re.IGNORECASE)
_HEADS = ("classifier", "score", "qa_outputs", "classification_head")
"""Where transformers' models that are no language models keep their head."""
_GLOB = "*?["
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Candidate:
    """A place in a model that some method could adapt."""

    address: str
    path: str
    module: nn.Module
    offer: Offer

    @property
    def kind(self) -> str:
        return self.offer.kind


def walk(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base by path, without the adapters that sit on it; a shared module comes once."""
    seen: set[int] = set()
    stack = [(path, model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        prefix = f"{path}." if path else ""
        children = [(f"{prefix}{n}", m) for n, m in module._modules.items() if m is not None]
        stack.extend((p, m) for p, m in reversed(children) if not isinstance(m, Container))


def candidates(model: nn.Module) -> list[Candidate]:
    """Every place of a model that can be adapted, in the model's own order."""
    found = []
    parents: dict[str, nn.Module] = {}
    for path, module in walk(model):
        parents[path] = module
        prefix, _, child = path.rpartition(".")
        for offer in offers(module, parents.get(prefix), child):
            address = ".".join(p for p in (path, offer.param if offer.own_name else "") if p)
            found.append(Candidate(address, path, module, offer))
    return found


def _matches(pattern: str, c: Candidate, head: str | None, method: Method | None) -> bool:
    """Whether a pattern names a place. head: the path of the output head; method: what would be put there, if known."""
    if pattern == "all-linear":
        return _is_map(c) and not _inside(c.address, head)
    if pattern in ("attention", "mlp"):
        return _is_map(c) and not _inside(c.address, head) and _role(c.address) == pattern
    if pattern == "norms":
        return c.kind == "norm"
    if pattern in ("attention-blocks", "mlp-blocks"):
        name = c.path.rsplit(".", 1)[-1]
        found = _ATTENTION.search(name) if pattern.startswith("attention") else _MLP_BLOCK.fullmatch(name)
        return c.kind == "block" and found is not None
    if pattern in ("self-attention", "side"):
        return c.kind == pattern.removeprefix("self-")
    if method is not None and c.kind in PLACES and c.kind not in method.kinds:
        return False  # a name such as "attn" means the block only to a method that adapts blocks
    return _named(pattern, _name(c))


class Index:
    """Places by every name that one of them has, so that hundreds of addresses do not each look through all places.

    head: the path of the model's output head.
    """

    def __init__(self, places: Sequence[Candidate], head: str | None):
        self._places, self._head = places, head
        self._by_name: dict[str, list[Candidate]] = {}
        for c in places:
            name = _name(c)
            self._by_name.setdefault(name, []).append(c)
            while "." in name:
                name = name.partition(".")[2]
                self._by_name.setdefault(name, []).append(c)

    def named(self, pattern: str, method: Method | None) -> list[Candidate]:
        """The places that a pattern names, in the model's order. method: what would be put there, if known."""
        general = pattern in PRESETS or pattern.startswith("re:") or any(ch in pattern for ch in _GLOB)
        near = self._places if general else self._by_name.get(pattern, ())
        return [c for c in near if _matches(pattern, c, self._head, method)]


def _name(c: Candidate) -> str:
    """What a name in a pattern is compared with."""
    return c.path if c.kind == "attention" else c.address


def _is_map(c: Candidate) -> bool:
    """What presets mean by a linear map: no router, and no bare matrix that is no weight (A_log, rel_pos)."""
    if c.kind == "linear" and c.offer.own_name:
        is_weight = "weight" in c.offer.param or "proj" in c.offer.param
        return is_weight and not _ROUTER.search(base_class(c.module).__name__)
    return c.kind in ("linear", "experts")


def _inside(address: str, root: str | None) -> bool:
    return root is not None and f"{address}.".startswith(f"{root}.")


def _named(pattern: str, address: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], address) is not None
    if any(ch in pattern for ch in _GLOB):
        return fnmatchcase(address, pattern)
    return address == pattern or address.endswith("." + pattern)


def _role(address: str) -> str | None:
    if _ATTENTION.search(address):
        return "attention"
    return "mlp" if _MLP.search(address) else None


def layer_of(address: str) -> int | None:
    """The first number in an address: `model.layers.3.mlp` is in layer 3."""
    match = _LAYER.search(address)
    return int(match[1]) if match else None


def output_head(model: nn.Module) -> str | None:
    """The path of the module that makes a transformers model's output."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None:
        return None
    head = get()
    if head is None:
        return next((name for name in _HEADS if name in model._modules), None)
    return next((n for n, m in walk(model) if m is head), None)
