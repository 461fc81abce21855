"""`tune_many`: several adapters of one base, each with its own data and settings, trained in one batch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import nn

from weft.attach import use
from weft.errors import WeftError
from weft.recipe import Recipe, load_recipe
from weft.tune import checkpoint
from weft.tune.evaluate import pad_token
from weft.tune.learn import Watch, leave, without_cache
from weft.tune.loop import Progressed, Work, works
from weft.tune.machine import DISK_ERRORS, OutputError
from weft.tune.many_batch import Together
from weft.tune.many_check import check_sessions, check_together
from weft.tune.outcome import TuneResult
from weft.tune.progress import Progress, stderr_console
from weft.tune.run import Run
from weft.tune.session import Session, prepare, threads
from weft.tune.step import Diverged, Learner, StepResult, train_step
from weft.tune.stop import Interrupted, Stop
from weft.units import readable_seconds

__all__ = ["tune_many"]


def tune_many(
    recipes: Sequence[Recipe | str | Path],
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[TuneResult]:
    """Make the adapters that several recipes describe, all in one batch: as `tune` for each, in less time.

    The recipes share the base; each keeps its own data, method, steps, learning rate and output. Every step of every
    run sees the rows, and gets the gradient, that it would on its own, but for the order in which sums are rounded; a
    run that has done its steps leaves the batch. The results come in the order of the recipes.
    Raises what `tune` raises. A run whose loss diverges leaves the batch, the others end, and then Diverged is raised.
    """
    console = console or stderr_console()
    loaded = [each if isinstance(each, Recipe) else load_recipe(each) for each in recipes]
    check_together(loaded)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise WeftError(
            "several adapters at once train in one process: start this without torchrun, or give it one recipe"
        )
    sessions: list[Session] = []
    for recipe in loaded:
        sessions.append(
            prepare(recipe, lambda text: console.print(text, markup=False), beside=sessions[0] if sessions else None)
        )
    check_sessions(sessions)
    runs = [Run(session, console, resume) for session in sessions]
    with threads(loaded[0].train.threads):
        for run in runs:
            run.claim_folder(overwrite=overwrite)
        try:
            return _go(runs, console)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped by Ctrl-C; {_kept(runs)}") from None
        except OSError as error:
            if isinstance(error, WeftError) or error.errno not in DISK_ERRORS:
                raise
            raise OutputError(f"the runs cannot be written ({error.strerror or error}); {_kept(runs)}") from error
        finally:
            for run in runs:
                run.close()


@dataclass
class _Member:
    """A run that learns with others."""

    run: Run
    learner: Learner
    done: Progressed
    error: Diverged | None = None

    @property
    def name(self) -> str:
        return self.run.session.name

    @property
    def finished(self) -> bool:
        return self.done.step >= self.run.session.num_steps


def _go(runs: Sequence[Run], console: Console) -> list[TuneResult]:
    """All parts of all runs, in order."""
    model = runs[0].session.model
    for run in runs:
        run.look()
    _align(runs)
    for run in runs:
        run.begin(forecast=False)
        run.session.packed_from = None
    console.print(f"{len(runs)} adapters in one batch; its rows are padded, one adapter a row", markup=False)
    members = [_Member(run, *run.ready()) for run in runs]
    try:
        with without_cache(model), Stop() as stop:
            _learn(model, members, console, stop)
    finally:
        for member in members:
            leave(member.learner)
    left = [m for m in members if not m.finished and m.error is None]
    if stop.requested and left:
        raise Interrupted(f"stopped by {stop.requested}; {_kept([m.run for m in left])}")
    results = []
    for m in members:
        if m.error is None:
            m.run.say(f"{m.name}: trained {m.done.step} steps in {readable_seconds(m.done.seconds)}")
            use(model, m.name)
            results.append(m.run.end(m.done))
    failed = [f"{m.name}: {m.error}" for m in members if m.error is not None]
    if failed:
        raise Diverged("; ".join(failed))
    return results


def _align(runs: Sequence[Run]) -> None:
    """Go on from the newest step that all have: a kill between two checkpoints leaves one run ahead of the others."""
    going = [run for run in runs if run.found is not None and run.found.step < run.session.num_steps]
    step = min((run.found.step for run in going if run.found is not None), default=0)
    for run in going:
        behind = run.keeper.folder / f"step-{step:08d}"
        if run.found is not None and run.found.step > step and behind.is_dir():
            try:
                run.found, run.keeper.last = checkpoint.read(behind), behind
            except checkpoint.Damaged:
                continue
            run.say(f"{run.session.name}: going on after step {step} instead, where the others are")


def _learn(model: nn.Module, members: Sequence[_Member], console: Console, stop: Stop) -> None:
    """Train until every run has done its steps, has failed, or is to stop."""
    longest = max(members, key=lambda m: m.run.session.num_steps - m.done.step)
    watches, streams = {}, {}
    for m in members:
        session = m.run.session
        progress = Progress(console, num_steps=session.num_steps, done=m.done.step, name=m.name)
        if m is longest:
            bar = progress
        watches[m.name] = Watch(session, m.learner, m.done, m.run.keeper, m.run.sinks, progress, stop)
        streams[m.name] = works(
            session.splits.train, session.recipe.train, m.done, pad_token=pad_token(session.tokenizer)
        )
    left = _grouped([m for m in members if not m.finished])
    with bar:
        while left and not stop.requested:
            settings, pad = left[0].run.session.recipe.train, pad_token(left[0].run.session.tokenizer)
            together = Together(model, [m.learner for m in left], [m.name for m in left], settings, pad)
            try:
                staying = left
                while staying == left and not stop.requested:
                    staying = _round(model, left, together, streams, watches)
                left = staying
            finally:
                together.close()
    for m in left:  # the signal came when these had been asked already
        m.run.keeper.save(m.learner, m.done)


def _round(
    model: nn.Module,
    members: list[_Member],
    together: Together,
    streams: Mapping[str, Iterator[Work]],
    watches: Mapping[str, Watch],
) -> list[_Member]:
    """One step of every run; those that go on."""
    started = time.perf_counter()
    model.train()
    work = [next(streams[m.name]) for m in members]
    totals = together.gradients([each.parts for each in work])
    results: dict[str, StepResult] = {}
    for m, each, total in zip(members, work, totals, strict=True):
        m.learner.gradient = lambda *_, total=total: total
        settings, step = m.run.session.recipe.train, m.done.step + 1
        try:
            results[m.name] = train_step(m.learner, each.parts, settings, rate=each.rate, step=step)
        except Diverged as error:
            m.error = Diverged(f"{error}; {m.run.keeper.kept()}")
    together.piles.refresh()
    seconds, staying = time.perf_counter() - started, []
    for m, each in zip(members, work, strict=True):
        if m.error is None:
            m.done.advance(each, results[m.name], seconds)
            use(model, m.name)  # what a validation measures
            if watches[m.name].after_step(results[m.name]) and not m.finished:
                staying.append(m)
    return staying


def _grouped(members: Sequence[_Member]) -> list[_Member]:
    """Runs of one method after one another, in the order in which these first come."""
    kinds = list(dict.fromkeys(str(m.run.session.plan.method) for m in members))
    return sorted(members, key=lambda m: kinds.index(str(m.run.session.plan.method)))


def _kept(runs: Sequence[Run]) -> str:
    return "; ".join(f"{run.session.name}: {run.keeper.kept()}" for run in runs)
