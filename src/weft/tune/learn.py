"""The training part of a run: the loop, with what happens around its steps (log, validation, checkpoints, stopping)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from weft import objectives
from weft.core.adapter import Adapter
from weft.data import num_batches
from weft.errors import WeftError
from weft.optim import ZerothOrder
from weft.tune.activations import keep_activations
from weft.tune.compiled import Compilations
from weft.tune.distributed import agreed, leading, num_processes, parallel
from weft.tune.evaluate import measure, pad_token
from weft.tune.evolve import evolution_of
from weft.tune.in_backward import InBackward
from weft.tune.keeper import Keeper, named_parameters
from weft.tune.levers import set_levers
from weft.tune.log import Sink
from weft.tune.loop import Progressed, train
from weft.tune.machine import DISK_ERRORS, memory_bytes
from weft.tune.optimizers import finish, make_optimizer, settled
from weft.tune.optimizers import notes as notes_of
from weft.tune.progress import Progress
from weft.tune.regularise import CoTo, FewBits, Gradient, Mixout, scale_rows
from weft.tune.session import Session
from weft.tune.step import Diverged, Learner, StepResult, backpropagate, make_scaler, update_all
from weft.tune.stop import Interrupted, Stop
from weft.tune.trained import trained_tensors
from weft.tune.zeroth_order import against_slopes, slopes

__all__ = ["Watch", "learn", "leave", "make_learner", "without_cache"]


def make_learner(session: Session) -> Learner:
    """The optimiser and all else that steps need, for a session whose adapter is attached."""
    settings, model = session.recipe.train, session.model
    trained = named_parameters(model, session.name)
    tensors = trained_tensors(model, session.name)
    rows_per_step = settings.batch_size * settings.accumulate
    optimizer = make_optimizer(
        trained, settings, tensors=tensors, steps_per_epoch=num_batches(len(session.splits.train), rows_per_step)
    )
    forward_only = isinstance(optimizer, ZerothOrder)
    gradient: Gradient = slopes if forward_only else parallel(backpropagate)
    coto = CoTo(model, session.name, settings.coto, session.num_steps, gradient) if settings.coto else None
    gradient = gradient if coto is None else coto
    loss_of, said = objectives.chunked_loss_of(
        session.recipe.task, model, chunk=settings.loss_chunk, preference=session.recipe.preference
    )
    notes = [*([said] if said else []), *set_levers(session, loss_of), *notes_of(optimizer)]
    learner = Learner(
        model=model,
        parameters=trained,
        optimizer=optimizer,
        scaler=make_scaler(session.device, None if forward_only else settings.precision),
        loss_of=loss_of,
        call=torch.compile(model) if settings.compile else model,
        adapters=[m for m in model.modules() if isinstance(m, Adapter)],
        packed_from=session.packed_from,
        gradient=Mixout(tensors, settings.mixout, gradient) if settings.mixout else gradient,
        components=tensors.components() if settings.clip_by == "component" else None,
        update=against_slopes if forward_only else update_all,
        hooks=scale_rows(tensors, settings.allora) if settings.allora is not None else (),
        before=() if coto is None else (coto.before,),
        evolution=evolution_of(model, session.name, optimizer, settings, num_steps=session.num_steps),
        notes=notes,
        compiled=Compilations() if settings.compile else None,
    )
    if settings.optimizer_in_backward:
        stepper = InBackward(optimizer, trained, masters=settings.master_weights)
        learner.update, learner.hooks = stepper.update, [*learner.hooks, *stepper.hooks]
    if settings.adapter_bits is not None:
        few = FewBits(trained, settings.adapter_bits, optimizer, learner.update)
        learner.update, learner.codes = few.update, few.codes
    return learner


def learn(
    session: Session,
    learner: Learner,
    progressed: Progressed,
    keeper: Keeper,
    sinks: Sequence[Sink],
    progress: Progress,
) -> None:
    """Train to the last step; the last checkpoint is then of that step.

    Raises Interrupted after Ctrl-C or SIGTERM, with a checkpoint written first, Diverged for a loss that is not a
    number, and WeftError for a disk that refuses.
    """
    try:
        with without_cache(session.model), Stop() as stop, progress:
            watch = Watch(session, learner, progressed, keeper, sinks, progress, stop)
            try:
                train(
                    learner,
                    session.splits.train,
                    session.recipe.train,
                    progressed,
                    pad_token=pad_token(session.tokenizer),
                    after_step=watch.after_step,
                )
            except Diverged as error:
                raise Diverged(f"{error}; {keeper.kept()}") from error
            except OSError as error:
                if error.errno not in DISK_ERRORS or isinstance(error, WeftError):
                    raise
                raise WeftError(f"the run cannot write ({error.strerror or error}); {keeper.kept()}") from error
            if stop.requested and progressed.step < session.num_steps:
                raise Interrupted(f"stopped by {stop.requested} after step {progressed.step}; {keeper.kept()}")
    finally:
        leave(learner)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Training reads no cache of keys and values, and building one takes memory."""
    config: Any = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    if caches is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if caches is not None:
            config.use_cache = caches


