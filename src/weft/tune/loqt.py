"""LoQT: at a growing interval the low-rank product is merged into the quantised base, and begins again elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.attach import records, weave_of
from weft.base import load_base
from weft.kinds.quantised import QuantisedSeat
from weft.quantise.checkpoint import write_quantised
from weft.tune import checkpoint
from weft.tune.session import Session
from weft.tune.step import Learner

__all__ = ["Merging", "merge_and_restart", "merge_steps", "weight_gradients"]

ROUNDS = 5
"""Of quantising W - s B A and solving for B, the best of which is kept."""


def merge_steps(first: int, growth: float, total: int) -> list[int]:
    """Before step 0, after `first` steps, and after gaps that grow by `growth` each time, while training is left."""
    found, at, gap = [0], float(first), float(first)
    while round(at) < total:
        found.append(round(at))
        gap *= growth
        at += gap
    return found


def weight_gradients(model: nn.Module, paths: Sequence[str], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """dL/dW [O, I] of linear layers that hold no W to differentiate: from what they read and what comes back."""
    found: dict[str, Tensor] = {}
    handles: list[Any] = []

    def watch(path: str) -> Callable[..., None]:
        def after(_module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = args[0].detach().flatten(0, -2)

            def back(dy: Tensor) -> None:
                found[path] = found.get(path, 0) + dy.flatten(0, -2).mT.to(x.dtype) @ x

            y.register_hook(back)

        return after

    try:
        handles += [model.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
        with torch.enable_grad():
            model(**batch).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for p in model.parameters():
            p.grad = None
    return found


@torch.no_grad()
def merge_and_restart(seat: QuantisedSeat, name: str, gradient: Tensor) -> None:
    """Merge s B A into the codes; A becomes the R chief input directions of the gradient, B what rounding lost there.

    W = Q + s B A, then Q = quantise(W - s B A) and B = (W - Q) A^T / s in turn, since A A^T = 1.
    """
    adapter = seat.adapters[name]
    method: Any = adapter.method
    t = adapter.tensors()
    whole = seat.value(name).dense(seat.weight())  # [O, I]
    a = torch.linalg.svd(gradient.float(), full_matrices=False)[2][: method.rank].to(whole.dtype)  # [R, I]
    least, best = torch.inf, torch.zeros_like(t["B"])
    low = torch.zeros_like(whole)
    for _ in range(ROUNDS):
        seat.write_weight(whole - low)
        q = seat.weight()
        b = (whole - q) @ a.mT / method.scale
        error = (whole - q - method.scale * (b @ a)).norm().item()
        if error < least:
            least, best, source = error, b.to(t["B"].dtype), low
        low = method.scale * (b @ a)
    seat.write_weight(whole - source)
    t["A"].copy_(a)
    t["B"].copy_(best)


class Merging:
    """When and how a run merges. The base is its result as much as the adapter is: every merge writes it to disk.

    Loeschcke et al. 2024, arXiv 2405.16528, with the projection on the input side of every layer (theirs is on the
    smaller side) and not quantised itself.
    """

    def __init__(self, session: Session, learner: Learner):
        settings = session.recipe.train
        assert settings.merge_every is not None, "the caller asks first"
        self.session, self.learner = session, learner
        self.steps = merge_steps(settings.merge_every, settings.merge_growth, session.num_steps)
        self.folder = session.folder / "bases"
        seats = weave_of(session.model).seats
        sites = records(session.model)[session.name].plan.sites
        found = [(s.path, seats[s.site.address]) for s in sites if s.method.name == "lora"]
        self.seats = {path: seat for path, seat in found if isinstance(seat, QuantisedSeat)}

    def begin(self, step: int) -> None:
        """At the start of a run the first merge; when going on, the base as the last merge before `step` left it."""
        if step == 0:
            self.after_step(0)
            return
        last = max(at for at in self.steps if at <= step)
        stored, _ = load_base(str(self.folder / f"step-{last}"), dtype=self.session.recipe.base.dtype)
        for path, seat in self.seats.items():
            other = stored.get_submodule(path)
            seat.restore(type(seat)(other, seat.site, type(seat.weave)()).snapshot())

    def after_step(self, step: int) -> None:
        """Merge, where it is time to."""
        if step not in self.steps:
            return
        model, training = self.session.model, self.session.model.training
        batches = list(self.session.calibration())
        batch = batches[self.steps.index(step) % len(batches)]
        model.eval()
        gradients = weight_gradients(model, list(self.seats), batch)
        for path, seat in self.seats.items():
            merge_and_restart(seat, self.session.name, gradients[path])
            trained = seat.adapters[self.session.name].tensors()["B"]
            self.learner.optimizer.state.pop(trained, None)  # averages of another direction's gradients
        model.train(training)
        self._write(step)

    def _write(self, step: int) -> None:
        """The base after this merge; those that no checkpoint needs any more go."""
        place = self.folder / f"step-{step}"
        shutil.rmtree(place, ignore_errors=True)
        write_quantised(self.session.model, place, self.session.tokenizer)
        kept = [int(path.name.rpartition("-")[2]) for path in checkpoint.folders(self.session.folder / "checkpoints")]
        needed = {max(at for at in self.steps if at <= each) for each in kept} | {step}
        for old in self.folder.iterdir():
            if int(old.name.rpartition("-")[2]) not in needed:
                shutil.rmtree(old)
