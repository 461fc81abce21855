"""Several processes train what one does: the same losses and adapter, one log, checkpoints for any number of them."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from rich.console import Console
from safetensors.torch import load_file

from tests.tune import runs
from weft.errors import WeftError
from weft.recipe import Recipe, to_yaml
from weft.tune import Interrupted, learn, tune
from weft.tune.log import read_log

pytestmark = pytest.mark.distributed


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def recipe(tiny, output, **train) -> Recipe:
    """Without dropout, whose draws differ; with validation, and steps whose last batch is smaller than the others."""
    plain = runs.bare(
        tiny / "base", tiny / "data", output, **{"steps": 9, "log_every": 1, "evaluate_every": 4, **train}
    ).model_dump(exclude={"check"})
    plain["method"] = {"name": "dora", "rank": 2}
    plain["report"]["forecast"] = False
    plain["data"]["validation"] = str(tiny / "data" / "validation.jsonl")
    return Recipe.model_validate(plain)


def work(rank: int, size: int, port: int, jobs: list[tuple[dict[str, Any], dict[str, Any]]], folder: str) -> None:
    """Runs in one process of several. An error is written down, and raised no further."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(size)
    )
    for number, (plain, options) in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(port + number)
        stop_after = options.pop("stop_after", None)
        if stop_after is not None and rank == size - 1:
            interrupt(stop_after)
        said = Path(folder) / f"{number}-{rank}.txt"
        console = io.StringIO()
        try:
            given = Recipe.model_validate(plain)
            tune(given, console=Console(file=console, width=200), **options)
        except WeftError as error:
            console.write(f"{type(error).__name__}: {error}")
        said.write_text(console.getvalue())


def interrupt(step: int) -> None:
    """Ask this process alone to stop."""
    after_step = learn.Watch.after_step

    def watched(self, result):
        if self.progressed.step == step:
            self.stop._note(signal.SIGTERM, None)
        return after_step(self, result)

    learn.Watch.after_step = watched


@pytest.fixture(scope="module", autouse=True)
def imported_once():
    """The server that forks fresh processes has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tune.runs", "weft.tune.run", "transformers.models.llama.modeling_llama"])


def launch(jobs, folder: Path, size: int = 2) -> list[list[str]]:
    """What every process said of every job."""
    folder.mkdir(exist_ok=True)
    given = [(r.model_dump(mode="json", exclude_unset=True), options) for r, options in jobs]
    mp.start_processes(work, (size, free_port(), given, str(folder)), nprocs=size, start_method="forkserver")
    return [[(folder / f"{n}-{rank}.txt").read_text() for rank in range(size)] for n in range(len(jobs))]


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    tune(recipe(tiny, folder), console=runs.quiet())
    return folder


@pytest.fixture(scope="module")
def launched(tiny, tmp_path_factory):
    """Everything that two processes are to do, in one launch."""
    folder = tmp_path_factory.mktemp("launched")
    jobs = {
        "plain": (recipe(tiny, folder / "plain"), {}),
        "three": (recipe(tiny, folder / "three", accumulate=3, batch_size=3, clip_norm=0.05), {}),
        "fsdp": (recipe(tiny, folder / "fsdp", sharding="fsdp"), {}),
        "half": (recipe(tiny, folder / "half"), {"stop_after": 4}),
    }
    said = launch([*jobs.values()], folder / "said")
    return folder, dict(zip(jobs, said, strict=True))


def assert_same(one: Path, other: Path) -> None:
    """The same losses to 1e-6, and the same adapter to what an optimiser makes of such differences."""
    for a, b in zip(read_log(one / "log.jsonl"), read_log(other / "log.jsonl"), strict=True):
        assert (a["event"], a["step"]) == (b["event"], b["step"])
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
        if "tokens" in a:
            assert b["tokens"] == a["tokens"]
    found, wanted = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (other, one))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
def test_two_processes_train_what_one_does(alone, launched, kind):
    folder, said = launched
    assert_same(alone, folder / kind)
    assert "2 processes share every step" in said[kind][0]
    assert said[kind][1] == ""  # only the first speaks


def test_parts_that_do_not_go_round_evenly(tiny, tmp_path, launched):
    tune(recipe(tiny, tmp_path / "run", accumulate=3, batch_size=3, clip_norm=0.05), console=runs.quiet())
    assert_same(tmp_path / "run", launched[0] / "three")


def test_a_signal_to_one_stops_all_with_one_checkpoint(launched):
    folder, said = launched
    assert "stopped by a signal to another process after step 4" in said["half"][0]
    assert "stopped by SIGTERM after step 4" in said["half"][1]
    assert [p.name for p in (folder / "half" / "checkpoints").iterdir()][-1:] != []
    assert "step-00000004" in {p.name for p in (folder / "half" / "checkpoints").iterdir()}


def test_two_processes_go_on_in_one(tiny, alone, launched):
    folder = launched[0] / "half"
    tune(recipe(tiny, folder), resume=True, console=runs.quiet())
    records = [r for r in read_log(folder / "log.jsonl") if r["event"] in ("train", "validation")]
    wanted = [r for r in read_log(alone / "log.jsonl") if r["event"] in ("train", "validation")]
    for a, b in zip(wanted, records, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)


def test_one_process_goes_on_in_two(tiny, tmp_path, alone, monkeypatch):
    after_step = learn.Watch.after_step
    monkeypatch.setattr(
        learn.Watch, "after_step", lambda self, r: after_step(self, r) and not (self.progressed.step == 6 and die())
    )

    def die():
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        tune(recipe(tiny, tmp_path / "run"), console=runs.quiet())
    monkeypatch.undo()
    said = launch([(recipe(tiny, tmp_path / "run", sharding="fsdp"), {"resume": True})], tmp_path / "said")
    assert "going on after step 6 of 9" in said[0][0]
    found, wanted = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (tmp_path / "run", alone))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=2e-5, rtol=1e-4)


def test_what_several_processes_cannot_do_is_refused(tiny, tmp_path):
    with pytest.raises(WeftError, match=r"train\.sharding: fsdp .* this is one: start it with `torchrun"):
        tune(recipe(tiny, tmp_path / "run", sharding="fsdp"), console=runs.quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_the_command_line_under_a_launcher(tiny, tmp_path, alone, launcher):
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, tmp_path / "run")))
    how = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    if "accelerate" in launcher:
        pytest.importorskip("accelerate")
        how = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", str(free_port())]
        how += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", launcher, *how, "-m", "weft", "tune", str(file), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"num_steps"') == 1
    assert_same(alone, tmp_path / "run")
