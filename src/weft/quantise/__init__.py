"""Quantising a loaded model's linear layers in place, offline and on any device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import nn

from weft.core.plain import is_plain
from weft.errors import QuantiseError, nearest
from weft.kinds import RAW_READERS
from weft.quantise.budget import GRIDS, Grid, choose_grids
from weft.quantise.originals import Originals
from weft.quantise.schemes import GROUP_SIZE, SCHEMES, packed

__all__ = [
    "GROUPED", "MIXED", "SCHEMES", "Grid", "Originals", "SchemeName", "choose_grids", "linears", "quantise_model",
    "settings",
]  # fmt: skip

SchemeName = Literal[
    "nf4", "fp4", "int8", "torchao-int8", "torchao-int4", "packed-int8", "packed-int4", "packed-int3", "packed-int2",
    "packed-mixed",
]  # fmt: skip
MIXED = "packed-mixed"
"""The scheme that chooses bits and groups for every matrix under a budget."""
GROUPED = frozenset({"torchao-int4", "packed-int8", "packed-int4", "packed-int3", "packed-int2"})
"""Schemes whose group size can be chosen."""


def quantise_model(
    model: nn.Module,
    scheme: SchemeName | str,
    *,
    group_size: int | None = None,
    bits: float | None = None,
    grids: Mapping[str, Grid] | None = None,
    originals: Originals | None = None,
    device: str | None = None,
) -> None:
    """Replace a model's linear layers by quantised ones, except its output head.

    scheme: "nf4", "fp4" (bitsandbytes, 4 bits, scales quantised again), "int8" (bitsandbytes, 8 bits, inputs too),
        "torchao-int8", "torchao-int4" (weights only), "packed-int2" to "packed-int8" (GPTQ's layout in plain torch,
        rounded to the nearest), or "packed-mixed" (bits and groups per matrix for `bits` on average).
    group_size: weights that share a scale, where the scheme leaves the choice. grids: for "packed-mixed", the choice
        for every layer by path, instead of the one for plain rounding. originals: is given the layers as they were.
    device: where the quantised layers should be; the layers go there one by one, as some layouts differ by device.
    Layers whose weight another module reads raw stay as they are: packed bytes would be read as numbers.
    Raises QuantiseError for an unknown scheme, an option that it lacks, an adapted model, or one without such layers;
    MissingExtra for a package that is not installed.
    """
    settings(scheme, group_size=group_size, bits=bits)
    if "weave" in model.__dict__:
        raise QuantiseError("this model carries adapters: quantise the base first, then attach or load them")
    chosen = linears(model)
    if not chosen:
        raise QuantiseError(f"{type(model).__name__} has no linear layer to quantise")
    if scheme == MIXED and grids is None:
        assert bits is not None, "checked with the other options"
        grids = choose_grids({path: layer.weight for path, layer in chosen.items()}, bits)
    for path, old in chosen.items():
        grid = None if grids is None else grids[path]
        old = old if device is None else old.to(device)
        new = SCHEMES[scheme](old, group_size) if grid is None else packed(old, grid.bits, grid.group_size)
        if originals is not None:
            originals.add(path, old, new)
        _replace(model, path, new)
    model.__dict__["quantised_as"] = {"scheme": scheme, "group_size": group_size, "bits": bits}


def settings(scheme: str, *, group_size: int | None = None, bits: float | None = None) -> None:
    """Raise QuantiseError for options that a scheme does not have, or lacks."""
    known = (*SCHEMES, MIXED)
    if scheme not in known:
        raise QuantiseError(f"there is no quantisation {scheme!r}; {nearest(scheme, known)}")
    if group_size is not None and scheme not in GROUPED:
        raise QuantiseError(
            f"group_size={group_size}: {scheme} has groups of its own; it is for {', '.join(sorted(GROUPED))}"
        )
    if group_size is not None and group_size not in (32, 64, 128):
        raise QuantiseError(f"group_size={group_size}: one of 32, 64, 128 is expected (null: {GROUP_SIZE})")
    if (bits is not None) != (scheme == MIXED):
        least, most = min(g.cost for g in GRIDS), max(g.cost for g in GRIDS)
        raise QuantiseError(
            f"{MIXED} needs a budget: bits, the average number per weight, from {least:.2f} to {most:.2f}"
            if scheme == MIXED
            else f"bits={bits}: {scheme} has a fixed number of bits; a budget is for {MIXED}"
        )


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers by path, without the head, what a neighbour reads, and what must stay in float32."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    raw = {
        id(getattr(parent, child, None))
        for parent in model.modules()
        for reader, children in RAW_READERS.items()
        if isinstance(parent, reader)
        for child in children
    }
    # T5 casts the input of `wo` to the dtype of its weight, and would cast it to packed bytes: transformers keeps such
    # layers in float32 too
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    linears = ((p, m) for p, m in model.named_modules() if _is_plain(m) and m is not head and id(m) not in raw)
    return {p: m for p, m in linears if not kept & {*p.split(".")}}


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is no quantised one (torchao swaps the tensor, not the layer)."""
    return type(module) is nn.Linear and is_plain(module.weight.data)


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(model.get_submodule(path).training))
