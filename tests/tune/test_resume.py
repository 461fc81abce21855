"""A run that is killed at any moment and resumed ends with the very bits of a run that was not."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.tune import runs
from weft.tune import CheckpointError, Interrupted, OutputError, checkpoint, tune
from weft.tune.log import read_log

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def processes():
    """A server that has imported everything once and forks a fresh process for each run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tune.runs", "weft.tune.run", "transformers.models.llama.modeling_llama"])
    return context


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """The bits of a run without interruption, with every random draw that there is: dropout and shuffling."""
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path_factory.mktemp("unbroken") / "run")
    tune(recipe, console=runs.quiet())
    return runs.adapter_bits(Path(recipe.output))


def steps_of(folder: Path) -> list[int]:
    return [record["step"] for record in read_log(folder / "log.jsonl") if record["event"] == "train"]


@pytest.mark.parametrize("at", [1, 3, 5, 6, 9, 14])
def test_killed_while_a_checkpoint_is_written(tiny, tmp_path, processes, unbroken, at):
    """Moments 1-4 are the files of the first checkpoint, 5 and 6 the folders before and after its rename, and so on."""
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "run")
    process = processes.Process(target=runs.run_and_die, args=(recipe, False, at))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    found, _, complaints = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert complaints == []  # half-written ones are never seen as checkpoints
    assert (found.step if found else 0) == 3 * (at // 6)
    tune(recipe, resume=True, console=runs.quiet())
    assert runs.adapter_bits(tmp_path / "run") == unbroken
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing*"))


def test_killed_at_random_moments_again_and_again(tiny, tmp_path, processes, unbroken):
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "run", log_every=1)
    draw, ends = random.Random(7), []
    for target in (2, 5, 8, 10):
        process = processes.Process(target=runs.run_quietly, args=(recipe, True))
        process.start()
        deadline = time.monotonic() + 60
        while (
            process.is_alive() and max(steps_of(tmp_path / "run"), default=0) < target and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        process.kill()
        process.join(60)
        ends.append(process.exitcode)
    assert set(ends) <= {0, -signal.SIGKILL}
    assert ends.count(-signal.SIGKILL) >= 2  # a fast machine may finish a run before the blow
    tune(recipe, resume=True, console=runs.quiet())
    assert runs.adapter_bits(tmp_path / "run") == unbroken
    assert steps_of(tmp_path / "run") == list(range(1, 13))  # the log has every step once


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_first(tiny, tmp_path, unbroken, number):
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "run", checkpoint_every=None)
    with pytest.raises(
        Interrupted, match=rf"{number.name} after step 5; the last good checkpoint is .*step-00000005.*--resume"
    ):
        _tune_with_signal(recipe, number, step=5)
    tune(recipe, resume=True, console=runs.quiet())
    assert runs.adapter_bits(tmp_path / "run") == unbroken


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(tiny, tmp_path, unbroken):
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "run")
    with contextlib.suppress(Interrupted):
        _tune_with_signal(recipe, signal.SIGINT, step=8)
    file = tmp_path / "run" / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    console = runs.quiet()
    tune(recipe, resume=True, console=console)
    said = console.file.getvalue()
    assert "step-00000008 is damaged (optimizer.safetensors does not match its digest" in said
    assert "going on after step 6 of 12" in said
    assert runs.adapter_bits(tmp_path / "run") == unbroken


def test_a_changed_recipe_is_named_and_harmless_changes_are_not(tiny, tmp_path):
    folder = tmp_path / "run"
    with contextlib.suppress(Interrupted):
        _tune_with_signal(runs.bare(tiny / "base", tiny / "data", folder), signal.SIGINT, step=4)
    other = runs.bare(tiny / "base", tiny / "data", folder, learning_rate=5e-3, batch_size=2)
    with pytest.raises(
        CheckpointError, match=r"train.batch_size was 4 and is 2; train.learning_rate was 0.01 and is 0.005"
    ):
        tune(other, resume=True, console=runs.quiet())
    with pytest.raises(CheckpointError, match=r"is at step 4, and the recipe now has 3 steps"):
        tune(runs.bare(tiny / "base", tiny / "data", folder, steps=3), resume=True, console=runs.quiet())
    rows = (tiny / "data" / "train.jsonl").read_text().splitlines()[1:]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    with pytest.raises(CheckpointError, match=r"written with other data"):
        tune(runs.bare(tiny / "base", tmp_path / "data", folder), resume=True, console=runs.quiet())
    shutil.copytree(tiny / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    shutil.move(tiny / "base", tiny / "aside")
    shutil.move(tmp_path / "base", tiny / "base")
    try:
        with pytest.raises(CheckpointError, match=r"other weights of the base"):
            tune(runs.bare(tiny / "base", tiny / "data", folder), resume=True, console=runs.quiet())
    finally:
        shutil.rmtree(tiny / "base")
        shutil.move(tiny / "aside", tiny / "base")
    console = runs.quiet()
    longer = runs.bare(tiny / "base", tiny / "data", folder, steps=14, log_every=2, keep_checkpoints=1)
    result = tune(longer, resume=True, console=console)
    assert result.num_steps == 14
    assert "the run had 12 steps and now has 14" in console.file.getvalue()
    assert [p.name for p in checkpoint.folders(folder / "checkpoints")] == ["step-00000014"]


def test_starting_anew_over_an_unfinished_run_needs_to_be_said(tiny, tmp_path):
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "run", steps=6)
    with contextlib.suppress(Interrupted):
        _tune_with_signal(recipe, signal.SIGINT, step=4)
    with pytest.raises(OutputError, match=r"unfinished run .step-00000004.: go on with it with --resume"):
        tune(recipe, console=runs.quiet())
    tune(recipe, overwrite=True, console=runs.quiet())
    console = runs.quiet()
    tune(recipe, console=console)  # a finished one is replaced, and that is said
    assert "holds an earlier run, which is replaced" in console.file.getvalue()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["num_steps"] == 6


def _tune_with_signal(recipe, number: signal.Signals, *, step: int) -> None:
    """Run here, with a real signal to this process while a step is being computed."""
    from weft.tune import loop

    original = loop.train_step

    def train_step(*args, **kwargs):
        if kwargs["step"] == step:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    loop.train_step = train_step
    try:
        tune(recipe, console=runs.quiet())
    finally:
        loop.train_step = original
