"""The parts of a model that a mergekit file may merge each in its own way: stacks of layers and what is beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weft.checkpoints.weights import CheckpointError
from weft.errors import nearest
from weft.patterns import layer_of

__all__ = ["depth_key", "split"]

_PREFIXES: dict[str, tuple[str, ...]] = {
    "default": ("",),
    "encoder": ("encoder.", "model.encoder."),
    "decoder": ("decoder.", "model.decoder."),
    "shared": ("shared.", "model.shared.", "lm_head.", "final_logits_bias"),
    "text_decoder": ("language_model.", "model.", "lm_head."),
    "multi_modal_projector": (
        "multi_modal_projector.", "model.multi_modal_projector.", "visual.merger.", "model.visual.merger.",
    ),
    "vision_tower": ("vision_tower.", "model.vision_tower.", "visual.", "model.visual."),
    "vision_model": ("vision_model.", "model.vision_model."),
}  # fmt: skip
_DEPTHS: dict[str, tuple[str, ...]] = {
    "default": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "encoder": ("num_layers", "encoder_layers", "num_hidden_layers"),
    "decoder": ("num_decoder_layers", "decoder_layers"),
    "text_decoder": ("text_config.num_hidden_layers", "num_hidden_layers"),
    "vision_tower": ("vision_config.num_hidden_layers", "vision_config.depth"),
    "vision_model": ("vision_config.num_hidden_layers",),
}


def split(wanted: Sequence[str] | None, names: Iterable[str]) -> dict[str, list[str]]:
    """A model's tensors by module. wanted: the modules of a file; by default an encoder and a decoder are two.

    Raises CheckpointError for a module that is not known or not there, and for tensors that no module holds.
    """
    names = [*names]
    if wanted is None:
        stacks = [m for m in ("encoder", "decoder") if any(layer_of(n) is not None and _length(m, n) for n in names)]
        wanted = [*stacks, "shared"] if len(stacks) == 2 else ["default"]
    found: dict[str, list[str]] = {}
    for module in wanted:
        if module not in _PREFIXES:
            raise CheckpointError(f"there is no module {module!r}; {nearest(module, _PREFIXES)}")
        found[module] = []
    left: list[str] = []
    for name in names:
        best = max(found, key=lambda module: _length(module, name))
        (found[best] if _length(best, name) else left).append(name)
    if left:
        raise CheckpointError(
            f"no module of {', '.join(found)} holds {left[0]} ({len(left)} such tensors): name theirs too"
        )
    for module, tensors in found.items():
        if not tensors:
            raise CheckpointError(f"the models have no module {module!r}: no tensor's name begins like one of it")
    return found


def depth_key(module: str, config: Mapping[str, Any]) -> str | None:
    """Where a configuration says how many layers a module has."""
    for key in _DEPTHS.get(module, ()):
        inner: Any = config
        for part in key.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if isinstance(inner, int):
            return key
    return None


def _length(module: str, name: str) -> int:
    """How much of a name says that it is the module's; 0 where nothing does."""
    return max((1 + len(p) for p in _PREFIXES[module] if name.startswith(p)), default=0)
