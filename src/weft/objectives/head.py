"""The head of a language model, run on trained tokens only and in chunks.

A model's own forward runs whole (its hooks, virtual tokens and sharding with it), but its head hands its input out
instead of making logits of it. What the model does to logits after the head is found by trying: it is shown some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils.checkpoint import checkpoint

from weft.attach import using
from weft.core.plain import is_plain
from weft.core.route import Rows, names
from weft.errors import WeftError
from weft.kinds.seat import Woven, WovenForward, base_class, prove
from weft.objectives.fused import Shaping, fused_losses, losses_of

__all__ = ["Head", "chunk_tokens", "find_head", "head_in_chunks", "hidden_states", "token_losses", "trained_tokens"]

_CHUNK_BYTES = 32 * 2**20
_LEAST_TOKENS = 64  # fewer rows make the head's product slower than its size
_PROBE_TOKENS = 4

Way = Literal["fused", "module", "whole"]


class _Listener:
    """Stands in for the head's forward: keeps its input, and gives logits of no words or chosen ones."""

    def __init__(self, answer: Tensor | None = None):
        self.heard: list[Tensor] = []
        self.answer = answer

    def __call__(self, hidden: Tensor) -> Tensor:
        self.heard.append(hidden)
        return hidden[..., :0] if self.answer is None else self.answer


@dataclass(frozen=True)
class Head:
    """The last module of a language model, and what the model does to its logits."""

    module: nn.Module
    shaping: Shaping
    listener: _Listener = field(default_factory=_Listener, compare=False)  # one for all calls: compiled once

    @property
    def way(self) -> Way:
        """How it is read as it stands.

        fused: as a weight, which is frozen, or adapted by its owner; module: called on each chunk and again in the
        backward, for adapters and compressed weights; whole: in the model's forward, where rows of the batch use
        different adapters or the weight is sharded.
        """
        module: Any = self.module
        wrapped = "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
        if isinstance(module, Woven):
            seat = next(iter(module.seats.values()))
            wrapped = wrapped or seat.inner_forward is not None
            if _adapted(module) and isinstance(seat.weave.route, Rows):
                return "whole"
            if _adapted(module) and issubclass(type(module), WovenForward):
                return "module"
        if any(hasattr(p, "device_mesh") for p in module._parameters.values()):
            return "whole"  # sharded: it is there in its owner's forward only
        plain = base_class(module) is nn.Linear and is_plain(module._parameters["weight"].data)
        return "fused" if plain and not wrapped else "module"


_found: WeakKeyDictionary[nn.Module, Head | str] = WeakKeyDictionary()


def find_head(model: nn.Module) -> Head | str:
    """A model's head, or why it cannot be parted from it; found by two forwards of four tokens, and remembered."""
    known = _found.get(model)
    if known is None or (isinstance(known, Head) and known.module is not _output_embeddings(model)):
        known = _found[model] = _find(model)
    return known


def head_in_chunks(model: Any, chunk: int | None) -> tuple[Head | None, int, str | None]:
    """The head and how many tokens it takes at once; None, and what to say, where all logits are held.

    chunk: as in a recipe. Raises WeftError where a number is asked for and the model cannot.
    """
    if chunk == 0:
        return None, 0, None
    head = find_head(model)
    if not isinstance(head, str):
        return head, chunk or chunk_tokens(head), None
    if chunk is not None:
        raise WeftError(f"train.loss_chunk: {head}: set it to 0, which holds all logits at once")
    return None, 0, f"the loss holds all logits at once: {head}"


