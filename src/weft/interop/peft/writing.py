"""From an adapter of a model to PEFT's configuration and tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from weft.attach import Record
from weft.core.adapter import Adapter
from weft.errors import nearest
from weft.interop.peft.config import header
from weft.interop.peft.family import FAMILIES, Family
from weft.interop.peft.heads import followers, mirrored, write_heads
from weft.interop.peft.mixtures import NOT_WRITTEN
from weft.interop.peft.place import Place, Places, Unwritable
from weft.interop.peft.tokens import EMBEDDINGS, HEADS, AdaptionPrompt, Whole

Sites = list[tuple[Place, Any]]

RENAMED = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Names that PEFT takes for the separate experts of older files, in a model whose experts are fused."""
KEPT = frozenset({"qwen2_moe"})
"""Types of such models whose names PEFT leaves alone."""


def to_peft(model: nn.Module, record: Record) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors; Unwritable says why there are none."""
    places = Places(model)
    sites = [(places.planned(s), s.method) for s in record.plan.sites]
    mains = [(p, m) for p, m in sites if m.name != "full"]
    family = _family({m.name for _, m in mains})
    _check(family, mains, places)
    own = {a: _tensors(adapter) for a, adapter in record.adapters.items()}
    prefix = "base_model." if isinstance(family, Whole) else "base_model.model."
    config, tensors = header(model, family.peft_type), {}
    shared = _tied(sites, own, places) if record.plan.tied == "share" else []
    mains += [(p, m) for p, m in shared if m.name != "full"]
    config |= family.options(mains, places)
    if shared:
        config["ensure_weight_tying"] = True
    holder = record.shared[family.method].tensors() if family.method in record.shared else {}
    if isinstance(family, Whole):
        each = {p.address: {**holder, **own[p.address]} for p, _ in mains}
        tensors[EMBEDDINGS] = family.join(places, each, mains[0][1])
        tensors |= family.write_beside(each[mains[0][0].address])
    else:
        for place, method in mains:
            level = _level(place, mains)
            for leaf, value in family.write(place, {**holder, **own[place.address]}, method).items():
                tensors[f"{prefix}{place.path}.{level}{leaf}"] = value
    if family.shared:
        tensors |= {f"base_model.{k}": v for k, v in family.write_shared(holder).items()}
    fulls = [(p, own[p.address]) for p, m in [*sites, *shared] if m.name == "full"]
    expected = HEADS.get(config["task_type"] or "", ()) if isinstance(family, Whole) else ()
    names, state = write_heads(fulls, expected, places)
    if names and isinstance(family, AdaptionPrompt):
        raise Unwritable(f"PEFT's {family.peft_type} has no modules_to_save for {', '.join(names)}")
    if names:
        config["modules_to_save"] = names
    tensors |= {f"{prefix}{k}": v for k, v in state.items()}
    return config, _apart(tensors)


def _family(names: set[str]) -> Family:
    known = {f.method: f for f in FAMILIES}
    if not names:
        raise Unwritable("PEFT saves whole modules only beside a method, and this adapter has none but 'full'")
    if len(names) > 1:
        raise Unwritable(f"PEFT has one method in an adapter, and this one has {', '.join(sorted(names))}")
    (name,) = names
    if name == "xlora":
        raise Unwritable(NOT_WRITTEN)
    if name not in known:
        raise Unwritable(f"PEFT has no method like {name!r}; {nearest(name, known)}")
    return known[name]()


def _check(family: Family, mains: Sites, places: Places) -> None:
    kind = getattr(getattr(places.model, "config", None), "model_type", None)
    risky = kind not in KEPT and any(p.path.rpartition(".")[2] in RENAMED for p, _ in mains)
    fused = risky and bool(places.of_kind("experts"))
    for place, _ in mains:
        reason = family.why_not(place)
        if reason is None and place.is_parameter and not family.takes_parameters:
            reason = "PEFT has it for no bare parameter, such as fused experts"
        if reason is None and place.offer.through_weight and place.offer.kind != "norm" and not place.is_parameter:
            reason = "a neighbour reads this weight without calling the module, which PEFT's wrapper would not notice"
        if reason is None and fused and not place.is_parameter and place.path.rpartition(".")[2] in RENAMED:
            reason = "PEFT takes this name for one of the model's fused experts when it loads the adapter"
        if reason is not None:
            raise Unwritable(f"{place.address}: {family.method} at a {place.base.__name__}: {reason}")


def _level(place: Place, mains: Sites) -> str:
    """PEFT nests the parameters of one module: the first is innermost."""
    if not place.is_parameter:
        return ""
    order = list(place.module._parameters)
    mine = sorted((p.offer.param for p, _ in mains if p.path == place.path), key=order.index)
    return "base_layer." * (len(mine) - 1 - mine.index(place.offer.param))


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as a safetensors file wants them."""
    seen: set[int] = set()
    found = {}
    for key, value in tensors.items():
        tensor = value.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        found[key] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    both = {**adapter._parameters, **adapter._buffers}
    return {k: v.detach() for k, v in both.items() if v is not None}


def _tied(sites: Sites, own: dict[str, dict[str, Tensor]], places: Places) -> Sites:
    """The modules that see an adapter through a shared weight, as sites of their own with the same tensors."""
    found: Sites = []
    for place, method in sites:
        for other in followers(place, places):
            if method.name not in ("lora", "full") or "A0" in own[place.address]:
                raise Unwritable(f"tied='share' at {place.address}: PEFT ties LoRA and modules_to_save only")
            own[other.address] = mirrored(place.offer.kind, other.offer.kind, own[place.address])
            found.append((other, method))
    return found
