"""The input of a model: virtual tokens after the embedding, and the positions that an attention prefix takes up."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.affine import StartOp
from weft.core.penalty import penalised
from weft.core.site import Site
from weft.kinds.seat import Weave, Woven, base_class, prove
from weft.kinds.virtual import Virtual, VirtualSeat, batched, per_row, real

_SHAPES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""What a configuration calls that which is done to logits after the head."""


@dataclass(frozen=True, eq=False)
class Ahead:
    """What comes before the user's tokens in one call.

    size: virtual tokens of the longest row. tokens: [B or 1, N, C]. real: which of them each row has, None for all.
    shift: by how much the positions of the user's tokens move, per row [B, 1] or for all. wishes: of each case.
    """

    size: int
    tokens: Tensor | None
    real: Tensor | None
    shift: int | Tensor
    wishes: Sequence[Virtual] = ()


class InputSeat(VirtualSeat):
    """The backbone of a model: token ids in, hidden states out. O is the width of its embedding, I the vocabulary."""

    kind = "input"

    def __init__(self, module: nn.Module, site: Site, weave: Weave, param: str = "input"):
        super().__init__(module, site, weave, param)
        self.names = argument_names(self.base)
        self.attentions: list[VirtualSeat] = []
        self.root_names: tuple[str, ...] = ()  # arguments of the whole model
        self.head: nn.Module | None = None  # what makes logits of the whole model's hidden states
        self.whole = False  # keep the virtual tokens in the result: the caller takes them off
        self.counted_from = counted_from(module)
        self.is_encoder = bool(getattr(module.config, "is_encoder_decoder", False))

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        table = module.get_input_embeddings().weight  # type: ignore[operator]
        return {"out_features": table.shape[1], "in_features": table.shape[0]}

    def start(self, statistics: Mapping[str, Tensor] | None = None) -> StartOp:
        op = StartOp(self.site, self.vocabulary, statistics=statistics)
        op.tokenize = self.tokenize
        return op

    def table(self) -> nn.Module:
        """The embedding of token ids."""
        return self.module.get_input_embeddings()  # type: ignore[operator]

    def vocabulary(self) -> Tensor:
        """Its weight in the orientation that methods see, [C, vocabulary]."""
        return self.table().weight.mT  # type: ignore[return-value]

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, by the tokenizer that lies beside the base's weights."""
        return token_ids(self.module, text)

    def used(self) -> bool:
        return bool(self.adapters) or any(seat.adapters for seat in self.attentions)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The backbone's forward with virtual tokens in front; its result has the length of the user's input."""
        forward = self.inner_forward or self.base.forward.__get__(self.module)
        if self.weave.unproved:
            prove(self)
        if self.weave.route is None:
            return forward(*args, **kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        x = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        ahead = self.ahead(x)
        if ahead is None or x is None:
            return forward(*args, **kwargs)
        seen = self._seen(given, ahead)
        size = ahead.size if seen == 0 else 0  # virtual tokens that this very call puts in
        self._positions(given, ahead, x, seen)
        self._mask(given, ahead, x, seen)
        if size:
            self._embed(given, ahead)
        result = forward(**given)
        if size and self.training():
            result = self._answered(result, ahead)
        if not size or self.whole or self.is_encoder:
            return result
        return without(result, size, size + x.shape[1])

    def ahead(self, x: Tensor | None) -> Ahead | None:
        """What the route in use puts before a batch; None when that is nothing."""
        if x is None:
            return None
        ids = self.ids(x.shape[0], x.device)
        counts, prefix = self.counts(), self._prefix_counts()
        if not max(counts) and not max(prefix):
            return None
        wishes = self.wishes() if max(counts) else []
        tokens, mask = batched([w.stream(0) for w in wishes], ids) if wishes else (None, None)
        shift = per_row([c + p for c, p in zip(counts, prefix, strict=True)], ids)
        return Ahead(max(counts), tokens, mask, shift, wishes)

    def _answered(self, result: Any, ahead: Ahead) -> Any:
        """The result with the losses of prompts that hold answers: each answer is predicted from what comes before it.

        The prompt comes first and sees no row of the batch, so that one row tells its loss.
        """
        for case, wish in enumerate(ahead.wishes):
            told, ids = wish.answers(), self.ids(len(result[0]), result[0].device)
            if told is None or (ids is not None and not bool((ids == case).any())):
                continue
            row = 0 if ids is None else int((ids == case).nonzero()[0])
            states = result[0][row : row + 1, ahead.size - wish.num_ahead : ahead.size - 1]  # [1, N - 1, C]
            logits = self._logits(states).float()[0]
            losses = torch.nn.functional.cross_entropy(logits, told[0][1:], reduction="none")
            hidden = penalised(result[0], (told[1][1:] * losses).sum())
            if isinstance(result, tuple):
                result = (hidden, *result[1:])
            else:
                result.last_hidden_state = hidden
        return result

    def _logits(self, states: Tensor) -> Tensor:
        """What the model makes of hidden states, past whoever listens to its head."""
        config: Any = self.module.config
        shaped = [k for k in _SHAPES if getattr(config, k, None) not in (None, 1, 1.0)]
        if self.head is None or shaped or not self.weave.causal:
            what = f"shapes its logits ({shaped[0]})" if shaped else "has no head that predicts one token after another"
            raise ValueError(
                f"the prompt has answers of its own to learn, and this {type(self.module).__name__} {what}: leave the "
                "types of its answers (4, 8, ...) out of token_types"
            )
        return type(self.head).forward(self.head, states)

    def _prefix_counts(self) -> tuple[int, ...]:
        """Positions that attention prefixes take up, under each distinct route."""
        each = [seat.counts() for seat in self.attentions]
        return tuple(map(max, zip(*each, strict=True))) if each else (0,) * len(self.routes())

    def _seen(self, given: dict[str, Any], ahead: Ahead) -> Any:
        past = given.get("past_key_values")
        if past is None:
            return 0
        if ahead.size and getattr(past, "is_compileable", False):
            raise ValueError(
                "a static cache has no room for virtual tokens at the input; generate with the default dynamic cache"
            )
        return past.get_seq_length()

    def _mask(self, given: dict[str, Any], ahead: Ahead, x: Tensor, seen: int) -> None:
        """Let every row see its own virtual tokens, and only those."""
        n, mask = ahead.size, given.get("attention_mask")
        if not n or (mask is None and ahead.real is None):
            return
        user = x.shape[1] + (seen - n if seen else 0)  # the user's tokens so far
        if mask is None:
            mask = x.new_ones(x.shape[0], user, dtype=torch.long)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                "virtual tokens at the input need an attention mask of one number per token [B, T], and this one is "
                f"{found}; pass the mask that the tokenizer made"
            )
        if mask.shape[1] == user + n:  # whoever called has made room already
            return
        if mask.shape[1] != user:
            raise ValueError(
                f"the attention mask has {mask.shape[1]} columns where {user} tokens follow the virtual ones; "
                "a cache made without this adapter cannot be continued with it"
            )
        given["attention_mask"] = torch.cat([_columns(mask, ahead.real, n), mask], dim=1)

    def _positions(self, given: dict[str, Any], ahead: Ahead, x: Tensor, seen: Any) -> None:
        """Count the user's tokens from behind the virtual ones of their own row."""
        positions = given.get("position_ids")
        plain = isinstance(ahead.shift, int)
        if positions is None and plain and ahead.shift == ahead.size and not self.counted_from:
            return  # the model counts the tokens it sees, the virtual ones among them
        if "position_ids" not in self.names:
            if plain or relative(self.module):
                return
            raise ValueError(
                f"{type(self.module).__name__} takes no position_ids, so rows of one batch cannot have different "
                "numbers of virtual tokens; call it once per adapter"
            )
        if positions is None:
            before = seen - ahead.size if ahead.size and seen != 0 else seen
            positions = self._own_positions(given, x, before)
        if positions.ndim != 2:
            raise ValueError("virtual tokens need position_ids of one number per token [B, T] or none")
        positions = positions + ahead.shift
        if ahead.size and seen == 0:
            # right before the first token of their row, and behind a prefix
            virtual = torch.arange(ahead.size, device=x.device).unsqueeze(0) + (ahead.shift - ahead.size)  # [B or 1, N]
            virtual = virtual.clamp(min=0) + (self.counted_from or 0)  # 0: those that a row does not have
            positions = torch.cat([virtual.expand(positions.shape[0], -1), positions], dim=1)
        given["position_ids"] = positions

    def _own_positions(self, given: dict[str, Any], x: Tensor, before: int) -> Tensor:
        """The positions that the model itself would give to the user's tokens, [B or 1, T]."""
        if self.counted_from is None:
            return (torch.arange(x.shape[1], device=x.device) + before).unsqueeze(0)
        counts = given.get("attention_mask")
        if counts is None:
            counts = torch.ones(x.shape[0], before + x.shape[1], dtype=torch.long, device=x.device)
        counts = counts.long()
        return (counts.cumsum(1) * counts - 1)[:, -x.shape[1] :] + self.counted_from

    def _embed(self, given: dict[str, Any], ahead: Ahead) -> None:
        embedded = given.get("inputs_embeds")
        if embedded is None:
            embedded = self.table()(given["input_ids"])
        assert ahead.tokens is not None
        tokens = ahead.tokens.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        given["inputs_embeds"] = torch.cat([tokens, embedded], dim=1)  # [B, N + T, C]
        given["input_ids"] = None
        types = given.get("token_type_ids")
        if types is not None:
            given["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], ahead.size), types], dim=1)

    def around(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of the whole model: labels and the mask of a cross-attention make room for virtual tokens."""
        n = max(self.counts())
        if not n:
            return forward(*args, **kwargs)
        given = {**dict(zip(self.root_names, args, strict=False)), **kwargs}
        if self.is_encoder:
            self._cross_mask(given, n)
            return forward(**given)
        x = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        labels: Any = given.get("labels")
        past = given.get("past_key_values")
        per_token = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim == 2
        if x is None or not per_token or labels.shape != x.shape[:2] or (past is not None and past.get_seq_length()):
            return forward(*args, **kwargs)
        given["labels"] = torch.cat([labels.new_full((labels.shape[0], n), -100), labels], dim=1)
        self.whole = True  # the loss counts the first token, which the last virtual one predicts
        try:
            result = forward(**given)
        finally:
            self.whole = False
        return without(result, n, n + labels.shape[1])

    def _cross_mask(self, given: dict[str, Any], n: int) -> None:
        """The decoder sees the encoder's virtual tokens."""
        encoded = given.get("encoder_outputs")
        x = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        x = encoded[0] if encoded is not None else x
        if x is None:
            return
        user = x.shape[1] - (n if encoded is not None else 0)
        mask, own = given.get("attention_mask"), real(self.counts(), self.ids(x.shape[0], x.device))
        if mask is None and own is None:
            return
        if mask is None:
            mask = torch.ones(x.shape[0], user, dtype=torch.long, device=x.device)
        if mask.shape[1] != user:
            raise ValueError(
                f"the attention mask has {mask.shape[1]} columns and the encoder's states are {x.shape[1]} long with "
                f"{n} virtual tokens in front: encoder_outputs must come from the model under the same adapter"
            )
        given["attention_mask"] = torch.cat([_columns(mask, own, n), mask], dim=1)


class WovenEntry(Woven):
    """A backbone whose input has virtual tokens in front."""

    through_root = False  # it enters its input itself
    seat: InputSeat

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.seat.enter(args, kwargs)


def is_backbone(module: nn.Module, child: str) -> bool:
    """Whether a module is what first turns token ids into hidden states: the innermost one that takes embeddings."""
    if not _takes_embeddings(module) or (getattr(module.config, "is_encoder_decoder", False) and child == "decoder"):
        return False
    return not any(_takes_embeddings(m) for m in module.modules() if m is not module)


def _takes_embeddings(module: nn.Module) -> bool:
    if not hasattr(module, "get_input_embeddings") or not hasattr(module, "config"):
        return False
    return {"input_ids", "inputs_embeds"} <= set(argument_names(base_class(module)))


_NAMES: dict[type, tuple[str, ...]] = {}


def argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The named arguments of a module class's forward, in order."""
    if cls not in _NAMES:
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = [*inspect.signature(cls.forward).parameters.values()][1:]
        _NAMES[cls] = tuple(p.name for p in parameters if p.kind in named)
    return _NAMES[cls]


def token_ids(backbone: Any, text: str) -> list[int]:
    """Ids of a text, by the tokenizer that lies beside a backbone's weights; ValueError where there is none."""
    from transformers import AutoTokenizer

    origin = backbone.__dict__.get("loaded_from") or getattr(backbone.config, "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(origin)(text)["input_ids"]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"init_text needs the base's tokenizer, and none is found at {origin!r}: "
            "give the ids of the text as init_ids"
        ) from error


def counted_from(module: nn.Module) -> int | None:
    """The first position of a model that counts only real tokens (RoBERTa, OPT); None where padding counts too."""
    for child in module.modules():
        if isinstance(child, nn.Embedding) and "attention_mask" in argument_names(base_class(child)):
            return 0
    places = getattr(getattr(module, "embeddings", None), "position_embeddings", None)
    padding = getattr(places, "padding_idx", None)
    return None if padding is None else padding + 1


def relative(module: nn.Module) -> bool:
    """Whether positions count only relative to each other, so that a row may start anywhere."""
    config: Any = module.config
    if any(hasattr(module, f"build_{kind}alibi_tensor") for kind in ("", "mpt_")):
        return True
    return hasattr(config, "relative_attention_num_buckets") or bool(getattr(config, "alibi", False))


def without(value: Any, n: int, total: int) -> Any:
    """A model's result with the first n of `total` tokens taken off: states [B, T, C], attentions [B, H, T, keys]."""
    if isinstance(value, Tensor):
        if value.ndim == 3 and value.shape[1] == total:
            return value[:, n:]
        return value[:, :, n:] if value.ndim == 4 and value.shape[2] == total else value
    if isinstance(value, dict):
        for key, item in list(value.items()):
            value[key] = without(item, n, total)
    return tuple(without(item, n, total) for item in value) if isinstance(value, tuple) else value


def _columns(mask: Tensor, own: Tensor | None, n: int) -> Tensor:
    return mask.new_ones(mask.shape[0], n) if own is None else own.to(mask.dtype)
