"""`weft plan` says what a recipe takes, what makes it fit, and writes that beside the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.plan import fit
from weft.plan.calibration import CLASSES, Rates
from weft.recipe import load_recipe
from weft.tune import ahead

RATES = Rates(
    matmul={d: [[512, 512, 512, 0.01]] for d in ("float32", "bfloat16")},
    passes={name: [[1e4, 1e-5], [1e8, 1e-1]] for name in CLASSES},
    call_seconds=1e-5,
)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch, tmp_path: Path) -> None:
    """Rates that are always the same, and no past runs."""
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ahead, "calibrated", lambda device, recalibrate=False: RATES)


def test_it_says_what_a_run_takes(weft, recipe: Path) -> None:
    done = weft("plan", recipe, "--price", 2, "--json")
    assert done.code == 0, done.err
    found = done.json()
    per_layer = 4 * (256 + 256) + 3 * (256 + 704)  # rank 2 on q, k, v, o, and on gate, up, down
    assert found["num_trained"] == 4 * 2 * per_layer
    assert found["num_steps"] == 3
    parts = found["memory"]
    assert found["memory_bytes"] == sum(parts.values())
    assert 20e6 < parts["weights"] < 30e6
    assert parts["optimizer"] == pytest.approx(2 * parts["adapters"], rel=0.01)
    assert found["cost"] == pytest.approx(found["seconds"] / 1800)
    text = weft("plan", recipe).out
    for words in ("base weights", "peak memory", "tokens/s", "rows: packed", "not corrected"):
        assert words in text


def test_it_finds_what_fits_and_writes_it(weft, recipe: Path, tmp_path: Path, monkeypatch) -> None:
    few = [
        {"train.packing": None},
        {"train.loss_chunk": None},
    ]  # of all that are tried, those that are quickly forecast
    monkeypatch.setattr(fit, "changes", lambda recipe: iter(few))
    own = tmp_path / "my.yaml"
    own.write_text(recipe.read_text())
    big = ("train.batch_size=8", "train.packing=false", "train.loss_chunk=0")
    whole = weft("plan", own, *big, "--json").json()["memory_bytes"]
    done = weft("plan", own, *big, "--memory", f"{round(whole * 0.8 / 1e6)}MB", "--apply")
    assert done.code == 0, done.err
    assert "fastest first" in done.out
    assert own.read_text() == recipe.read_text()
    changed = load_recipe(tmp_path / "my.fit.yaml")
    assert changed != load_recipe(own, big)
    assert weft("plan", tmp_path / "my.fit.yaml", "--json").json()["memory_bytes"] < 0.8 * whole


def test_what_cannot_fit_is_exit_code_1(weft, recipe: Path, monkeypatch) -> None:
    monkeypatch.setattr(fit, "changes", lambda recipe: iter([{"train.activations": "recompute"}]))
    done = weft("plan", recipe, "--memory", "1MB")
    assert done.code == 1
    assert "nothing that is known makes it fit" in done.out


def test_a_table_and_a_plot(weft, recipe: Path, tmp_path: Path) -> None:
    done = weft(
        "plan", recipe, "--table", "method.rank=2,16", "--table", "train.packing=false", "--plot", tmp_path / "p.svg"
    )
    assert done.code == 0, done.err
    head, *rows = done.out.splitlines()
    assert head.split()[0] == "memory"
    assert [row.split()[0] for row in rows] == ["rank=2", "rank=16"]
    assert "<svg" in (tmp_path / "p.svg").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--memory", "lots"), "no size"),
        (("--time", "soon"), "no duration"),
        (("--apply",), "--memory or --time"),
        (("--table", "rank"), "write a key"),
    ],
)
def test_wrong_use(weft, recipe: Path, options, words) -> None:
    done = weft("plan", recipe, *options)
    assert done.code == 2
    assert words in done.err
