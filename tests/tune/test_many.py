"""Several adapters in one batch are those of runs of their own; a kill, an end and a failure stay each one's own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import weft
from tests.common.language import llama
from tests.tune import runs
from weft.attach import use, weave_of
from weft.cli.main import main
from weft.core.pile import Piles
from weft.core.route import Rows
from weft.errors import WeftError
from weft.recipe import Recipe, to_yaml
from weft.tune import Interrupted, many, many_batch, tune, tune_many
from weft.tune.log import read_log
from weft.tune.step import Diverged

METHODS = {
    "two": {"name": "lora", "rank": 2},
    "four": {"name": "lora", "rank": 4},
    "again": {"name": "lora", "rank": 2},
    "dora": {"name": "dora", "rank": 2},
    "gains": {"name": "ia3"},
    "turns": {"name": "oft", "block_size": 4},
}


def recipe(tiny, output, method, **train) -> Recipe:
    data = str(tiny / "data" / train.pop("file", "train.jsonl"))
    plain = runs.bare(tiny / "base", tiny / "data", output, **train).model_dump()
    plain["report"]["forecast"] = False
    return Recipe.model_validate(plain | {"method": method, "data": {"train": data}})


def recipes(tiny, folder) -> list[Recipe]:
    """Six runs of other methods, data, batches, rates and lengths."""
    changes = {
        "two": {"steps": 6},
        "four": {"steps": 9, "learning_rate": 3e-3, "schedule": "linear"},
        "again": {"steps": 9, "seed": 3, "file": "validation.jsonl"},
        "dora": {"steps": 9, "batch_size": 2, "accumulate": 3, "clip_norm": 0.1},
        "gains": {"steps": 4, "optimizer": "sgd", "batch_size": 3},
        "turns": {"steps": 9, "checkpoint_every": None, "weight_decay": 0.1},
    }
    return [recipe(tiny, folder / name, METHODS[name], **changes[name]) for name in METHODS]


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The folder of six runs, one by one."""
    folder = tmp_path_factory.mktemp("alone")
    for each in recipes(tiny, folder):
        tune(each, console=runs.quiet())
    return folder


@pytest.fixture(scope="module")
def together(tiny, tmp_path_factory):
    """The same runs in one batch: their folder, the results, and how many forwards were made."""
    folder, calls = tmp_path_factory.mktemp("together"), []
    backward = many_batch.Together._backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            many_batch.Together, "_backward", lambda self, *rest: calls.append(self.names) or backward(self, *rest)
        )
        results = tune_many(recipes(tiny, folder), console=runs.quiet())
    return folder, results, calls


def assert_equal_runs(ours, theirs, atol=1e-5):
    for name in METHODS:
        found, wanted = tensors(ours / name), tensors(theirs / name)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(
                found[key], value, atol=atol, rtol=1e-4, msg=lambda m, n=name, k=key: f"{n} {k} {m}"
            )


def test_each_adapter_is_the_one_of_its_own_run(alone, together):
    folder, results, _ = together
    assert [r.name for r in results] == list(METHODS)
    assert_equal_runs(folder, alone)


def test_logs_and_checkpoints_are_those_of_its_own_run(alone, together):
    folder = together[0]
    for name in METHODS:
        one, other = (read_log(f / name / "log.jsonl") for f in (alone, folder))
        assert [(r["event"], r["step"]) for r in one] == [(r["event"], r["step"]) for r in other]
        for a, b in zip(one, other, strict=True):
            if a["event"] == "train":
                assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
                assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
                assert (b["learning_rate"], b["tokens"]) == (a["learning_rate"], a["tokens"])
        for place in ("checkpoints", "."):
            assert {p.name for p in (folder / name / place).iterdir()} == {
                p.name for p in (alone / name / place).iterdir()
            }


def test_one_forward_a_step_serves_all_that_are_left(together):
    _, _, calls = together
    assert len(calls) == 9 * 3  # nine steps, and one of the runs takes three batches a step
    assert [set(METHODS) - set(names) for names in calls[::3]] == [set()] * 4 + [{"gains"}] * 2 + [{"gains", "two"}] * 3
    assert calls[0][:3] == ["two", "again", "four"]  # alike ones stand together


