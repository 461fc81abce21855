"""Whole runs: what is measured, written and said; the same twice; classification; what goes wrong is found early."""

from __future__ import annotations

import errno
import json
import math
import resource
import signal
import sys

import pytest
import torch

import weft
from tests.tune import runs
from weft import objectives
from weft.data import load_data
from weft.errors import MissingExtra, WeftError
from weft.recipe import Recipe
from weft.tune import CheckpointError, OutputError, checkpoint, dry_run, evaluate, run, tune
from weft.tune.evaluate import context_length
from weft.tune.keeper import Keeper
from weft.tune.log import read_log
from weft.tune.outcome import measure_before
from weft.tune.session import prepare


def full(tiny, output, **changes) -> Recipe:
    """A recipe with everything on."""
    data = tiny / "data"
    plain = runs.bare(
        tiny / "base", data, output, steps=8, evaluate_every=4, log_every=2, learning_rate=0.05
    ).model_dump()
    plain["data"] |= {"validation": str(data / "validation.jsonl"), "test": str(data / "test.jsonl")}
    plain |= {"forgetting": {"limit": 4}, "check": {"rows": 2, "ways": ["saved", "merged", "unmerged"]}}
    plain["report"] = {"examples": 3, "html": True}
    return Recipe.model_validate(plain | changes)


@pytest.fixture(scope="module")
def result(tiny, tmp_path_factory):
    console = runs.quiet()
    found = tune(full(tiny, tmp_path_factory.mktemp("full") / "digits-and-words"), console=console)
    return found, console.file.getvalue()


def test_everything_is_measured_before_and_after(result):
    found, said = result
    assert set(found.before) == set(found.after) == {"validation", "test", "forgetting"}
    assert found.after["validation"]["loss"] < found.before["validation"]["loss"]
    for data in found.after.values():
        assert set(data) == {"loss", "accuracy", "count", "bits_per_byte"}
        assert all(math.isfinite(value) for value in data.values())
    assert found.passed is True
    before, after = found.before["validation"]["loss"], found.after["validation"]["loss"]
    line = next(line for line in str(found).splitlines() if line.startswith("learnt, validation loss"))
    assert line.split()[3:5] == [f"{before:.4f}", f"{after:.4f}"]
    assert "forgotten, base-like text bits per byte" in str(found)
    assert "train: 30 of 30 rows good" in said
    assert "peak memory" in said
    assert "forecast and truth: peak memory" in said


def test_everything_is_written(result):
    found, _ = result
    assert {p.name for p in found.folder.iterdir()} == {
        "adapter", "checkpoints", "log.jsonl", "recipe.yaml", "report.html", "result.json"
    }  # fmt: skip
    assert found.name == "digits-and-words"
    known = json.loads((found.folder / "result.json").read_text())
    assert known == json.loads(json.dumps(found.summary))
    assert len(known["examples"]) == 3
    assert set(known["examples"][0]) == {"prompt", "expected", "before", "after"}
    assert known["examples"][0]["prompt"].startswith("200: ")
    assert known["num_trained"] + known["num_frozen"] > known["num_trained"] > 0
    provenance = json.loads((found.adapter / "weft.json").read_text())["provenance"]
    assert provenance["after"] == found.after
    assert provenance["recipe"]["method"]["rank"] == 2


def test_the_log_has_what_curves_need(result):
    found, _ = result
    records = read_log(found.folder / "log.jsonl")
    assert [r["event"] for r in records] == [
        "start", "validation", "train", "train", "validation", "train", "train", "validation", "end"
    ]  # fmt: skip
    train = [r for r in records if r["event"] == "train"]
    assert [r["step"] for r in train] == [2, 4, 6, 8]
    for key in ("loss", "learning_rate", "tokens", "tokens_per_second", "gradient_norm", "memory_bytes", "seconds"):
        assert all(math.isfinite(r[key]) for r in train)
        assert key in ("loss", "learning_rate", "gradient_norm") or all(r[key] > 0 for r in train)
    assert [r["tokens"] for r in train] == sorted(r["tokens"] for r in train)


