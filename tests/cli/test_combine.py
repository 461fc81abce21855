"""weft combine: adapters into one, checkpoints into one, and what a mergekit file says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import weft as library
from tests.checkpoints.test_merge import models
from weft.checkpoints import Weights

__all__ = ["models"]  # the fixture


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model, _ = library.load_base("pico")
    for seed, (name, method) in enumerate({"one": library.LoRA(rank=2), "two": library.VeRA(rank=4)}.items()):
        library.attach(model, method, "q_proj", name=name, layers="0,1")
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in library.parameters(model, name):
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
        library.save(model, folder / name, name)
    return folder


def test_adapters_become_one_that_loads(weft, adapters, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) + "\n" for i in range(4)))
    done = weft(
        "combine", "task_arithmetic", str(adapters / "one"), str(adapters / "two"), "--weights", "0.5,1",
        "--base", "pico", "--eval", str(rows), "--plot", str(tmp_path / "p.svg"), "-o", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["parents"] == {"one": 0.5, "two": 1.0}
    assert max(found["losses"].values()) < 1e-5
    assert set(found["figures"]) == {"base", "one", "two", "combined"}
    assert len(found["conflict"]) == 2
    model, _ = library.load_base("pico")
    library.load(model, tmp_path / "out", "both")
    info = json.loads((tmp_path / "out" / "weft.json").read_text())
    assert [p["name"] for p in info["provenance"]["combined"]["parents"]] == ["one", "two"]
    assert "combined by the rule `task_arithmetic`" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "p.svg").exists()


def test_checkpoints_and_files(weft, models, tmp_path):
    done = weft("combine", "linear", models["one"], models["two"], "-o", str(tmp_path / "out"))
    assert done.code == 0, done.err
    assert "merged:" in done.out
    file = tmp_path / "merge.yaml"
    file.write_text(f"merge_method: linear\nmodels:\n- {{model: {models['one']}, parameters: {{weight: 1}}}}\n")
    assert weft("combine", str(file), "-o", str(tmp_path / "again")).code == 0
    assert "ties" in weft("combine", "list").out


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    for name, sign in (("eval", "+"), ("test", "-")):
        lines = [json.dumps({"text": f"def f{i}(x):\n    return x {sign} {i}\n"}) + "\n" for i in range(3)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {name: str(folder / f"{name}.jsonl") for name in ("eval", "test")}


def test_adapters_weights_are_searched_and_the_search_goes_on(weft, adapters, rows, tmp_path):
    folders, out = (str(adapters / "one"), str(adapters / "two")), tmp_path / "out"
    arguments = ["combine", "task_arithmetic", *folders, "--base", "pico", "--eval", rows["eval"], "--json", "-o", out]
    first = weft(*arguments, "--search", "--trials", "2", "--test", rows["test"], "--weights", "0.5,1")
    assert first.code == 0, first.err
    found = json.loads(first.out)
    chosen = found["chosen"]
    assert [t["w one"] for t in chosen["tried"]] == [0.5, 0.5]
    assert [t["w two"] for t in chosen["tried"]] == [1.0, 0.5]
    best = min(chosen["tried"], key=lambda t: t["objective"])
    assert found["parents"] == {"one": best["w one"], "two": best["w two"]}
    assert found["figures"]["combined"] == pytest.approx(best["loss"], abs=1e-6)
    assert set(found["test"]["losses"]) == {"base", "one", "two", "combined"}
    assert not found["test"]["seen"]
    shutil.rmtree(out)
    again = weft(*arguments, "--search", "--trials", "3", "--weights", "0.5,1")
    assert again.code == 0, again.err
    assert json.loads(again.out)["chosen"]["tried"][:2] == chosen["tried"]
    assert "trial 3/3" in again.err
    assert "trial 2/3" not in again.err


def test_a_greedy_soup_of_adapters_leaves_out_what_hurts(weft, adapters, rows, tmp_path):
    model, _ = library.load_base("pico")
    library.attach(model, library.LoRA(rank=2), "q_proj", name="bad", layers="0,1")
    with torch.no_grad():
        for p in library.parameters(model, "bad"):
            p.add_(3.0)
    library.save(model, tmp_path / "bad", "bad")
    folders = [str(tmp_path / "bad"), *(str(adapters / name) for name in ("one", "two"))]
    done = weft(
        "combine", "linear", *folders, "--base", "pico", "--greedy", "--eval", rows["eval"], "-o", tmp_path / "o"
    )
    assert done.code == 0, done.err
    assert "with bad: " in done.err
    assert "left out" in done.err
    assert "(chosen on it)" in done.out
    parents = json.loads((tmp_path / "o" / "weft.json").read_text())["provenance"]["combined"]["parents"]
    assert parents
    assert "bad" not in [p["name"] for p in parents]
    assert all(p["folder"].endswith(p["name"]) for p in parents)


def test_weights_are_learned_site_by_site(weft, adapters, rows, tmp_path):
    done = weft(
        "combine", "task_arithmetic", adapters / "one", adapters / "two", "--base", "pico", "--learn", "labels",
        "--steps", "3", "--eval", rows["eval"], "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert set(found["parents"]["one"]) == {site["address"] for site in found["conflict"]}
    assert found["chosen"]["losses"][0] > found["figures"]["combined"]
    assert "learned 4 weights in 3 steps" in (tmp_path / "out" / "weft.json").read_text()
    said = weft("combine", "ties", adapters / "one", "--base", "pico", "--learn", "labels", "--eval", rows["eval"],
                "-o", tmp_path / "no").err  # fmt: skip
    assert "weights are learned of a plain sum, which ties is not" in said


def test_bottlenecks_are_aligned_and_averaged(weft, rows, tmp_path):
    pytest.importorskip("ot")
    model, _ = library.load_base("pico")
    for seed, name in enumerate(("one", "two")):
        library.attach(model, library.Bottleneck(width=4), "mlp-blocks", name=name, layers="0,1", seed=seed)
        library.save(model, tmp_path / name, name)
    arguments = [
        "combine",
        "linear",
        tmp_path / "one",
        tmp_path / "two",
        "--base",
        "pico",
        "--eval",
        rows["eval"],
        "-o",
    ]
    done = weft(*arguments, tmp_path / "out", "--align")
    assert done.code == 0, done.err
    assert "squared distance between the hidden units" in done.out
    assert "without aligning them" in (tmp_path / "out" / "README.md").read_text()
    assert "use it in a route" in weft(*arguments, tmp_path / "no").err
    assert "averaged as they are" in weft(*arguments, tmp_path / "no", "--align", "--rank", "2").err


def test_adapters_are_weighed_by_their_own_rows(weft, adapters, rows, tmp_path):
    folders = [str(adapters / "one"), str(adapters / "two")]
    own = ["--own", rows["eval"], "--own", rows["test"]]
    common = ["--base", "pico", "--eval", rows["eval"], "--json", "-o"]
    losses = {}
    for name, *said in (("fisher",), ("regmean",), ("regmean", "--set", "through=merged")):
        out = tmp_path / "-".join([name, *said])
        done = weft("combine", name, *folders, *own, *said, *common, out)
        assert done.code == 0, done.err
        losses[out.name] = json.loads(done.out)["figures"]["combined"]
    assert len(set(losses.values())) == 3
    assert "there are 0" in weft("combine", "fisher", *folders, *common, tmp_path / "no").err
    assert "for each of the 2" in weft("combine", "fisher", *folders, *own[:2], *common, tmp_path / "no").err
    assert "leave --own out" in weft("combine", "ties", *folders, *own, *common, tmp_path / "no").err


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> dict[str, str]:
    """The bundled base, a folder of it that is a little worse, and one that is much worse."""
    folder = tmp_path_factory.mktemp("tuned")
    model, tokenizer = library.load_base("pico")
    draw = torch.Generator().manual_seed(0)
    for name, noise in (("near", 0.01), ("far", 0.3)):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(noise * p.std() * torch.randn(p.shape, generator=draw))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("near", "far")}


def test_checkpoints_are_chosen_in_memory_and_written(weft, tuned, rows, tmp_path):
    done = weft(
        "combine", "linear", tuned["far"], tuned["near"], "--greedy", "--eval", rows["eval"], "-o", tmp_path / "soup",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert list(found["chosen"]["weights"]) == [tuned["near"]]
    losses = found["figures"][0]["losses"]
    assert losses["merged"] == losses[tuned["near"]] < losses[tuned["far"]]
    near, soup = (Weights(Path(folder)) for folder in (tuned["near"], tmp_path / "soup"))
    assert all(torch.equal(soup.read(name), near.read(name)) for name in near)
    done = weft(
        "combine", "task_arithmetic", tuned["far"], "--base", "pico", "--search", "--trials", "3", "--range", "-1,1",
        "--eval", rows["eval"], "--test", rows["test"], "-o", tmp_path / "found",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "chosen of 3" in done.out
    again = weft("combine", "linear", tuned["near"], "--greedy", "--eval", rows["eval"], "-o", tmp_path / "soup")
    assert "is there already" in again.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiess", "x", "-o", "y"], "there is no rule 'tiess'"),
        (["ties", "x", "--set", "densty=1", "-o", "y"], "ties has no option 'densty'"),
        (["ties", "x", "--set", "density", "-o", "y"], "expected KEY=VALUE"),
        (["ties", "x", "z", "--weights", "1", "-o", "y"], "1 weights for 2 inputs"),
        (["ties", "x", "--weights", "a", "-o", "y"], "expected numbers with commas"),
        (["ties", "x"], "--out is missing"),
        (["ties", "-o", "y"], "there is nothing to combine"),
        (["linear", "./nowhere", "-o", "y"], "no folder here"),
        (["linear", "pico", "--search", "-o", "y"], "name the data"),
        (["linear", "pico", "--search", "--greedy", "-o", "y"], "give one of them"),
        (["linear", "pico", "--search", "--range", "1", "-o", "y"], "expected two numbers with a comma"),
        (["linear", "pico", "--rank", "3", "-o", "y"], "--rank is of no use here: it is for adapters"),
        (["linear", "pico", "--test", "t.jsonl", "-o", "y"], "name the data"),
        (["linear", "pico", "--learn", "labels", "-o", "y"], "weft extract makes one of a checkpoint"),
        (["linear", "pico", "--learn", "labels", "--search", "-o", "y"], "give one of them"),
        (["linear", "pico", "--trials", "3", "-o", "y"], "--trials is of no use here: it is for --search"),
        (["linear", "pico", "--greedy", "--steps", "3", "-o", "y"], "--steps is of no use here: it is for --learn"),
        (["merge.yaml", "--search", "-o", "y"], "--search is of no use here: a mergekit file says"),
    ],
)
def test_what_cannot_be_is_said(weft, arguments, said):
    done = weft("combine", *arguments)
    assert done.code == 2
    assert said in done.err