def stop_at(monkeypatch, name, step, act):
    """Do something right after a run's step."""
    after_step = many.Watch.after_step

    def watched(self, result):
        going = after_step(self, result)
        if (self.session.name, self.progressed.step) == (name, step):
            act(self)
        return going

    monkeypatch.setattr(many.Watch, "after_step", watched)


def test_a_kill_between_two_runs_checkpoints_is_resumed_to_the_very_bits(tiny, tmp_path, together, monkeypatch):
    """`four` has its checkpoint of step 6 already, the others only that of step 3: all go on from there."""

    class Killed(BaseException):
        pass

    def kill(watch):
        raise Killed

    def chosen(folder):
        return [r for r in recipes(tiny, folder) if r.output.endswith(("four", "again", "dora"))]

    stop_at(monkeypatch, "four", 6, kill)
    with pytest.raises(Killed):
        tune_many(chosen(tmp_path), console=runs.quiet())
    monkeypatch.undo()
    console = runs.quiet()
    tune_many(chosen(tmp_path), resume=True, console=console)
    assert "four: going on after step 3 instead" in console.file.getvalue()
    tune_many(chosen(tmp_path / "unbroken"), console=runs.quiet())
    for name in ("four", "again", "dora"):
        assert runs.adapter_bits(tmp_path / name) == runs.adapter_bits(tmp_path / "unbroken" / name)


def test_a_signal_leaves_a_checkpoint_of_every_run(tiny, tmp_path, together, monkeypatch):
    stop_at(monkeypatch, "two", 2, lambda watch: watch.stop._note(15, None))
    with pytest.raises(
        Interrupted, match=r"SIGTERM; two: the last good checkpoint is .*two/checkpoints/step-00000002; .*; four: "
    ):
        tune_many(recipes(tiny, tmp_path), console=runs.quiet())
    monkeypatch.undo()
    for name in METHODS:  # also of those that were asked before the signal came
        assert [p.name for p in (tmp_path / name / "checkpoints").iterdir()] == ["step-00000002"]
    tune_many(recipes(tiny, tmp_path), resume=True, console=runs.quiet())
    assert_equal_runs(tmp_path, together[0])


def test_a_run_that_diverges_leaves_the_others_alone(tiny, tmp_path, together):
    changed = recipes(tiny, tmp_path)
    train = changed[1].train.model_copy(update={"learning_rate": 1e30, "clip_norm": None, "warmup": 0})
    changed[1] = changed[1].model_copy(update={"train": train})
    with pytest.raises(Diverged, match=r"^four: the loss of step \d is nan"):
        tune_many(changed, console=runs.quiet())
    for name in [n for n in METHODS if n != "four"]:
        wanted = tensors(together[0] / name)
        for key, value in tensors(tmp_path / name).items():
            torch.testing.assert_close(value, wanted[key], atol=1e-5, rtol=1e-4)


def test_everything_is_measured_and_reported_for_each(tiny, tmp_path):
    data = tiny / "data"
    both = []
    for name, method in (("one", METHODS["two"]), ("other", METHODS["turns"])):
        plain = recipe(tiny, tmp_path / name, method, steps=4, evaluate_every=2, log_every=1).model_dump()
        plain["data"] |= {"validation": str(data / "validation.jsonl"), "test": str(data / "test.jsonl")}
        plain |= {"forgetting": {"limit": 4}, "check": {"rows": 2, "ways": ["saved", "merged", "unmerged"]}}
        both.append(Recipe.model_validate(plain | {"report": {"examples": 2, "forecast": False}}))
    for result, of in zip(tune_many(both, console=runs.quiet()), both, strict=True):
        alone = tune(of.model_copy(update={"output": str(tmp_path / f"alone-{result.name}")}), console=runs.quiet())
        assert result.passed is True
        assert result.report.is_file()
        said = json.loads(json.dumps(of.method | result.summary["method"]))  # a file has lists, a method tuples
        assert json.loads((result.folder / "result.json").read_text())["method"] == said
        for place in ("before", "after"):
            for split, figures in getattr(alone, place).items():
                assert getattr(result, place)[split] == pytest.approx(figures, rel=1e-4)
        events = [(r["event"], r["step"]) for r in read_log(result.folder / "log.jsonl")]
        assert events == [(r["event"], r["step"]) for r in read_log(alone.folder / "log.jsonl")]