def test_the_same_recipe_gives_the_same_bits(tiny, tmp_path, result, monkeypatch):
    """And whatever is drawn before training does not move what training draws."""

    def drawing(session):
        torch.rand(7)
        return measure_before(session)

    monkeypatch.setattr(run, "measure_before", drawing)
    recipe = full(tiny, tmp_path / "again", check=None, forgetting=None, report={"examples": 0, "html": False})
    tune(recipe, console=runs.quiet())
    assert runs.adapter_bits(tmp_path / "again") == runs.adapter_bits(result[0].folder)
    other = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"seed": 1}), "output": str(tmp_path / "o")}
    )
    tune(other, console=runs.quiet())
    assert runs.adapter_bits(tmp_path / "o") != runs.adapter_bits(result[0].folder)


def test_evaluate_measures_what_tune_measured_before(tiny, result):
    recipe = full(tiny, "unused")
    session = prepare(recipe, lambda text: None)
    found = evaluate(session.model, session.tokenizer, recipe)
    for data, figures in result[0].before.items():
        assert found[data] == pytest.approx(figures, rel=1e-6)
    splits = load_data(recipe.data, session.tokenizer, context=context_length(session.model))
    assert evaluate(session.model, session.tokenizer, splits.test) == pytest.approx(found["test"], rel=1e-6)


def test_bits_per_byte_and_loss_by_hand(tiny):
    session = prepare(full(tiny, "unused"), lambda text: None)
    examples = session.base_like.examples
    nats = bytes_ = count = 0
    for example in examples:
        ids = torch.tensor([list(example.input_ids)])
        logits = session.model(ids).logits[0, :-1].double().log_softmax(-1)
        nats -= logits[range(ids.shape[1] - 1), ids[0, 1:]].sum().item()
        count += ids.shape[1] - 1
        bytes_ += len(session.tokenizer.decode(ids[0, 1:], skip_special_tokens=True).encode())
    found = evaluate(session.model, session.tokenizer, examples)
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_, rel=1e-5)


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(tiny, tmp_path):
    told = dry_run(full(tiny, tmp_path / "never"), console=runs.quiet())
    text = str(told)
    assert not (tmp_path / "never").exists()
    assert "rank: 2" in text
    assert "model.layers.0.self_attn.q_proj" in text
    assert "steps: 8" in text
    assert "peak memory" in text
    assert (
        told.num_trained
        == 14 * 0
        + sum(2 * (o + i) for o, i in [(16, 16), (8, 16), (8, 16), (16, 16), (32, 16), (32, 16), (16, 32)]) * 2
    )


@pytest.mark.parametrize("base", ["base", "encoder"])
def test_classification_trains_a_head_and_reports_a_linear_probe(tiny, tmp_path, base):
    data = tiny / "data"
    labelled = {split: str(data / f"{split}-label.jsonl") for split in ("train", "validation", "test")}
    recipe = full(
        tiny, tmp_path / "run", task="classification", base={"model": str(tiny / base)},
        data={**labelled, "template": None}, check=None, method={"name": "lora", "rank": 4},
        train={"steps": 40, "batch_size": 8, "learning_rate": 0.03, "threads": 1},
    )  # fmt: skip
    found = tune(recipe, console=runs.quiet())
    assert set(found.after) == {"validation", "test"}  # a classifier forgets no text
    assert found.before["validation"]["loss"] == pytest.approx(math.log(2), rel=1e-6)  # the head starts at zero
    assert found.after["validation"]["loss"] < found.before["validation"]["loss"]
    assert 0 <= found.summary["rival"]["test"] <= 1
    assert "linear probe, validation accuracy" in str(found)
    assert {e["expected"] for e in found.summary["examples"]} <= {"cat", "none"}
    saved = runs.adapter_bits(found.folder)
    assert any("head" in key for key in saved)
    assert "not measured: a classifier writes no text" in found.report.read_text()


