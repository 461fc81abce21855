"""`tune`: one adapter from a recipe, in small parts called in order; `dry_run`: what it would do."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from weft.adapter import fingerprint, native_tensors
from weft.attach import records
from weft.compress import Code, packed
from weft.errors import WeftError
from weft.interop.folder import save
from weft.plan.forecast import Forecast
from weft.plan.truth import Peak
from weft.quantise.checkpoint import write_quantised
from weft.recipe import Recipe, to_yaml
from weft.tune import checkpoint
from weft.tune.distributed import check_processes, leading, num_processes, process_group, shard, wait_for_all
from weft.tune.keeper import Keeper, adapter_tensors
from weft.tune.learn import learn, make_learner
from weft.tune.log import Sink, cut_log, open_log, read_log
from weft.tune.loop import Progressed
from weft.tune.loqt import Merging
from weft.tune.machine import DISK_ERRORS, OutputError, describe_machine, prove_writable
from weft.tune.optimizers import optimizer_bytes
from weft.tune.outcome import (
    Measured,
    TuneResult,
    check_parity,
    measure_after,
    measure_before,
    summary,
    write_json,
)
from weft.tune.progress import Progress, stderr_console
from weft.tune.random_state import seed_everything
from weft.tune.repair import base_model, correct, rewrites
from weft.tune.resume import check_same_run, data_digest
from weft.tune.session import Session, attach_adapter, prepare, short_plan, threads
from weft.tune.step import Learner
from weft.tune.stop import Interrupted
from weft.tune.trained import trained_tensors
from weft.tune.truth import Watched, bytes_at_rest, foretell
from weft.units import readable_bytes, readable_seconds

__all__ = ["DryRun", "Run", "dry_run", "tune"]

_PRODUCTS = (
    "checkpoints",
    "tensorboard",
    "adapter",
    "base",
    "bases",
    "log.jsonl",
    "result.json",
    "report.html",
    "recipe.yaml",
)


@dataclass(frozen=True)
class DryRun:
    """What a run would do: the resolved recipe, what will be trained, and what it will take."""

    recipe: str
    plan: str
    num_steps: int
    num_trained: int
    forecast: str

    def __str__(self) -> str:
        return f"{self.recipe}\n{self.plan}\n\nsteps: {self.num_steps}\n{self.forecast}"


def dry_run(recipe: Recipe | str | Path, *, console: Console | None = None) -> DryRun:
    """Resolve a recipe, load what it names and say what would be trained; nothing is written.

    Raises whatever `tune` would raise before training.
    """
    console = console or stderr_console()
    session = prepare(recipe, lambda text: console.print(text, markup=False))
    with threads(session.recipe.train.threads):
        attach_adapter(session)
        console.print(session.rows, markup=False)
        _, said = foretell(session)
    return DryRun(to_yaml(session.recipe), str(session.plan), session.num_steps, session.plan.num_parameters, said)


def tune(
    recipe: Recipe | str | Path, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> TuneResult:
    """Make the adapter that a recipe describes: load, plan, attach, measure, train, measure, save, check, report.

    resume: go on from the last checkpoint in the recipe's output folder (from the start, where there is none).
    overwrite: start anew in a folder that holds an unfinished run.
    Raises WeftErrors: for what cannot be used before anything is trained, Interrupted after Ctrl-C or SIGTERM, and
    CheckpointError when the disk refuses; the last two say which checkpoint is left and how to go on.
    Under torchrun or `accelerate launch` the processes share the work of every step; the first one writes and speaks.
    """
    with process_group():
        spoken = (console or stderr_console()) if leading() else Console(quiet=True)
        return _tune(recipe, resume, overwrite, spoken)


def _tune(recipe: Recipe | str | Path, resume: bool, overwrite: bool, console: Console) -> TuneResult:
    before = bytes_at_rest()
    session = prepare(recipe, lambda text: console.print(text, markup=False))
    check_processes(session.recipe)
    run = Run(session, console, resume, baseline_bytes=before)
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


class Run:
    """One run: its parts in the order in which `go` calls them."""

    def __init__(self, session: Session, console: Console, resume: bool, *, baseline_bytes: int = 0):
        self.session, self.console, self.resume, self.baseline = session, console, resume, baseline_bytes
        self.keeper = Keeper(session.folder / "checkpoints", session.recipe.train.keep_checkpoints, session.name)
        self.found: checkpoint.Checkpoint | None = None
        self.compiled: dict[str, int] | None = None
        self.codes: Mapping[str, Code] = {}
        self.sinks: list[Sink] = []

    def say(self, text: str) -> None:
        """One line on the console."""
        self.console.print(text, markup=False)

    def go(self) -> TuneResult:
        """All parts, in order."""
        try:
            self.look()
            self.begin()
            done = self.train()
            return self.end(done)
        finally:
            self.close()

    def look(self) -> None:
        """What will be trained, and from where."""
        self.say(short_plan(self.session.plan))
        self.find_checkpoint()

    def begin(self, *, forecast: bool = True) -> None:
        """All that comes before training. forecast: of a run of its own in one process."""
        self.open_logs()
        attach_adapter(self.session)
        self.repair()
        self.forecast: Forecast | None = None
        if forecast and num_processes() == 1:
            self.foretell()
        if self.forecast is None:  # which says it too
            self.say(self.session.rows)
        self.check_space()
        if self.session.recipe.train.sharding == "fsdp":
            shard(self.session.model)
        if num_processes() > 1:
            self.say(f"{num_processes()} processes share every step")
        self.before()

    def end(self, done: Progressed) -> TuneResult:
        """All that comes after training."""
        before, after = measure_after(self.session, self.measured)
        adapter = self.save(before, after) if leading() else self.session.folder / "adapter"
        gate = None
        if self.session.recipe.train.sharding == "fsdp":
            self.say(f"no parity gate on a spread base: run `weft check {adapter}`")
        elif leading():
            gate = check_parity(self.session)
        for sink in self.sinks:
            if "validation" in after.figures:
                sink.write({"event": "validation", "step": done.step, **after.figures["validation"]})
            sink.write({"event": "end", "step": done.step, "seconds": done.seconds})
        self.close()
        result = self.report(before, after, gate, done, adapter)
        wait_for_all()
        return result

    def close(self) -> None:
        """Make sure that the log is on the disk."""
        for sink in self.sinks:
            sink.close()
        self.sinks = []

    def claim_folder(self, *, overwrite: bool) -> None:
        """Prove that the output can be written, and that no unfinished run is lost by starting anew."""
        if leading():
            self._claim_folder(overwrite)
        wait_for_all()

    def _claim_folder(self, overwrite: bool) -> None:
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

    def open_logs(self) -> None:
        """The log, cut to what the checkpoint knows, and the recipe as it was resolved."""
        if not leading():
            return
        folder = self.session.folder
        (folder / "result.json").unlink(missing_ok=True)  # what marks a run as finished
        (folder / "recipe.yaml").write_text(to_yaml(self.session.recipe), encoding="utf-8")
        cut_log(folder / "log.jsonl", self.found.step if self.found else -1)
        self.sinks = open_log(folder, tensorboard=self.session.recipe.report.tensorboard)
        step = self.found.step if self.found else 0
        event = {"event": "resume" if self.found else "start", "step": step, "num_steps": self.session.num_steps}
        for sink in self.sinks:
            sink.write({**event, "machine": describe_machine(self.session.device)})

    def repair(self) -> None:
        """Train the adapter towards the base before quantising, where that is asked for; then free that base."""
        session = self.session
        steps = session.recipe.train.correct_steps
        if steps and self.found is None:  # a checkpoint has it behind it
            losses = correct(
                session.model, session.name, session.originals, list(session.calibration()), steps=steps,
                learning_rate=session.recipe.train.learning_rate,
            )  # fmt: skip
            found = f"{losses[0]:.4f} -> {losses[-1]:.4f}"
            self.say(f"corrected the quantised base in {steps} steps: KL to the full one {found}")
        session.originals.drop()

    def foretell(self) -> None:
        """Say what the run will take."""
        if self.session.recipe.report.forecast:
            self.forecast, said = foretell(self.session)
            self.say(said)

    def check_space(self) -> None:
        """Raise OutputError when the disk cannot hold the checkpoints of the run."""
        session = self.session
        kept = session.recipe.train.keep_checkpoints + 1  # the new one is written before the oldest goes
        adapter = sum(t.numel() * t.element_size() for t in adapter_tensors(session.model, session.name).values())
        state = optimizer_bytes(trained_tensors(session.model, session.name), session.recipe.train)
        wanted = (adapter + state) * kept + adapter
        free = shutil.disk_usage(self.session.folder).free
        if free < wanted:
            raise OutputError(
                f"{self.session.folder} has {readable_bytes(free)} free, and the run writes {readable_bytes(wanted)}: "
                f"free space, choose another output, or lower train.keep_checkpoints ({kept - 1})"
            )

    def before(self) -> None:
        """The base's figures: measured at the start of a run, and remembered by its checkpoints."""
        if self.found is None:
            self.say("measuring the base ...")
            self.measured = measure_before(self.session)
            self.keeper.facts = {**self.keeper.facts, "before": asdict(self.measured)}
        else:
            self.measured = Measured(**self.found.state["before"])

    def train(self) -> Progressed:
        """All steps that are left."""
        learner, done = self.ready()
        progress = Progress(self.console, num_steps=self.session.num_steps, done=done.step)
        watched = Watched(self.forecast, Peak(self.session.device, self.baseline))
        at = done.step, done.num_tokens, done.seconds
        learn(self.session, learner, done, self.keeper, self.sinks, progress)
        self.codes = {} if learner.codes is None else learner.codes()
        if learner.compiled is not None:
            self.compiled = learner.compiled.as_dict()
            self.say(str(learner.compiled))
        self.say(f"trained {done.step} steps in {readable_seconds(done.seconds)}; checkpoint: {self.keeper.last}")
        steps, tokens, seconds = done.step - at[0], done.num_tokens - at[1], done.seconds - at[2]
        told = watched.remember(num_steps=steps, num_tokens=tokens, seconds=seconds)
        if told is not None:
            self.say(told)
        return done

    def ready(self) -> tuple[Learner, Progressed]:
        """What learns, at the step where training goes on."""
        session = self.session
        learner = make_learner(session)
        for line in learner.notes:
            self.say(line)
        seed_everything(session.recipe.train.seed)  # measuring must not move what training draws
        done = Progressed()
        if self.found is not None:
            done = self.keeper.restore(self.found, learner)
        elif "validation" in self.measured.figures:
            for sink in self.sinks:
                sink.write({"event": "validation", "step": 0, **self.measured.figures["validation"]})
        if session.recipe.train.merge_every is not None:
            merging = Merging(session, learner)
            merging.begin(done.step)
            learner.after = [*learner.after, merging.after_step]
        return learner, done

    def save(self, before: Measured, after: Measured) -> Path:
        """The adapter as a folder, with where it came from."""
        recipe, facts = self.session.recipe, self.keeper.facts
        if recipe.train.merge_every is not None or any(rewrites(s.method) for s in self.session.plan.sites):
            self.save_base()
        provenance = {
            "repaired": recipe.train.correct_steps > 0 or recipe.train.merge_every is not None,
            "recipe": facts["recipe"],
            "data": facts["data"],
            "labels": list(self.session.splits.label_names),
            "seed": recipe.train.seed,
            "num_steps": self.session.num_steps,
            "before": before.figures,
            "after": after.figures,
        }
        model, name, folder = self.session.model, self.session.name, self.session.folder / "adapter"
        held = packed(native_tensors(records(model)[name]), self.codes) if self.codes else None
        return save(model, folder, name=name, provenance=provenance, held=held)

    def save_base(self) -> None:
        """The quantised base with the codes that the start wrote: no other is this adapter's base."""
        folder = self.session.folder / "base"
        write_quantised(base_model(self.session.model), folder, self.session.tokenizer)
        self.session.model.config._name_or_path = str(folder)  # type: ignore[union-attr]
        self.say(f"the base has codes of this run's own: it is in {folder}, and the adapter belongs to it")

    def report(
        self, before: Measured, after: Measured, gate: dict[str, Any] | None, done: Progressed, adapter: Path
    ) -> TuneResult:
        """result.json, report.html and the result."""
        session, folder = self.session, self.session.folder
        known = summary(session, before, after, gate, seconds=done.seconds, tokens=done.num_tokens)
        known["compiled"] = self.compiled
        page = None
        if leading():
            write_json(folder / "result.json", known)
        if leading() and session.recipe.report.html:
            from weft.report import write_report

            page = write_report(folder / "report.html", known, read_log(folder / "log.jsonl"))
        return TuneResult(
            folder=folder, adapter=adapter, report=page, name=session.name, num_steps=done.step, seconds=done.seconds,
            before=before.figures, after=after.figures, passed=None if gate is None else gate["passed"], summary=known,
        )  # fmt: skip