REFUSED = {
    "other base": ({"base": {"dtype": "bfloat16"}}, r"base is .*bfloat16.*share it"),
    "other precision": ({"train": {"precision": "bfloat16"}}, r"train\.precision is 'bfloat16', and None in"),
    "packing": ({"train": {"packing": True}}, r"every row has its own adapter; set it to null"),
    "mixout": ({"train": {"mixout": 0.1}}, r"train\.mixout is for a run of its own"),
    "same output": ({"output": "first"}, r"two recipes write into"),
    "same name": ({"output": "elsewhere/first"}, r"both make an adapter called 'first'"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_done_together_is_refused_with_the_reason(tiny, tmp_path, change):
    changes, message = REFUSED[change]
    first = recipe(tiny, tmp_path / "first", METHODS["two"])
    plain = recipe(tiny, tmp_path / "second", METHODS["two"]).model_dump()
    for key, value in changes.items():
        plain[key] = plain[key] | value if isinstance(value, dict) else str(tmp_path / value)
    with pytest.raises(WeftError, match=message):
        tune_many([first, Recipe.model_validate(plain)], console=runs.quiet())
    assert not (tmp_path / "first").exists()


def test_the_frozen_map_runs_once_for_all_that_read_it_as_it_is():
    """LoRA, DoRA and gains share one call; a rotation changes its input first, and has one of its own."""
    model = llama()
    for i, method in enumerate((weft.LoRA(rank=2), weft.LoRA(rank=3), weft.IA3(), weft.OFT(block_size=4))):
        weft.attach(model, method, ["up_proj"], name=f"a{i}")
    ids = torch.randint(3, 96, (8, 5))
    calls = []
    seat = weave_of(model).seats["model.layers.0.mlp.up_proj"]
    forward = type(seat).call
    rows = Rows(("a0", "a1", "a2", "a3"), (0, 0, 1, 1, 2, 2, 3, 3))
    use(model, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(seat), "call", lambda self, x: (calls.append(len(x)) if self is seat else None, forward(self, x))[1]
        )
        model(input_ids=ids)  # looks at the bodies
        calls.clear()
        found = model(input_ids=ids).logits
    assert calls == [6, 2]
    for i in range(4):
        use(model, f"a{i}")
        torch.testing.assert_close(found[2 * i : 2 * i + 2], model(input_ids=ids[2 * i : 2 * i + 2]).logits)


def test_an_optimiser_that_gives_a_tensor_other_memory_is_noticed():
    model = llama()
    for name in ("a", "b"):
        weft.attach(model, weft.LoRA(rank=2), ["up_proj"], name=name)
    piles = Piles([*seat.adapters.values()] for seat in weave_of(model).seats.values())
    moved = weft.parameters(model, "b")[0]
    moved.data = torch.full_like(moved, 7.0)
    piles.refresh()
    first = next(iter(piles.heaps.values()))
    assert first.tensors["A"][1].eq(7).all()
    assert not first.tensors["A"][0].eq(7).any()
    piles.part()
    assert moved.untyped_storage().nbytes() == moved.numel() * 4  # its own memory again


def test_several_recipes_on_the_command_line(tiny, tmp_path, capsys):
    files = []
    for name in ("two", "gains"):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(to_yaml(recipe(tiny, tmp_path / name, METHODS[name])))
    assert main(["tune", *map(str, files), "train.steps=2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(each["name"], each["num_steps"]) for each in printed] == [("two", 2), ("gains", 2)]