def test_a_classifier_is_loaded_again_with_its_head(tiny, tmp_path):
    data = tiny / "data"
    labelled = {split: str(data / f"{split}-label.jsonl") for split in ("train", "validation")}
    train = {"steps": 5, "batch_size": 8, "learning_rate": 0.03, "threads": 1}
    recipe = full(
        tiny, tmp_path / "run", task="classification", base={"model": str(tiny / "encoder")}, data=labelled, train=train
    )
    found = tune(recipe, console=runs.quiet())
    assert found.passed is True
    labels = json.loads((found.adapter / "weft.json").read_text())["provenance"]["labels"]
    assert labels == ["cat", "none"]
    model, tokenizer = weft.load_base(str(tiny / "encoder"), num_labels=len(labels))
    weft.load(model, found.adapter, "again")
    figures = evaluate(model, tokenizer, recipe)["validation"]
    assert figures == pytest.approx(found.after["validation"], rel=1e-6)


def test_the_probe_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    from weft.tune.classify import _fit

    torch.manual_seed(0)
    x = torch.randn(60, 5, dtype=torch.double)
    y = (x[:, 0] + 0.5 * torch.randn(60) > 0).long() + 2 * (x[:, 1] > 1).long()
    ours = _fit(x, y, int(y.max()) + 1, 0.01)
    theirs = LogisticRegression(C=1 / (0.01 * 60), tol=1e-10, max_iter=1000).fit(x, y)
    centred = ours[:-1] - ours[:-1].mean(1, keepdim=True)
    assert torch.from_numpy(theirs.coef_.T).sub(centred).abs().max() < 1e-3


def test_a_folder_that_cannot_be_written_is_found_before_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "attach_adapter", lambda session: pytest.fail("training began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written .*choose another with output=FOLDER"):
        tune(full(tiny, tmp_path / "file" / "run"), console=runs.quiet())


def test_a_disk_without_room_is_found_before_training(tiny, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(Keeper, "save", lambda *_: pytest.fail("training began"))
    with pytest.raises(OutputError, match=r"has 10 B free, and the run writes"):
        tune(full(tiny, tmp_path / "run"), console=runs.quiet())


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_says_where(tiny, tmp_path, monkeypatch):
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "run", keep_checkpoints=1)
    write = checkpoint._write_file

    def full_after_the_second(path, data):
        if "00000009" in str(path) and path.name == "random.safetensors":
            path.write_bytes(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "_write_file", full_after_the_second)
    with pytest.raises(
        CheckpointError, match=r"step 9 .*No space left.*last good checkpoint is .*step-00000006; go on"
    ):
        tune(recipe, console=runs.quiet())
    monkeypatch.undo()
    tune(recipe, resume=True, console=runs.quiet())
    unbroken = runs.bare(tiny / "base", tiny / "data", tmp_path / "unbroken", keep_checkpoints=1)
    tune(unbroken, console=runs.quiet())
    assert runs.adapter_bits(tmp_path / "run") == runs.adapter_bits(tmp_path / "unbroken")


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes there")
def test_a_real_refusal_of_the_operating_system(tiny, tmp_path):
    """Files may not grow beyond 4000 bytes: the log still fits, the first checkpoint does not."""
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "run", steps=6)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"step 3 could not be written .*File too large.*there is no checkpoint yet"
        ):
            tune(recipe, console=runs.quiet())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_loss_that_explodes_says_where_the_last_checkpoint_is(tiny, tmp_path, monkeypatch):
    loss_of = objectives.get("causal-lm").loss
    count = 0

    def explode(model, batch):
        nonlocal count
        count += model.training
        loss, number, metrics = loss_of(model, batch)
        return loss * (float("nan") if count > 6 else 1), number, metrics

    monkeypatch.setattr(objectives.get("causal-lm"), "loss", staticmethod(explode))
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "run", loss_chunk=0)
    with pytest.raises(WeftError, match=r"loss of step 7 is nan.*step-00000006; go on"):
        tune(recipe, console=runs.quiet())


def test_tensorboard_on_request(tiny, tmp_path, monkeypatch):
    recipe = full(tiny, tmp_path / "run", report={"tensorboard": True, "html": False, "examples": 0}, check=None)
    tune(recipe, console=runs.quiet())
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"pip install 'weft\[tensorboard\]'"):
        tune(recipe, console=runs.quiet())
