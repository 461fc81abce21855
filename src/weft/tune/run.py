"""`tune`: one adapter from a recipe, in small parts called in order; `dry_run`: what it would do."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from weft.adapter import fingerprint
from weft.errors import WeftError
from weft.interop.folder import save
from weft.recipe import Recipe, to_yaml
from weft.tune import checkpoint
from weft.tune.estimate import Estimate, estimate
from weft.tune.evaluate import pad_token
from weft.tune.keeper import Keeper
from weft.tune.learn import learn, make_learner
from weft.tune.log import Sink, cut_log, open_log, read_log
from weft.tune.loop import Progressed
from weft.tune.machine import DISK_ERRORS, OutputError, describe_machine, prove_writable, readable_bytes
from weft.tune.outcome import (
    Measured,
    TuneResult,
    check_parity,
    measure_after,
    measure_before,
    summary,
    write_json,
)
from weft.tune.progress import Progress, readable_seconds, stderr_console
from weft.tune.random_state import seed_everything
from weft.tune.resume import check_same_run, data_digest
from weft.tune.session import Session, attach_adapter, prepare, short_plan, threads
from weft.tune.stop import Interrupted

__all__ = ["DryRun", "dry_run", "tune"]

_PRODUCTS = ("checkpoints", "tensorboard", "adapter", "log.jsonl", "result.json", "report.html", "recipe.yaml")


@dataclass(frozen=True)
class DryRun:
    """What a run would do: the resolved recipe, what will be trained, and what it will take."""

    recipe: str
    plan: str
    num_steps: int
    num_trained: int
    estimate: Estimate

    def __str__(self) -> str:
        return f"{self.recipe}\n{self.plan}\n\nsteps: {self.num_steps}\n{self.estimate}"


def dry_run(recipe: Recipe | str | Path, *, console: Console | None = None) -> DryRun:
    """Resolve a recipe, load what it names and say what would be trained; nothing is written.

    Raises whatever `tune` would raise before training.
    """
    console = console or stderr_console()
    session = prepare(recipe, lambda text: console.print(text, markup=False))
    with threads(session.recipe.train.threads):
        attach_adapter(session)
        needed = _estimate(session)
    return DryRun(to_yaml(session.recipe), str(session.plan), session.num_steps, session.plan.num_parameters, needed)


def tune(
    recipe: Recipe | str | Path, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> TuneResult:
    """Make the adapter that a recipe describes: load, plan, attach, measure, train, measure, save, check, report.

    resume: go on from the last checkpoint in the recipe's output folder (from the start, where there is none).
    overwrite: start anew in a folder that holds an unfinished run.
    Raises WeftErrors: for what cannot be used before anything is trained, Interrupted after Ctrl-C or SIGTERM, and
    CheckpointError when the disk refuses; the last two say which checkpoint is left and how to go on.
    """
    console = console or stderr_console()
    session = prepare(recipe, lambda text: console.print(text, markup=False))
    run = _Run(session, console, resume)
    with threads(session.recipe.train.threads):
        run.claim_folder(overwrite=overwrite)
        try:
            return run.go()
        except KeyboardInterrupt:
            raise Interrupted(f"stopped by Ctrl-C; {run.keeper.kept()}") from None
        except OSError as error:
            if isinstance(error, WeftError) or error.errno not in DISK_ERRORS:
                raise
            raise OutputError(
                f"the run cannot write into {session.folder} ({error.strerror or error}); {run.keeper.kept()}"
            ) from error


class _Run:
    """One run: its parts in the order in which `go` calls them."""

    def __init__(self, session: Session, console: Console, resume: bool):
        self.session, self.console, self.resume = session, console, resume
        self.keeper = Keeper(session.folder / "checkpoints", session.recipe.train.keep_checkpoints, session.name)
        self.found: checkpoint.Checkpoint | None = None

    def say(self, text: str) -> None:
        """One line on the console."""
        self.console.print(text, markup=False)

    def go(self) -> TuneResult:
        """All parts, in order."""
        session = self.session
        self.say(short_plan(session.plan))
        self.find_checkpoint()
        sinks = self.open_logs()
        try:
            attach_adapter(session)
            self.check_space()
            before = self.before()
            done = self.train(before, sinks)
            before, after = measure_after(session, before)
            adapter = self.save(before, after)
            gate = check_parity(session)
            for sink in sinks:
                if "validation" in after.figures:
                    sink.write({"event": "validation", "step": done.step, **after.figures["validation"]})
                sink.write({"event": "end", "step": done.step, "seconds": done.seconds})
        finally:
            for sink in sinks:
                sink.close()
        return self.report(before, after, gate, done, adapter)

    def claim_folder(self, *, overwrite: bool) -> None:
        """Prove that the output can be written, and that no unfinished run is lost by starting anew."""
        folder = self.session.folder
        prove_writable(folder)
        checkpoint.clean(self.keeper.folder)
        if self.resume:
            return
        begun = checkpoint.folders(self.keeper.folder)
        if begun and not (folder / "result.json").exists() and not overwrite:
            raise OutputError(
                f"{folder} holds an unfinished run ({begun[-1].name}): go on with it with --resume, start anew with "
                "--overwrite, or choose another output"
            )
        old = [name for name in _PRODUCTS if (folder / name).exists()]
        if old:
            self.say(f"{folder} holds an earlier run, which is replaced: {', '.join(old)}")
        for name in old:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def find_checkpoint(self) -> None:
        """The newest whole checkpoint to go on from, proved to be of this run."""
        session, splits = self.session, self.session.splits
        facts: dict[str, Any] = {
            "recipe": session.recipe.model_dump(mode="json"),
            "data": data_digest(splits.train, splits.validation, splits.test, session.base_like),
            "base": fingerprint(session.model),
            "num_steps": session.num_steps,
        }
        if self.resume:
            found, path, complaints = checkpoint.newest(self.keeper.folder)
            self.found, self.keeper.last = found, path
            for complaint in complaints:
                self.say(f"{complaint}; {'the one before it is used' if found else 'there is no other'}")
            if found is not None:
                for line in check_same_run(facts, found.state, step=found.step, where=str(path)):
                    self.say(line)
                facts["before"] = found.state["before"]
                self.say(f"going on after step {found.step} of {session.num_steps}, from {path}")
            else:
                self.say(f"there is no checkpoint in {self.keeper.folder}: starting from the beginning")
        self.keeper.facts = facts

    def open_logs(self) -> list[Sink]:
        """The log, cut to what the checkpoint knows, and the recipe as it was resolved."""
        folder = self.session.folder
        (folder / "result.json").unlink(missing_ok=True)  # what marks a run as finished
        (folder / "recipe.yaml").write_text(to_yaml(self.session.recipe), encoding="utf-8")
        cut_log(folder / "log.jsonl", self.found.step if self.found else -1)
        sinks = open_log(folder, tensorboard=self.session.recipe.report.tensorboard)
        step = self.found.step if self.found else 0
        event = {"event": "resume" if self.found else "start", "step": step, "num_steps": self.session.num_steps}
        for sink in sinks:
            sink.write({**event, "machine": describe_machine(self.session.device)})
        return sinks

    def check_space(self) -> None:
        """Say what memory the run will take; raise OutputError when the disk cannot hold its checkpoints."""
        needed = _estimate(self.session)
        self.say(str(needed))
        kept = self.session.recipe.train.keep_checkpoints + 1  # the new one is written before the oldest goes
        wanted = (needed.adapter_bytes + needed.optimizer_bytes) * kept + needed.adapter_bytes
        free = shutil.disk_usage(self.session.folder).free
        if free < wanted:
            raise OutputError(
                f"{self.session.folder} has {readable_bytes(free)} free, and the run writes {readable_bytes(wanted)}: "
                f"free space, choose another output, or lower train.keep_checkpoints ({kept - 1})"
            )

    def before(self) -> Measured:
        """The base's figures: measured at the start of a run, and remembered by its checkpoints."""
        if self.found is None:
            self.say("measuring the base ...")
            measured = measure_before(self.session)
            self.keeper.facts = {**self.keeper.facts, "before": asdict(measured)}
            return measured
        return Measured(**self.found.state["before"])

    def train(self, before: Measured, sinks: list[Sink]) -> Progressed:
        """All steps that are left."""
        session = self.session
        learner = make_learner(session)
        seed_everything(session.recipe.train.seed)  # measuring must not move what training draws
        done = Progressed()
        if self.found is not None:
            done = self.keeper.restore(self.found, learner)
        elif "validation" in before.figures:
            for sink in sinks:
                sink.write({"event": "validation", "step": 0, **before.figures["validation"]})
        progress = Progress(self.console, num_steps=session.num_steps, done=done.step)
        learn(session, learner, done, self.keeper, sinks, progress)
        self.say(f"trained {done.step} steps in {readable_seconds(done.seconds)}; checkpoint: {self.keeper.last}")
        return done

    def save(self, before: Measured, after: Measured) -> Path:
        """The adapter as a folder, with where it came from."""
        recipe, facts = self.session.recipe, self.keeper.facts
        provenance = {
            "recipe": facts["recipe"],
            "data": facts["data"],
            "labels": list(self.session.splits.label_names),
            "seed": recipe.train.seed,
            "num_steps": self.session.num_steps,
            "before": before.figures,
            "after": after.figures,
        }
        return save(self.session.model, self.session.folder / "adapter", name=self.session.name, provenance=provenance)

    def report(
        self, before: Measured, after: Measured, gate: dict[str, Any] | None, done: Progressed, adapter: Path
    ) -> TuneResult:
        """result.json, report.html and the result."""
        session, folder = self.session, self.session.folder
        known = summary(session, before, after, gate, seconds=done.seconds, tokens=done.num_tokens)
        write_json(folder / "result.json", known)
        page = None
        if session.recipe.report.html:
            from weft.report import write_report

            page = write_report(folder / "report.html", known, read_log(folder / "log.jsonl"))
        return TuneResult(
            folder=folder, adapter=adapter, report=page, name=session.name, num_steps=done.step, seconds=done.seconds,
            before=before.figures, after=after.figures, passed=None if gate is None else gate["passed"], summary=known,
        )  # fmt: skip


def _estimate(session: Session) -> Estimate:
    return estimate(
        session.model,
        session.splits.train.examples,
        session.recipe.train,
        task=session.recipe.task,
        pad_token=pad_token(session.tokenizer),
        name=session.name,
    )
