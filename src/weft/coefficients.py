"""How much of each adapter, site by site, learned by gradient: few numbers, from few rows, with labels or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from weft.attach import attach_plan, detach, free_name, records, use, weave_of
from weft.combine import RuleError
from weft.conditions import tell
from weft.core.method import Frozen
from weft.core.route import Route
from weft.data import Example, collate
from weft.differences import Difference, difference, flat, with_kernel
from weft.errors import AdapterError, nearest
from weft.kinds.seat import Seat
from weft.objectives import loss_of
from weft.registry import method_from_spec
from weft.targets import Plan, resolve
from weft.tune.evaluate import device_of, evaluating, pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Learn", "Learned", "learn_coefficients"]


@dataclass(frozen=True)
class Learn:
    """What is learned: the weights w of sum_k w_k (W_k - W), one for each adapter, or one at every site of each.

    loss: "labels", the task's own loss (aTLAS: Zhang et al. 2024, arXiv 2407.02880), or "entropy", of what the model
        predicts, which needs no labels (AdaMerging: Yang et al. 2023, arXiv 2310.02575; with by "adapter" its task-wise
        form). start: of every weight. between: what weights are held between after each step, if anything.
    """

    loss: Literal["labels", "entropy"] = "labels"
    by: Literal["site", "adapter"] = "site"
    steps: int = 100
    learning_rate: float = 0.01
    batch_size: int = 8
    start: float = 0.3
    between: tuple[float, float] | None = None


@dataclass(frozen=True)
class Learned:
    """weights: as `weft.combine` takes them. losses: the mean loss of the batch of every step, the first one first."""

    weights: Mapping[str, Mapping[str, float]]
    losses: tuple[float, ...]

    def __str__(self) -> str:
        count = sum(map(len, self.weights.values()))
        return (
            f"learned {count} weights in {len(self.losses)} steps: loss {self.losses[0]:.4f} to {self.losses[-1]:.4f}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def learn_coefficients(
    model: nn.Module,
    adapters: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    how: Learn | None = None,
    *,
    task: str = "causal-lm",
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Learned:
    """Learn how much of each adapter of a model to add, with Adam through one pass of their sum.

    adapters: of any methods that merge; a tuned checkpoint becomes one by `weft extract`. examples: their labels are
    not read for the entropy. The model, its route and its adapters are left as they were. Raises AdapterError for an
    adapter that is not there or that no weight can express, RuleError for settings that learn nothing.
    """
    how = how or Learn()
    _check(model, adapters, examples, how)
    with _summed(model, adapters) as parts:
        values = torch.full((len(adapters), len(parts) if how.by == "site" else 1), how.start, requires_grad=True)
        optimiser = torch.optim.Adam([values], lr=how.learning_rate)
        loss = _entropy if how.loss == "entropy" else loss_of(task)
        losses = []
        with evaluating(model):
            for step, batch in enumerate(_batches(examples, how, tokenizer, seed)):
                batch = batch.to(device_of(model))
                tell(model, batch.conditions)
                each = zip(parts, values.expand(-1, len(parts)).T, strict=True)
                replaced = {key: t for part, w in each for key, t in part(w)}
                total, count, _ = loss(_called_with(model, replaced), batch)
                mean = total / count
                (values.grad,) = torch.autograd.grad(mean, [values])
                optimiser.step()
                if how.between is not None:
                    values.data.clamp_(*how.between)
                losses.append(float(mean.detach()))
                say(f"step {step + 1}/{how.steps}: {how.loss} {losses[-1]:.4f}")
    found = values.detach().expand(-1, len(parts)).tolist()
    weights = {
        adapter: {part.address: w for part, w in zip(parts, row, strict=True) if adapter in part.here}
        for adapter, row in zip(adapters, found, strict=True)
    }
    return Learned(weights, tuple(losses))


@dataclass(frozen=True)
class _Part:
    """The sum at one site. keys: the names of its parameters in the model, by the method's own."""

    address: str
    seat: Seat
    order: tuple[str, ...]
    here: Mapping[str, Difference]
    keys: Mapping[str, str]

    def __call__(self, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parameters for these weights [K], with the graph to them."""
        share = dict(zip(self.order, weights.to(self.seat.site.device), strict=True))
        if "B" in self.keys:
            b = torch.cat([share[n] * d.b.float() for n, d in self.here.items() if d.b is not None], -1)
            yield self.keys["B"], b.to(self.seat.site.dtype)
            return
        weight = self.seat.weight()
        change = sum((share[n] * d.weight().float() for n, d in self.here.items()), torch.zeros_like(weight).float())
        yield self.keys["weight"], (weight + change).to(weight.dtype)
        bias = self.seat.bias()
        if bias is not None:
            shifts = [share[n] * d.shift for n, d in self.here.items() if d.shift is not None]
            yield self.keys["bias"], sum(shifts, bias).to(bias.dtype)


@contextmanager
def _summed(model: nn.Module, adapters: Sequence[str]) -> Iterator[list[_Part]]:
    """An adapter that holds the sum while weights are learned: low rank where all of it is, else whole weights."""
    weave, name = weave_of(model), free_name(model, "learning")
    found = {
        address: here
        for address, seat in weave.seats.items()
        if (here := {n: difference(seat, n) for n in adapters if n in seat.adapters})
    }
    before: Route = weave.route
    record = attach_plan(
        model, _plan(model, name, found), tensors={a: _tensors(weave.seats[a], d) for a, d in found.items()}
    )
    try:
        names = {id(p): key for key, p in model.named_parameters(remove_duplicate=False)}
        parts = []
        for address, here in found.items():
            own = record.adapters[address]._parameters
            keys = {key: names[id(p.requires_grad_(False))] for key, p in own.items() if p is not None}
            parts.append(_Part(address, weave.seats[address], tuple(adapters), here, keys))
        use(model, name)
        yield parts
    finally:
        use(model, before)
        detach(model, name)


def _is_low_rank(here: Mapping[str, Difference]) -> bool:
    return all(d.factored and d.shift is None for d in here.values())


def _plan(model: nn.Module, name: str, found: Mapping[str, Mapping[str, Difference]]) -> Plan:
    specs = {}
    for address, here in found.items():
        rank = sum(d.b.shape[-1] for d in here.values() if d.b is not None)
        low = {"method": "lora", "rank": rank, "alpha": float(rank)}
        specs[address] = low if _is_low_rank(here) else {"method": "full"}
    return resolve(model, method_from_spec({"name": "full"}), specs, name=name)


def _tensors(seat: Seat, here: Mapping[str, Difference]) -> dict[str, Tensor | Frozen]:
    site, dtype = seat.site, seat.site.dtype
    if _is_low_rank(here):
        b = torch.cat([d.b for d in here.values() if d.b is not None], -1)
        a = torch.cat([flat(d.a, site) for d in here.values() if d.a is not None], -2)
        return {"A": Frozen(with_kernel(a, site).to(dtype)), "B": b.to(dtype)}
    bias = seat.bias()
    found: dict[str, Tensor | Frozen] = {"weight": seat.weight().clone()}
    return found if bias is None else found | {"bias": bias.clone()}


def _called_with(model: nn.Module, replaced: Mapping[str, Tensor]) -> Any:
    """The model as a function, with some parameters in the place of its own."""

    def call(**inputs: Any) -> Any:
        return torch.func.functional_call(model, dict(replaced), (), inputs)

    return call


def _entropy(call: Any, batch: Any) -> tuple[Tensor, int, dict[str, Tensor]]:
    """-sum_v p log p, summed over the tokens of all rows, or over rows where one prediction is made for each."""
    logits = call(**batch.inputs()).logits  # [B, T, V] or [B, C]
    picked = logits[batch.attention_mask.bool()] if logits.ndim == 3 else logits  # [N, V]
    log_p = picked.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(), len(picked), {}


def _batches(examples: Sequence[Example], how: Learn, tokenizer: Any, seed: int) -> Iterator[Any]:
    """As many as there are steps, each round over the rows in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(how.steps):
        while len(order) < min(how.batch_size, len(examples)):
            order += torch.randperm(len(examples), generator=generator).tolist()
        rows, order = order[: how.batch_size], order[how.batch_size :]
        yield collate([examples[i] for i in rows], pad_token=pad_token(tokenizer))


def _check(model: nn.Module, adapters: Sequence[str], examples: Sequence[Example], how: Learn) -> None:
    known = records(model)
    for name in adapters:
        if name not in known:
            raise AdapterError(f"this model has no adapter {name!r}; {nearest(name, known)}")
    if not adapters or not examples:
        raise RuleError("weights are learned of one adapter or more, on one row or more")
    if how.steps < 1 or how.batch_size < 1 or how.learning_rate <= 0:
        raise RuleError(
            f"steps={how.steps}, batch_size={how.batch_size}, learning_rate={how.learning_rate}: all must be above 0"
        )
    if how.between is not None and not how.between[0] <= how.start <= how.between[1]:
        raise RuleError(f"start={how.start} does not lie between {how.between[0]} and {how.between[1]}")
    if weave_of(model).merged is not None:
        raise AdapterError(f"{weave_of(model).merged!r} is merged into the weights; unmerge before learning weights")