def chunk_tokens(head: Head) -> int:
    """Tokens whose logits take about 32 MiB in float32."""
    vocabulary = _vocabulary(head.module)
    return max(_LEAST_TOKENS, _CHUNK_BYTES // (4 * vocabulary))


def hidden_states(call: Any, head: Head, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the head reads of a batch, [B, T, C]. call: the model, or a wrapper that runs it."""
    heard = head.listener.heard
    heard.clear()  # of a call that failed
    with _listening(head.module, head.listener):
        call(**inputs)
    (hidden,) = heard
    heard.clear()
    return hidden


def trained_tokens(labels: Tensor, ignored: int, *, count: int | None = None) -> tuple[Tensor, Tensor]:
    """For labels [B, T]: the places in the flattened batch that predict a trained token, and these tokens, both [N].

    count: how many there are, by the data; it is used for labels without numbers (fake tensors), which cannot be asked.
    """
    where = labels[:, 1:] != ignored  # [B, T - 1]
    at = where.nonzero() if count is None or not is_fake(labels) else torch.nonzero_static(where, size=count)  # [N, 2]
    places = at[:, 0] * labels.shape[1] + at[:, 1]
    return places, labels.flatten()[places + 1]


def token_losses(
    hidden: Tensor, places: Tensor, tokens: Tensor, *, head: Head, chunk: int, summed: bool
) -> tuple[Tensor, Tensor]:
    """-log p of each token [N], in float32, at its place in the flattened hidden [B, T, C], and how many are right.

    summed: the caller adds the losses up, so that a trained head needs the sum of their gradients only.
    """
    flat = hidden.flatten(0, 1)  # [B T, C]
    if head.way == "fused":
        module: Any = head.module
        weight, bias = module.weight, module.bias
        if summed or not weight.requires_grad:
            return fused_losses(flat, places, tokens, weight=weight, bias=bias, shaping=head.shaping, chunk=chunk)
    return _called(flat, places, tokens, head, chunk)


def _called(flat: Tensor, rows: Tensor, targets: Tensor, head: Head, chunk: int) -> tuple[Tensor, Tensor]:
    """The head as a module on each chunk, which is run again in the backward."""

    def losses(part: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return losses_of(head.shaping(head.module(part).float()), wanted)

    found, correct = [], targets.new_zeros(())
    for start in range(0, max(len(rows), 1), chunk):
        part = flat.index_select(0, rows[start : start + chunk])  # [n, C]
        wanted = targets[start : start + chunk]
        again = torch.is_grad_enabled() and start + chunk < len(rows)  # the last is next in the backward: kept
        loss, right = checkpoint(losses, part, wanted, use_reentrant=False) if again else losses(part, wanted)
        found.append(loss)
        correct = correct + right
    return torch.cat(found), correct


def _adapted(module: Woven) -> bool:
    """Whether the route in use changes this module."""
    return any(names(seat.weave.route) & seat.adapters.keys() for seat in module.seats.values())


@contextmanager
def _listening(module: nn.Module, listener: _Listener) -> Iterator[None]:
    own = module.__dict__
    before = own.get("forward")
    for seat in module.seats.values() if isinstance(module, Woven) else ():
        prove(seat)  # the listener is called in its place
    own["forward"] = listener
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def _vocabulary(module: nn.Module) -> int:
    sized = getattr(module, "out_features", None)
    return int(sized) if isinstance(sized, int) else len(module.weight)  # type: ignore[arg-type]


def _find(model: nn.Module) -> Head | str:
    module = _output_embeddings(model)
    kind = type(model).__name__
    if module is None:
        return f"a {kind} does not say what its output embedding is"
    random, training = torch.random.get_rng_state(), model.training
    model.eval()
    try:
        with torch.no_grad(), _without_adapters(model):
            shaping = _shaping(model, module)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        return f"a {kind} does not run without its logits ({str(error).splitlines()[0] if str(error) else error!r})"
    finally:
        model.train(training)
        torch.random.set_rng_state(random)
    if shaping is None:
        return f"a {kind} does more to its logits than to scale and cap them"
    return Head(module, shaping)


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    if "weave" not in model.__dict__:
        yield
        return
    with using(model, None):
        yield


def _shaping(model: nn.Module, module: nn.Module) -> Shaping | None:
    """What comes out for logits that are known; None when that is not a scale and a cap of each."""
    device = next(model.parameters()).device
    if is_fake(next(model.parameters())):  # no numbers to look at: sizes are all that is asked for
        return Shaping()
    ids = torch.arange(_PROBE_TOKENS, device=device).unsqueeze(0) % _vocabulary(module)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    hidden = hidden_states(model, Head(module, Shaping()), inputs)
    if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
        return None
    shown = torch.linspace(-80.0, 80.0, _PROBE_TOKENS * _vocabulary(module), device=device)
    shown = shown.reshape(_vocabulary(module), _PROBE_TOKENS).mT.unsqueeze(0).contiguous()  # [1, T, V]
    shown[0, 0, 0], shown[0, 0, 1] = 1e-2, 1e6
    listener = _Listener(shown.clone())
    with _listening(module, listener):
        given = model(**inputs).logits
    if given.shape != shown.shape:
        return None
    scale, largest = given[0, 0, 0].item() / 1e-2, given[0, 0, 1].item()
    capped = abs(largest) < 0.5e6 * abs(scale)
    found = Shaping(_rounded(scale if capped else largest / 1e6), _rounded(largest) if capped else None)
    rough = 1e-5 if given.dtype == torch.float32 else 2e-2
    near = torch.allclose(found(shown), given.float(), rtol=rough, atol=rough * 1e-2)
    return found if near else None


def _rounded(value: float) -> float:
    """A number without the noise of the arithmetic that it went through."""
    return 1.0 if abs(value - 1) < 1e-5 else float(f"{value:.8g}")