def leave(learner: Learner) -> None:
    """Undo what training put on the model, and leave the trained tensors as they are to be used."""
    finish(learner.optimizer)
    for hook in learner.hooks:
        hook.remove()
    keep_activations(learner.model)
    if learner.compiled is not None:
        learner.compiled.close()
    learner.model.eval()


@dataclass
class Watch:
    """What happens after every step."""

    session: Session
    learner: Learner
    progressed: Progressed
    keeper: Keeper
    sinks: Sequence[Sink]
    progress: Progress
    stop: Stop
    loss: float = 0.0
    num_trained: int = 0
    num_tokens: int = 0
    since: float = field(default_factory=time.perf_counter)

    def after_step(self, result: StepResult) -> bool:
        """Log, validate, keep; False when training should stop here."""
        settings, step = self.session.recipe.train, self.progressed.step
        last = step == self.session.num_steps
        self.loss += result.loss * result.num_trained
        self.num_trained += result.num_trained
        self.num_tokens += result.num_tokens
        self._show(result)
        for act in self.learner.after:
            act(step)
        if last or step % settings.log_every == 0:
            self._log(result)
        if settings.evaluate_every and (step % settings.evaluate_every == 0 and not last):
            self._validate()
        stopping = agreed(self.stop)
        due = last or stopping or (settings.checkpoint_every and step % settings.checkpoint_every == 0)
        if due and leading():
            self.keeper.save(self.learner, self.progressed)
        return not stopping

    def _speed(self) -> float:
        return self.num_tokens / max(time.perf_counter() - self.since, 1e-9)

    def _show(self, result: StepResult) -> None:
        held = memory_bytes(self.session.device)
        self.progress.update(self.progressed.step, loss=result.loss, tokens_per_second=self._speed(), memory_bytes=held)

    def _log(self, result: StepResult) -> None:
        """The mean since the last line, over trained positions."""
        done, held = self.progressed, memory_bytes(self.session.device)
        loss, speed = self.loss / self.num_trained, self._speed()
        record = {
            "event": "train",
            "step": done.step,
            "loss": loss,
            "learning_rate": result.learning_rate,
            "tokens": done.num_tokens,
            "tokens_per_second": round(speed, 1),
            "gradient_norm": result.gradient_norm,
            "memory_bytes": held,
            "seconds": round(done.seconds, 3),
        }
        for sink in self.sinks:
            sink.write(record)
        left = done.seconds / done.step * (self.session.num_steps - done.step)
        self.progress.log(done.step, loss=loss, tokens_per_second=speed, memory_bytes=held, seconds_left=left)
        self._restart_interval()

    def _validate(self) -> None:
        session, validation = self.session, self.session.splits.validation
        if validation is None:
            return
        settings, step = session.recipe.train, self.progressed.step
        with settled(self.learner.optimizer):
            figures = measure(
                session.model, session.tokenizer, validation.examples, task=session.recipe.task,
                preference=session.recipe.preference, batch_size=settings.batch_size, precision=settings.precision,
                loss_chunk=settings.loss_chunk,
                stopped=self.stop.is_requested if num_processes() == 1 else lambda: False,  # they measure in step
            )  # fmt: skip
        if figures:
            best = self.progressed.best
            if not best or figures["loss"] < best["loss"]:
                self.progressed.best = {"step": step, "loss": figures["loss"]}
            for sink in self.sinks:
                sink.write({"event": "validation", "step": step, **figures})
            self.progress.note(f"step {step}/{session.num_steps}  validation loss {figures['loss']:.4f}")
        self._restart_interval()

    def _restart_interval(self) -> None:
        self.loss, self.num_trained, self.num_tokens, self.since = 0.0, 0, 0, time.perf_counter()
